"""Pictures as input, on tiny random weights: opening, looking, encoding, starting, previewing, the command."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import FEW, command

import cascade
from cascade import CascadeError, open_picture
from text_encoder import fit

SIZE = {"width": 100, "height": 90}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    noise(120, 100).save(path)
    return path


def noise(width, height, channels=3):
    values = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze())


# ------------------------------------------------------------------------------------------------ opening


def test_an_upright_picture_is_left_as_it_is(picture):
    assert np.array_equal(np.asarray(open_picture(picture)), np.asarray(noise(120, 100)))


def test_a_picture_that_was_taken_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise(40, 30).save(tmp_path / "turned.png", exif=exif)
    turned = open_picture(tmp_path / "turned.png")
    assert turned.size == (30, 40)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(noise(40, 30)), -1))


def test_what_is_transparent_is_white(tmp_path):
    values = np.zeros((4, 6, 4), np.uint8)
    values[:2, :, 3], values[2:, :, 0] = 255, 200
    Image.fromarray(values).save(tmp_path / "clear.png")
    seen = np.asarray(open_picture(tmp_path / "clear.png"))
    assert (seen[:2] == 0).all() and (seen[2:] == 255).all()
    grey = Image.fromarray(values[..., [0, 3]], "LA")
    assert (np.asarray(open_picture(grey))[2:] == 255).all()


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    seen = np.asarray(open_picture(tmp_path / "deep.png"))
    assert seen.shape == (8, 8, 3) and np.abs(seen[..., 0] - values / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colours_become_red_green_and_blue(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    noise(20, 10).convert(mode).save(path)
    seen = open_picture(path)
    assert seen.mode == "RGB" and seen.size == (20, 10)


def huge(width, height):
    """A PNG's header that promises more pixels than anyone wants."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "text.png": b"this is not a picture",
    "empty.png": b"",
    "cut.png": None,
    "huge.png": huge(20000, 20000),
    "thin.png": huge(2000, 10),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_in_one_line(tmp_path, picture, name):
    path = tmp_path / name
    path.write_bytes(BAD[name] if BAD[name] is not None else picture.read_bytes()[:5000])
    with pytest.raises(CascadeError, match=f"{name}: not a picture that can be used") as refused:
        open_picture(path)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_or_no_picture_at_all_is_refused(tmp_path):
    with pytest.raises(CascadeError, match="No such file"):
        open_picture(tmp_path / "nowhere.png")
    for nothing in (tmp_path, None, 3, torch.zeros(3, 4, 4)):
        with pytest.raises(CascadeError, match="not a picture"):
            open_picture(nothing)


def test_a_single_pixel_is_a_picture(pipeline):
    pixel = Image.new("RGB", (1, 1), (255, 0, 0))
    assert fit(pixel, 30).shape == (3, 30, 30)
    assert pipeline.encode(pixel).shape == (1, 16, 3, 3)


# ------------------------------------------------------------------------------------------------ variations


def test_one_or_several_pictures_change_the_latents(pipeline, picture):
    other = noise(64, 200)
    runs = [
        pipeline.prior("a star", steps=2, variation_images=images)
        for images in (None, [picture], [picture, other], [other, picture])
    ]
    assert all(run.shape == (1, 16, 3, 3) for run in runs)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(runs[:3]) for b in runs[:i])
    assert (runs[2] - runs[3]).abs().max() < 1e-5 * runs[2].abs().max()  # attention has no order


def test_ready_made_embeddings_are_the_same(pipeline, picture):
    seen = pipeline.look([picture])
    assert seen.shape == (1, 24)
    ours, theirs = (pipeline.prior("a star", steps=2, variation_images=given) for given in ([picture], seen))
    assert torch.equal(ours, theirs)


def test_pictures_need_no_prompt_and_serve_all(pipeline, picture):
    plain = pipeline(variation_images=[picture], output="pt", **FEW)
    assert plain.shape == (1, 3, 128, 128)
    both = pipeline(["a star", ""], variation_images=[picture], output="pt", seed=3, **FEW)
    alone = pipeline("", variation_images=[picture], output="pt", seed=4, **FEW)
    assert torch.allclose(both[1:], alone, atol=1e-5)


# ------------------------------------------------------------------------------------------------ latents of pictures


def test_a_picture_is_encoded_as_the_network_does(pipeline, picture):
    latent = pipeline.encode(picture, 128, 128)
    cut = noise(120, 100).resize((128, 107), Image.Resampling.BICUBIC)
    assert latent.shape == (1, 16, 3, 3) and latent.dtype == torch.float32 and cut.size == (128, 107)
    assert pipeline.encode(picture, 200, 90).shape == (1, 16, 3, 5)
    exact = Image.fromarray(np.asarray(noise(96, 96)))
    pixels = torch.from_numpy(np.array(exact)).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(pixels, (96, 96), mode="bilinear", antialias=True)
    assert torch.allclose(pipeline.encode(exact, 96, 96), pipeline.network("effnet_encoder")(small), atol=1e-5)


def test_a_start_of_little_strength_stays_near(pipeline, picture):
    z = pipeline.encode(picture)
    near, far = (pipeline.prior("a star", steps=20, init_image=picture, strength=s, guidance=1.0) for s in (0.1, 0.9))
    assert (near - z).abs().mean() < (far - z).abs().mean()
    same = pipeline.prior("a star", steps=20, init_image=z, strength=0.1, guidance=1.0)
    assert torch.equal(near, same)


def test_the_halves_of_a_started_run_are_the_whole(pipeline, picture):
    given = {"init_image": picture, "strength": 0.7}
    whole = pipeline("a star", steps=5, decoder_steps=2, output="pt", **given)
    latents = pipeline.prior("a star", steps=5, **given)
    assert torch.equal(whole, pipeline.decode(latents, "a star", steps=2, prior_steps=3, output="pt"))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"strength": 1.5, "init_image": torch.zeros(1, 16, 3, 3)}, "strength is 1.5"),
        ({"strength": 0.01, "init_image": torch.zeros(1, 16, 3, 3)}, "not one step is left"),
        ({"init_image": torch.zeros(1, 16, 4, 3)}, "init_image is a latent"),
        ({"recipe": "soup"}, "recipe is 'soup'; wanted is one of diffusers, lcm, original"),
        ({"interval": (0.7, 0.3)}, "interval is"),
        ({"variation_images": torch.zeros(1, 5)}, "variation_images are"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(pipeline, given, said):
    with pytest.raises(CascadeError, match=said):
        pipeline.prior("a star", steps=3, **given)


def test_recipes_reach_both_stages(pipeline):
    runs = {name: pipeline("a star", output="latent", recipe=name, **FEW) for name in ("diffusers", "original", "lcm")}
    assert torch.equal(runs["diffusers"], pipeline("a star", output="latent", **FEW))
    assert all((runs["diffusers"] - runs[name]).abs().max() > 1e-3 for name in ("original", "lcm"))
    latents = pipeline.prior("a star", steps=3)
    plain, guided, told = (
        pipeline.decode(latents, "a star", steps=2, output="latent", recipe="original", guidance=guidance)
        for guidance in (0.0, None, 1.1)
    )
    assert torch.equal(guided, told) and not torch.allclose(plain, told, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_takes_pictures(folder, picture, tmp_path):
    few = ("--weights", folder, "--steps", 4, "--decoder-steps", 2)
    for name, given in {
        "varied": ("--variation-image", picture, picture),
        "prompted": ("a star", "--variation-image", picture),
        "started": ("a star", "--init-image", picture, "--strength", "0.6"),
        "original": ("a star", "--recipe", "original", "--guidance-interval", "0.2", "0.9"),
    }.items():
        run = command(*given, *few, "-o", tmp_path / f"{name}.png")
        assert run.returncode == 0, run.stderr
        assert Image.open(tmp_path / f"{name}.png").size == (128, 128)
    assert Image.open(tmp_path / "started.png").text["strength"] == "0.6"


def test_the_command_reconstructs_and_says_how_well(folder, picture, tmp_path):
    run = command("--reconstruct", picture, "--weights", folder, "--decoder-steps", 2, "-o", tmp_path / "b.png")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("49152 numbers to 144, 341 times fewer, and back: PSNR ")
    saved = tmp_path / "latents.safetensors"
    run = command("--reconstruct", picture, "--weights", folder, "-o", saved)
    assert run.returncode == 0, run.stderr
    assert load_file(saved)["latents"].shape == (1, 16, 3, 3)
    run = command("--latents", saved, "--weights", folder, "--decoder-steps", 2, "-o", tmp_path / "c.png")
    assert run.returncode == 0, run.stderr
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "bc"))


def test_saved_latents_are_decoded_by_the_recipe_that_made_them(folder, picture, tmp_path):
    given = ("a star", "--init-image", picture, "--recipe", "original", "--weights", folder, "--steps", 4)
    for name in ("whole.png", "half.safetensors"):
        assert command(*given, "--decoder-steps", 2, "-o", tmp_path / name).returncode == 0
    half = ("--latents", tmp_path / "half.safetensors", "--weights", folder, "--decoder-steps", 2)
    assert command(*half, "-o", tmp_path / "half.png").returncode == 0
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "half.png").read_bytes()
    assert Image.open(tmp_path / "half.png").text["decoder_guidance"] == "1.1"


def test_the_command_saves_a_preview_of_every_step(folder, tmp_path):
    (tmp_path / "steps").mkdir()
    few = ("--steps", 3, "--decoder-steps", 1, "--images", 2)
    run = command("a", "--weights", folder, "--previews", tmp_path / "steps", *few, "-o", tmp_path / "a.png")
    assert run.returncode == 0, run.stderr
    seen = sorted((tmp_path / "steps").iterdir())
    assert [path.name for path in seen] == ["step-001.png", "step-002.png", "step-003.png"]
    assert {Image.open(path).size for path in seen} == {(48, 24)}


@pytest.mark.parametrize(
    "given, said",
    [
        (["--init-image", "nowhere.png"], "nowhere.png: not a picture that can be used ([Errno 2] No such file"),
        (["--previews", "nowhere"], "nowhere: cannot be written"),
        (["--reconstruct", "a.png", "--init-image", "a.png"], "wanted is one of:"),
        (["--variation-image"], "expected at least one argument"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(folder, capsys, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = [] if "--reconstruct" in given else ["a star"]
    assert cascade.main([*prompt, "--weights", str(folder), *given]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not list(tmp_path.iterdir())
