"""From a prompt to an image, on tiny random weights: sizes, seeds, types, layouts and memory."""
import math
import shutil

import numpy as np
import pytest
import torch
from commands import count_networks
from helpers import SHORT
from PIL import Image
from safetensors.torch import load_file
from tiny import save, write_diffusers_folder, write_folder

import model
from cascade import Cascade

FEW = {"steps": 3, "decoder_steps": 2}
START = {"init_image": Image.new("RGB", (64, 64), "red"), "strength": 0.7}


# ------------------------------------------------------------------------------ the same image
def test_a_batch_gives_what_single_runs_give(pipeline):
    prompts, negative = ["a red circle", "two stars"], ["blue", ""]
    options = SHORT | {"decoder_guidance": 1.5, "steps": 2, "output": "np"}
    batch = pipeline(prompts, negative, images=2, seed=5, **options)
    for i in range(4):
        single = pipeline(prompts[i // 2], negative[i // 2], seed=5 + i, **options)
        assert np.abs(single[0] - batch[i]).max() <= 1e-5


@pytest.mark.parametrize("start, prior_steps", [({}, 3), (START, 2)], ids=["noise", "image"])
def test_the_two_halves_give_what_the_whole_gives(pipeline, start, prior_steps):
    size = {"seed": 3, "width": 100, "height": 150}
    whole = pipeline("a red circle", "blue", images=2, output="pt", **size, **start, **FEW)
    latents = pipeline.prior("a red circle", "blue", images=2, steps=3, **size, **start)
    assert latents.shape == (2, 16, 4, 3) and latents.dtype == torch.float32
    text = pipeline.encode_prompt("a red circle", "blue")
    halves = pipeline.decode(latents, text, steps=2, prior_steps=prior_steps, output="pt", **size)
    assert torch.equal(whole, halves)
    assert torch.equal(whole, pipeline(text, images=2, output="pt", **size, **start, **FEW))


def test_prompt_negative_prompt_seed_and_guidance_all_matter(pipeline):
    base = {"prompts": "a red circle", "guidance": 4.0, "decoder_guidance": 2.0, "output": "pt"}
    changes = [{"prompts": "a star"}, {"negative": "blue"}, {"seed": 1}, {"guidance": 2.0},
               {"decoder_guidance": 0.0}]
    image = pipeline(**base, **FEW)
    assert all((image - pipeline(**base | change, **FEW)).abs().max() > 1e-3 for change in changes)


# ------------------------------------------------------------------------------ sizes and outputs
@pytest.mark.parametrize("width, height", [(65, 129), (100, 77), (171, 256), (200, 64), (67, 311)])
def test_every_output_shows_the_same_image_of_exactly_the_requested_size(pipeline, width, height):
    options = SHORT | {"width": width, "height": height}
    (pil,), array, pixels, latents = (
        pipeline("a star", **options | {"output": output}) for output in ("pil", "np", "pt", "latent"))
    assert array.shape == (1, height, width, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1)) and pixels.dtype == torch.float32
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    assert latents.shape == (1, 4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))
    decoded = pipeline.network("stage_a").decode(latents)[:, :, :height, :width].clamp(0, 1)
    assert torch.allclose(decoded, pixels, atol=1e-6)


def test_the_default_size_is_the_one_that_the_file_was_trained_for(folder, tmp_path):
    assert Cascade(folder).size(None, None) == (128, 128)
    assert Cascade(folder).size(200, None) == (200, 128)
    save(load_file(folder / "stage_c.safetensors"), tmp_path / "stage_c.safetensors")
    assert Cascade(tmp_path).size(None, None) == (1024, 1024)


def test_the_compression_decides_the_size_of_the_semantic_latent(pipeline):
    options = {"width": 128, "height": 64, "compression": 64}
    latents = pipeline.prior("a star", steps=3, **options)
    assert latents.shape == (1, 16, 1, 2) and pipeline.encode_semantic(latents, **options) is latents
    image = pipeline.decode(latents, "a star", steps=2, prior_steps=3, compression=64, output="pt")
    assert torch.equal(image, pipeline("a star", output="pt", **options, **FEW))
    with pytest.raises(model.CascadeError, match="latents: expected the shape"):
        pipeline.decode(latents, width=128, height=64)


@pytest.mark.parametrize("start", [{}, START | {"strength": 0.5}], ids=["noise", "image"])
def test_a_list_of_times_replaces_the_number_of_steps(pipeline, start):
    options = {"seed": 3, "output": "pt", **start}
    first = 0.5 if start else 1.0
    times = {"steps": [first, first / 2, 0.0], "decoder_steps": [1.0, 0.5, 0.0]}
    other = times | {"steps": [first, 0.1, 0.0]}
    number = pipeline("a star", steps=4 if start else 2, decoder_steps=2, **options)
    assert torch.equal(number, pipeline("a star", **times, **options))
    assert not torch.equal(number, pipeline("a star", **other, **options))


# ------------------------------------------------------------------------------ memory
def test_one_network_is_in_memory_at_a_time_unless_all_are_kept(folder, monkeypatch):
    counts = count_networks(monkeypatch)
    released = Cascade(folder)("a star", **SHORT)
    assert counts == [1, 1, 1, 1]
    counts.clear()
    keeping = Cascade(folder, keep=True)
    assert torch.equal(keeping("a star", **SHORT), released)
    assert torch.equal(keeping("a star", **SHORT), released) and counts == [1, 2, 3, 4]


# ------------------------------------------------------------------------------ types
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_stored_type_runs_in_any_type(tmp_path, stored):
    folder = write_folder(tmp_path, seed=1, dtype=stored)
    loaded = model.load(folder / "stage_b.safetensors")
    assert {(each.dtype, each.requires_grad) for each in loaded.parameters()} == {(stored, False)}
    assert not loaded.training
    exact = Cascade(folder)("a star", **SHORT)
    for dtype, decoder_dtype in (("bf16", None), (torch.float16, None), (torch.bfloat16, "fp16")):
        image = Cascade(folder, dtype=dtype, decoder_dtype=decoder_dtype)("a star", **SHORT)
        assert image.dtype == torch.float32 and (image - exact).abs().mean() < 0.05


def test_stage_b_and_a_may_have_a_type_of_their_own(folder):
    mixed = Cascade(folder, dtype=torch.bfloat16, decoder_dtype="fp16")
    for name in ("stage_c", "stage_b", "stage_a", "text_encoder"):
        dtype = torch.float16 if name in ("stage_b", "stage_a") else torch.bfloat16
        assert {parameter.dtype for parameter in mixed.network(name).parameters()} == {dtype}


# ------------------------------------------------------------------------------ folders
def test_original_diffusers_and_mixed_folders_give_the_same_image(folder, tmp_path):
    diffusers = write_diffusers_folder(tmp_path / "diffusers", folder)
    mixed = shutil.copytree(diffusers, tmp_path / "mixed", ignore=shutil.ignore_patterns("prior"))
    shutil.copy(folder / "stage_c.safetensors", mixed)
    original, *others = (Cascade(each)("a star", **SHORT) for each in (folder, diffusers, mixed))
    assert all(torch.allclose(original, image, atol=1e-5) for image in others)


LITE = [                                                # lite, and the files of Stage C and B
    (False, "stage_c_bf16", "decoder"), (True, "stage_c_lite", "decoder_lite"),
    ("prior", "stage_c_lite", "decoder"), ("decoder", "stage_c_bf16", "decoder_lite")]
ENDINGS = [("fp32", "", ""), ("bf16", "_bf16", ""), ("fp16", "", ".fp16")]  # of Stage A and B


def test_lite_is_an_option_and_the_file_whose_precision_fits_the_type_is_used(tmp_path):
    model = "diffusion_pytorch_model"
    files = ["stage_c_bf16", "stage_c_lite", "stage_a", "stage_a_bf16", "text_encoder/model.bf16"]
    for name in [*files, f"decoder/{model}", f"decoder/{model}.fp16", f"decoder_lite/{model}.fp16"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    for lite, prior, decoder in LITE:
        cascade = Cascade(tmp_path, lite=lite)
        names = [cascade.file(name).stem for name in ("stage_c", "stage_a", "text_encoder")]
        assert names == [prior, "stage_a", "model.bf16"]
        assert cascade.file("stage_b").parent.name == decoder
    for dtype, stage_a, stage_b in ENDINGS:
        cascade = Cascade(tmp_path, dtype=dtype)
        names = [cascade.file(name).stem for name in ("stage_a", "stage_b")]
        assert names == [f"stage_a{stage_a}", f"{model}{stage_b}"]
