"""ControlNets and masks: the original code's numbers, what a hint is made of, latent inpainting, clear errors."""
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import FEW, change_tensors, refused
from helpers import TESTS, assert_same, noise, original, original_stage_c, relative_error
from PIL import Image
from safetensors.torch import load_file

import cascade
import model
from cascade import CONTROLS, Cascade, canny_hint, load_pixels
from model import CascadeError

ROUNDED = 2e-3                                          # Stage C is stored in fp16, its outputs were not
SIZE = {"width": 96, "height": 128}


@pytest.fixture
def images(place):
    """b.png, of 96 x 128 pixels, and its masks: white.png, left.png, black.png."""
    values = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    Image.fromarray(values).resize((96, 128), Image.Resampling.NEAREST).save("b.png")
    for name, columns in ("white", 96), ("left", 30), ("black", 0):
        mask = Image.new("L", (96, 128))
        mask.paste(255, (0, 0, columns, 128))
        mask.save(f"{name}.png")
    return place


# ------------------------------------------------------------------------------ the original code's numbers
@pytest.mark.parametrize("kind", ["canny", "super_resolution"])
def test_feature_maps_and_stage_c_are_the_originals(tmp_path, kind):
    path, hint, theirs = original(f"controlnet_{kind}", tmp_path)
    ours = model.load(path)(hint["hint"])
    maps = {block: theirs[f"projection.{i}"] for i, block in enumerate((0, 2, 3, 6))}
    assert list(ours) == list(maps)
    for block in maps:
        assert_same(ours[block], maps[block][:1], 1e-6)
    path, inputs, plain = original_stage_c(tmp_path)
    assert relative_error(theirs["eps"], plain) > 0.1
    controls = {"eps": maps, "eps_scaled_0.6": {block: 0.6 * maps[block] for block in maps},
                "eps_only_block.1": {1: maps[0]}, "eps_only_block.6": {6: maps[0]}}
    unet = model.load(path, dtype=torch.float32)
    for name in controls.keys() & theirs.keys():
        assert_same(unet(**inputs, control=controls[name]), theirs[name], ROUNDED)
    assert ("eps_only_block.1" in theirs) == ("eps_only_block.6" in theirs) == (kind == "canny")


def test_the_edges_are_the_originals():
    stored = load_file(TESTS / "original" / "filter_canny.safetensors")
    assert torch.equal(canny_hint(stored["in.image_a"]), stored["out.edges_a"])


def test_blocks_are_counted_in_the_order_they_run_and_both_rows_of_guidance_get_the_maps():
    unet, widths = tiny.networks()["stage_c"], tiny.STAGE_C.residual_widths
    assert widths == [64, 128, 128, 128, 128, 128, 128, 64, 64]
    inputs = (noise(2, 16, 3, 4), torch.ones(2), noise(2, 1, 64), noise(2, 5, 64))
    outputs = [unet(*inputs)]
    for i, width in enumerate(widths):
        one = noise(1, width, 5, 3)
        outputs.append(unet(*inputs, control={i: one}))
        assert torch.equal(outputs[-1], unet(*inputs, control={i: one.repeat(2, 1, 1, 1)}))
    assert all(relative_error(a, b) > 1e-3 for a, b in itertools.combinations(outputs, 2))
    for nothing in ({}, {9: None}):
        assert torch.equal(outputs[0], unet(*inputs, control=nothing))


# ------------------------------------------------------------------------------ hints
@pytest.fixture
def hint_of(pipeline, monkeypatch):
    """What the ControlNet is shown."""
    def run(control, **arguments):
        seen, network = [], pipeline.network(f"controlnet/{control}")
        monkeypatch.setitem(
            pipeline.kept, f"controlnet/{control}", lambda hint: seen.append(hint) or network(hint))
        pipeline.prior("a star", steps=1, control=control, hint="b.png", **arguments)
        return seen[0]
    return run


def test_every_kind_is_shown_its_hint(pipeline, images, hint_of):
    pixels = load_pixels("b.png", **SIZE)
    assert pixels.shape == (1, 3, 96, 96)
    edges = hint_of("canny")
    assert torch.equal(edges, canny_hint(pixels)) and edges.std() > 0.1
    image, white = hint_of("inpainting", mask="left.png").split([3, 1], dim=1)
    assert white.shape == (1, 1, 96, 96) and white[..., :30].all() and not white[..., 30:].any()
    assert torch.equal(image, torch.where(white > 0, 1.0, pixels))
    latent = pipeline.encode_semantic("b.png", **SIZE)
    assert torch.equal(hint_of("super_resolution"), F.interpolate(latent, scale_factor=2))


def test_the_size_is_the_hints_and_twice_that_for_super_resolution(pipeline, images):
    assert pipeline.size(None, None, "canny", "b.png") == (96, 128)
    assert pipeline.size(100, None, "canny", "b.png") == (100, 128)
    assert pipeline.size(None, None, "super_resolution", Image.open("b.png")) == (192, 256)
    image, = pipeline("a star", steps=1, decoder_steps=1, control="super_resolution", hint="b.png")
    assert image.size == (192, 256)


def test_hint_and_strength_matter_and_a_hint_can_be_given_as_the_network_takes_it(pipeline, images):
    few, canny = {"steps": 2, **SIZE}, {"control": "canny", "hint": "b.png"}
    given = canny | {"hint": canny_hint(load_pixels("b.png", **SIZE))}
    variants = [{}, canny, canny | {"control_strength": 0.5}, canny | {"hint": "left.png"}, given,
                canny | {"control_strength": 0.0}]
    *latents, as_given, without = (pipeline.prior("a star", **few, **more) for more in variants)
    assert all(relative_error(a, b) > 1e-4 for a, b in itertools.permutations(latents, 2))
    assert torch.equal(latents[0], without) and torch.equal(latents[1], as_given)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_controlnet_runs_in_any_type(pipeline, folder, images, dtype):
    exact, ours = (cascade.prior("a star", steps=1, control="super_resolution", hint="b.png")
                   for cascade in (pipeline, Cascade(folder, dtype=dtype)))
    assert relative_error(ours, exact) < 0.1


# ------------------------------------------------------------------------------ latent inpainting
@pytest.mark.parametrize("recipe", ["diffusers", "original", "lcm"])
def test_outside_the_mask_the_latent_stays(pipeline, images, recipe):
    start = pipeline.encode_semantic("b.png", **SIZE)  # (1, 16, 3, 3): the mask covers its first column
    options = {"init_image": "b.png", "strength": 1.0, "steps": 4, "recipe": recipe, **SIZE}
    seen = []
    ours = pipeline.prior("a star", mask="left.png", images=2,
                          callback=lambda step, x0: seen.extend(x0), **options)
    for latent in [*ours, *seen]:
        assert relative_error(latent[..., 1:], start[0, ..., 1:]) < 1e-3
        assert relative_error(latent[..., :1], start[0, ..., :1]) > 0.1
    everywhere = pipeline.prior("a star", mask="white.png", **options)
    assert torch.equal(everywhere, pipeline.prior("a star", **options))


# ------------------------------------------------------------------------------ the command
WRONG = {
    "star --control canny": "control, hint: expected both",
    "--hint b.png": "control, hint: expected both", "--control soup --hint b.png": "--control: invalid",
    "--control canny --hint nowhere.png": "nowhere.png: there is no such",
    "--control inpainting --hint b.png": "control inpainting: needs a mask",
    "star --mask left.png": "mask: needs",
    "--control canny --hint b.png --mask left.png": "mask: needs", "star --control-strength 2": "--control-strength: needs --control",
    "--control canny --hint b.png --control-strength nan": "--control-strength: expected",
    "--init-image b.png --mask a.png": "mask: expected the size of its image, 96 x 128, got 64 x 64",
    "--init-image b.png --mask black.png": "mask: expected white",
    "--init-image b.png --mask nowhere.png": "nowhere.png: ",
    "--control inpainting --hint a.png --mask left.png": "mask: expected the size",
    "--control canny --hint b.png -o b.png": "b.png: is an input",
    "--reconstruct b.png --control canny": "--control: not used",
    "--init-image a.png --mask left.png -o left.png": "left.png: is an input"}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused_by_name(folder, images, options):
    refused([*options.split(), "--weights", folder], WRONG[options])


MASK, HINT = Image.new("L", (64, 64)), torch.zeros(1, 1, 64, 64)
WRONG_HINTS = [3, HINT.repeat(1, 3, 1, 1), HINT[..., :31], HINT.repeat(2, 1, 1, 1), HINT * torch.nan, HINT.int()]
CANNY = {"control": "canny", "hint": HINT}
WRONG_ARGUMENTS = [
    CANNY | {"control": 3}, CANNY | {"control": "plain"}, CANNY | {"control": "inpainting"},
    *(CANNY | {"hint": hint} for hint in WRONG_HINTS),
    CANNY | {"control_strength": float("inf")}, CANNY | {"control_strength": "1"},
    {"hint": HINT}, {"control": "canny"}, {"mask": MASK}, {"init_image": MASK, "mask": HINT},
    {"control": "inpainting", "hint": HINT, "mask": 3}]


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=lambda arguments: " ".join(arguments))
def test_wrong_arguments_are_refused(pipeline, monkeypatch, arguments):
    monkeypatch.setattr(cascade, "sample", None)
    with pytest.raises(CascadeError):
        pipeline("a star", width=64, height=64, **arguments)


# ------------------------------------------------------------------------------ files
@pytest.mark.parametrize("blocks, text", [
    *((blocks, "expected 3 numbers") for blocks in ("[0, 7]", "[0, 7, 7]", "3", '["a", 1, 2]')),
    (None, "3 projections: expected 8"), ("[0,", "expected the tensors of a controlnet"),
    ("[0, 1, 8]", "64 channels for residual block 1, expected 128"),
    ("[0, 7, 99]", "residual block 99, expected 0")])
def test_a_controlnet_without_its_blocks_or_with_wrong_ones_is_refused(weights, blocks, text, monkeypatch):
    monkeypatch.setattr(Cascade, "encode_prompt", None)    # it is refused before any work
    metadata = {"blocks": blocks} if blocks else None
    change_tensors(weights, "controlnet/canny", lambda tensors: None, metadata)
    refused(["--control", "canny", "--hint", "a.png", *FEW, "--weights", "weights"], text)


@pytest.mark.parametrize("kind", CONTROLS)
def test_another_file_in_a_controlnets_place_is_refused(weights, images, kind):
    path = weights / f"controlnet/{kind}.safetensors"
    mask = ["--mask", "left.png"] if kind == "inpainting" else []
    other = "controlnet/inpainting" if kind == "canny" else "controlnet/canny"
    for source in (weights / f"{other}.safetensors", weights / "previewer.safetensors", "a.png", None):
        path.unlink(missing_ok=True)
        if source:
            path.hardlink_to(source)
        refused(["--control", kind, "--hint", "b.png", *mask, "--weights", "weights"],
                f"controlnet/{kind}", "expected")


def test_eight_projections_mean_the_official_blocks(tmp_path):
    config = replace(tiny.CONTROLNETS["canny"], blocks=model.CONTROL_BLOCKS)
    file, network = tmp_path / "a.safetensors", tiny.randomise(model.ControlNet(config), 0)
    tiny.save(network.state_dict(), file)
    assert model.load(file).config == config and config.blocks == (0, 4, 8, 12, 51, 55, 59, 63)
    tiny.save(network.state_dict(), file, metadata={"blocks": json.dumps([*range(8)])})
    assert model.load(file).config == replace(config, blocks=tuple(range(8)))
