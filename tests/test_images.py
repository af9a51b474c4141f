"""Image inputs, on tiny random weights: opening, variations, image to image, reconstruction, previews."""
import io
import os

import numpy as np
import pytest
import torch
from commands import command
from PIL import Image
from safetensors.torch import load_file

from cascade import load_image
from model import CascadeError
from text_encoder import clip_preprocess

FEW = {"steps": 3, "decoder_steps": 2}
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    noise(120, 100).save(path)
    return path


def noise(width, height, mode="RGB"):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def saved(format, image, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------ opening
@pytest.mark.parametrize("format, exact", [
    ("PNG", True), ("BMP", True), ("TIFF", True), ("GIF", False), ("JPEG", False), ("WEBP", False)])
def test_a_format_is_recognised_by_its_bytes(tmp_path, format, exact):
    noise(40, 30).save(tmp_path / "a.dat", format)
    opened = np.asarray(load_image(tmp_path / "a.dat")).astype(int)
    assert np.abs(opened - np.asarray(noise(40, 30))).max() <= (0 if exact else 255)
    assert opened.shape == (30, 40, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "PA", "HSV"])
def test_other_colour_spaces_become_rgb(mode):
    opened = load_image(noise(20, 10).convert("P" if mode == "PA" else mode).convert(mode))
    assert opened.mode == "RGB" and opened.size == (20, 10)


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1), (9, 0)])
def test_an_image_is_turned_upright(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(40, 30).save(tmp_path / "a.png", exif=exif)
    opened = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(opened, np.rot90(np.asarray(noise(40, 30)), turns))


def test_transparent_pixels_become_white(tmp_path):
    values = np.zeros((4, 6, 4), np.uint8)
    values[:2, :, 3], values[2:, :, 0] = 255, 200
    for image in (Image.fromarray(values), Image.fromarray(values[..., [0, 3]], "LA")):
        opened = np.asarray(load_image(image))
        assert (opened[:2] == 0).all() and (opened[2:] == 255).all()
    palette = noise(8, 8).convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes(256))
    assert (np.asarray(load_image(tmp_path / "a.png")) == 255).all()


def test_sixteen_bits_become_eight_and_keep_their_transparency(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format, options in (("TIFF", {}), ("PNG", {}), ("PNG", {"transparency": 0})):
        (tmp_path / "a").write_bytes(saved(format, Image.fromarray(values), **options))
        opened = np.asarray(load_image(tmp_path / "a")).astype(int)
        expected = np.where(values == 0, 65535, values) if options else values
        assert np.abs(opened - (expected / 257)[..., None]).max() <= 1


BAD = {
    "text": b"this is not an image", "empty": b"", "cut": saved("PNG", noise(120, 100))[:5000],
    "huge": saved("PNG", Image.new("1", (2000, 2000))), "thin": saved("PNG", noise(2000, 10)),
    "EPS": saved("EPS", noise(20, 20)), "PPM": saved("PPM", noise(20, 20)),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "DDS": b"DDS |\0\0\0" + bytes(200),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(200),
    "float TIFF": saved("TIFF", Image.fromarray(np.ones((8, 8), np.float32))),
    "integer TIFF": saved("TIFF", Image.fromarray(np.ones((8, 8), np.int32)))}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10 ** 6)
    (tmp_path / "bad.png").write_bytes(BAD[name])
    with pytest.raises(CascadeError, match=r"bad\.png: .*expected") as error:
        load_image(tmp_path / "bad.png")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_image_is_refused_or_opened(tmp_path, format):
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = bytearray(saved(format, noise(20, 15)))
        for i in rng.integers(0, min(len(data), 200), 4):
            data[i] = rng.integers(0, 256)
        (tmp_path / "a.png").write_bytes(data[:rng.integers(1, 2 * len(data))])
        try:
            assert load_image(tmp_path / "a.png").mode == "RGB"
        except CascadeError as error:
            assert "a.png" in str(error)


def test_what_is_no_image_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")  # to open it would wait for ever
    os.symlink("loop.png", tmp_path / "loop.png")
    files = ["nowhere.png", "", "a\0.png", "\ud800.png", "a" * 300, "fifo.png", "loop.png"]
    for source in [*(tmp_path / name for name in files), None, 3, b"a.png", torch.zeros(3, 4, 4)]:
        with pytest.raises(CascadeError):
            load_image(source)


def test_a_single_pixel_is_an_image(pipeline):
    pixel = Image.new("RGB", (1, 1), (255, 0, 0))
    assert clip_preprocess(pixel, 30).shape == (3, 30, 30)
    assert pipeline.encode_semantic(pixel).shape == (1, 16, 3, 3)


# ------------------------------------------------------------------------------ variations
def test_one_or_several_reference_images_change_the_latents(pipeline, image):
    other = noise(64, 200)
    runs = [pipeline.prior("a star", steps=2, variation_images=images)
            for images in (None, [image], [image, other], [other, image])]
    assert all(run.shape == (1, 16, 3, 3) for run in runs)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(runs[:3]) for b in runs[:i])
    assert (runs[2] - runs[3]).abs().max() < 1e-5 * runs[2].abs().max()  # attention has no order


def test_an_image_alone_in_a_list_or_as_embeddings_is_the_same(pipeline, image):
    embeddings = pipeline.encode_image(image)
    assert embeddings.shape == (1, 24)
    runs = [pipeline.prior("a star", steps=2, variation_images=images)
            for images in (image, [image], str(image), load_image(image), embeddings)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_reference_images_need_no_prompt_and_serve_all_prompts(pipeline, image):
    assert pipeline(variation_images=[image], output="pt", **FEW).shape == (1, 3, 128, 128)
    both = pipeline(["a star", ""], variation_images=[image], output="pt", seed=3, **FEW)
    alone = pipeline("", variation_images=[image], output="pt", seed=4, **FEW)
    assert torch.allclose(both[1:], alone, atol=1e-5)


# ------------------------------------------------------------------------------ image to image
def test_an_image_is_encoded_as_the_network_does_it(pipeline, image):
    latent = pipeline.encode_semantic(image, width=128, height=128)
    assert latent.shape == (1, 16, 3, 3) and latent.dtype == torch.float32
    assert pipeline.encode_semantic(image, width=200, height=90).shape == (1, 16, 3, 5)
    pixels = torch.from_numpy(np.array(noise(96, 96))).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(pixels, (96, 96), mode="bilinear", antialias=True)
    latent = pipeline.encode_semantic(noise(96, 96), width=96, height=96)
    assert torch.allclose(latent, pipeline.network("effnet_encoder")(small), atol=1e-5)


def test_a_low_strength_stays_near_the_image(pipeline, image):
    z = pipeline.encode_semantic(image)
    near, far, same = (
        pipeline.prior("a star", steps=20, init_image=start, strength=strength, guidance=1.0)
        for start, strength in ((image, 0.1), (image, 0.9), (z, 0.1)))
    assert (near - z).abs().mean() < (far - z).abs().mean() and torch.equal(near, same)


def test_the_halves_of_image_to_image_give_what_the_whole_gives(pipeline, image):
    start = {"init_image": image, "strength": 0.7}
    whole = pipeline("a star", steps=5, decoder_steps=2, output="pt", **start)
    latents = pipeline.prior("a star", steps=5, **start)
    halves = pipeline.decode(latents, "a star", steps=2, prior_steps=3, output="pt")
    assert torch.equal(whole, halves)


def test_recipes_reach_both_stages(pipeline):
    runs = {name: pipeline("a star", output="latent", recipe=name, **FEW)
            for name in ("diffusers", "original", "lcm")}
    assert torch.equal(runs["diffusers"], pipeline("a star", output="latent", **FEW))
    for name in ("original", "lcm"):
        assert (runs["diffusers"] - runs[name]).abs().max() > 1e-3
    latents = pipeline.prior("a star", steps=3)
    options = {"steps": 2, "output": "latent", "recipe": "original"}
    unguided, default, guided = (
        pipeline.decode(latents, "a star", guidance=scale, **options) for scale in (0.0, None, 1.1))
    assert torch.equal(default, guided) and not torch.allclose(unguided, guided, atol=1e-4)


# ------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("options", [
    "--variation-image IMAGE --variation-image IMAGE", "--variation-image IMAGE prompt",
    "prompt --init-image IMAGE --strength 0.6", "--init-image IMAGE"])
def test_the_command_takes_images(folder, image, tmp_path, options):
    output = tmp_path / "b.png"
    command(*options.replace("IMAGE", str(image)).split(), "--weights", folder, "-o", output,
            "--steps", 4, "--decoder-steps", 1)
    with Image.open(output) as drawn:
        assert drawn.size == (128, 128)
        assert drawn.text["prompts"] == ("prompt" if "prompt" in options else "")
        count = options.count("--variation-image")
        assert drawn.text.get("variation_image") == (str(["a.png"] * count) if count else None)
        strength = "0.6" if "0.6" in options else "0.8" if "--init-image" in options else None
        assert drawn.text.get("strength") == strength


def test_the_command_reconstructs_and_says_how_well(folder, image, tmp_path, capsys):
    source = ["--weights", folder, "--reconstruct", image]
    command(*source, "--seed", 3, "-o", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["latents"].shape == (1, 16, 3, 3)
    few = ["--decoder-steps", 2, "--weights", folder]
    command("--latents", tmp_path / "a.safetensors", *few, "-o", tmp_path / "half.png")
    assert capsys.readouterr().out == ""
    command(*source, "--seed", 3, *few, "-o", tmp_path / "whole.png")
    assert capsys.readouterr().out.startswith("49152 numbers -> 144, 341 times fewer -> image; PSNR ")
    assert (tmp_path / "half.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    with Image.open(tmp_path / "whole.png") as drawn:
        assert drawn.text["reconstruct"] == "a.png"
        assert not {"steps", "guidance", "strength", "negative"} & set(drawn.text)


def test_a_perfect_reconstruction_is_no_error(folder, tmp_path, monkeypatch):
    black = np.zeros((1, 128, 128, 3), np.float32)
    monkeypatch.setattr("cascade.decode_images", lambda *given: black)
    Image.new("RGB", (128, 128)).save(tmp_path / "black.png")
    command("--reconstruct", tmp_path / "black.png", "--weights", folder, "-o", tmp_path / "a.png")


def test_the_command_saves_a_preview_of_every_step(folder, tmp_path):
    (tmp_path / "steps").mkdir()
    command("a star", "--weights", folder, "--previews", tmp_path / "steps", "--steps", 3,
            "--decoder-steps", 1, "--images", 2, "-o", tmp_path / "a.png")
    previews = sorted((tmp_path / "steps").iterdir())
    assert [path.name for path in previews] == ["step-001.png", "step-002.png", "step-003.png"]
    assert {Image.open(path).size for path in previews} == {(48, 24)}
