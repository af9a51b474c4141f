"""Image inputs, on tiny random weights: opening, variations, image to image, reconstruction, previews."""
import io
import os

import numpy as np
import pytest
import torch
from commands import command
from helpers import random_image
from PIL import Image, ImageSequence

from cascade import load_image
from model import CascadeError

ORIENTATION = 0x0112
LOSSLESS = ["PNG", "BMP", "TIFF"]
FORMATS = [*LOSSLESS, "GIF", "JPEG", "WEBP"]


def saved(format, image, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------ opening
def test_a_format_is_recognised_by_its_bytes(tmp_path):
    for format in FORMATS:
        (tmp_path / "a.dat").write_bytes(saved(format, random_image(40, 30)))
        opened = load_image(tmp_path / "a.dat")
        assert opened.size == (40, 30)
        assert format not in LOSSLESS or np.array_equal(opened, random_image(40, 30)), format


def test_other_colour_spaces_become_rgb():
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "PA", "HSV"):
        image = random_image(20, 10).convert("P" if mode == "PA" else mode)
        opened = load_image(image.convert(mode))
        assert opened.mode == "RGB" and opened.size == (20, 10), mode


def test_an_image_is_turned_upright(tmp_path):
    for orientation, turns in ((1, 0), (3, 2), (6, 3), (8, 1), (9, 0)):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        random_image(40, 30).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(random_image(40, 30), turns))


def test_transparent_pixels_become_white(tmp_path):
    values = np.zeros((4, 6, 4), np.uint8)
    values[:2, :, 3], values[2:, :, 0] = 255, 200
    for image in (Image.fromarray(values), Image.fromarray(values[..., [0, 3]], "LA")):
        opened = np.asarray(load_image(image))
        assert (opened[:2] == 0).all() and (opened[2:] == 255).all()
    random_image(8, 8).convert("P").save(tmp_path / "a.png", transparency=bytes(256))
    assert (np.asarray(load_image(tmp_path / "a.png")) == 255).all()


def test_sixteen_bits_become_eight_and_keep_their_transparency(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format, options in (("TIFF", {}), ("PNG", {}), ("PNG", {"transparency": 0})):
        (tmp_path / "a").write_bytes(saved(format, Image.fromarray(values), **options))
        opened = np.asarray(load_image(tmp_path / "a")).astype(int)
        expected = np.where(values == 0, 65535, values) if options else values
        assert np.abs(opened - (expected / 257)[..., None]).max() <= 1


BAD = {
    "text": b"this is not an image", "empty": b"", "cut": saved("PNG", random_image(120, 100))[:5000],
    "huge": saved("PNG", Image.new("1", (2000, 2000))), "thin": saved("PNG", random_image(2000, 10)),
    "EPS": saved("EPS", random_image(20, 20)), "PPM": saved("PPM", random_image(20, 20)),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "DDS": b"DDS |\0\0\0" + bytes(200),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(200),
    "float TIFF": saved("TIFF", Image.fromarray(np.ones((8, 8), np.float32))),
    "integer TIFF": saved("TIFF", Image.fromarray(np.ones((8, 8), np.int32)))}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10 ** 6)
    (tmp_path / "bad.png").write_bytes(BAD[name])
    with pytest.raises(CascadeError, match=r"\A.*bad\.png: .*expected.*\Z"):  # . is no line end
        load_image(tmp_path / "bad.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_image_is_refused_or_opened(tmp_path, format):
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = np.frombuffer(saved(format, random_image(20, 15)), np.uint8).copy()
        data[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
        (tmp_path / "a.png").write_bytes(data[:rng.integers(1, 2 * len(data))].tobytes())
        try:
            assert load_image(tmp_path / "a.png").mode == "RGB"
        except CascadeError as error:
            assert "a.png" in str(error)


def test_what_is_no_image_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")  # to open it would wait for ever
    os.symlink("loop.png", tmp_path / "loop.png")
    files = ["nowhere.png", "", "a\0.png", "\ud800.png", "a" * 300, "fifo.png", "loop.png"]
    for source in (*(tmp_path / name for name in files), None, 3, b"a.png", torch.zeros(3, 4, 4)):
        with pytest.raises(CascadeError):
            load_image(source)


# ------------------------------------------------------------------------------ image inputs
def test_reference_images_change_the_latents_in_whatever_form_and_order(pipeline, place):
    image, other = load_image("a.png"), random_image(64, 200)
    embedding = pipeline.encode_image("a.png")
    assert embedding.shape == (1, 24)
    forms = [None, "a.png", place / "a.png", image, [image], embedding, embedding.double(),
             ["a.png", other], [other, "a.png"]]
    none, one, *same_as_one, two, swapped = (
        pipeline.prior("a star", steps=2, variation_images=images) for images in forms)
    assert all((a - b).abs().max() > 1e-3 for a, b in ((none, one), (one, two), (none, two)))
    assert all(torch.equal(one, same) for same in same_as_one)
    assert (two - swapped).abs().max() < 1e-5 * two.abs().max()  # attention has no order


def test_an_initial_image_is_encoded_as_the_network_does_it(pipeline):
    image, size = random_image(96, 96), {"width": 96, "height": 96}
    assert pipeline.encode_semantic(image, width=200, height=90).shape == (1, 16, 3, 5)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255  # 32 * 3 a side
    latent = pipeline.encode_semantic(image, **size)
    assert torch.allclose(latent, pipeline.network("effnet_encoder")(pixels), atol=1e-5)
    from_latent = pipeline.prior(init_image=latent, **size)
    assert torch.equal(from_latent, pipeline.prior(init_image=image, **size))


def test_recipes_reach_both_stages(pipeline):
    def decode(**options):
        return pipeline.decode(latents, "a star", steps=2, output="latent", **options)

    latents = pipeline.prior("a star", steps=3)
    for recipe in ("original", "lcm"):
        assert (pipeline.prior("a star", steps=3, recipe=recipe) - latents).abs().max() > 1e-3
        assert (decode(recipe=recipe, guidance=0.0) - decode()).abs().max() > 1e-3
    default = decode(recipe="original")
    assert torch.equal(default, decode(recipe="original", guidance=1.1))
    assert not torch.allclose(default, decode(recipe="original", guidance=0.0), atol=1e-4)


# ------------------------------------------------------------------------------ the command
def test_the_command_says_how_good_a_reconstruction_is(place, folder, monkeypatch, capsys):
    for _ in range(2):  # then a perfect one
        command("--reconstruct", "a.png", "--weights", folder, "--decoder-steps", 1)
        said = capsys.readouterr().out
        assert all(part in said for part in ("49152", "144", "341 times fewer", "PSNR"))
        Image.new("RGB", (128, 128)).save("a.png")
        monkeypatch.setattr("cascade.decode_images", lambda *given: np.zeros((1, 128, 128, 3)))


def test_the_command_saves_a_preview_of_every_step(place, folder):
    few = ["--steps", 3, "--decoder-steps", 1, "--images", 2]
    command("a star", "--weights", folder, "--previews", ".", *few, "-o", "b.png")
    previews = sorted(place.glob("step*"))
    assert [path.name for path in previews] == ["step-001.png", "step-002.png", "step-003.png"]
    assert {Image.open(path).size for path in previews} == {(48, 24)}


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_has_a_frame_for_every_step_of_both_stages(place, folder, ending):
    few = ["--steps", 3, "--decoder-steps", 2, "--images", 2, "--width", 64, "--weights", folder]
    prompt = "a star\n" + "x" * 1000
    command(prompt, *few, "-o", "b.png")
    command(prompt, *few, "-o", "c.png", "--animate", f"a.{ending}")
    for i in range(2):                                  # watching changes nothing
        assert (place / f"b-{i}.png").read_bytes() == (place / f"c-{i}.png").read_bytes()
    with Image.open(f"a.{ending}") as animation:
        assert animation.n_frames in (4, 5) and animation.size == (2 * 128 + 8, 256 + 32)  # WebP drops equal frames
        frames = [np.array(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(animation)]
    halves = np.array([(frame[:256, :128], frame[:256, -128:]) for frame in frames])
    changes = abs(np.diff(halves, axis=0)).mean((2, 3, 4)) > 1      # from each frame to the next: left, right
    left, right = changes.T
    assert left[0] and not right[0] and right[-1] and not left[-1]
