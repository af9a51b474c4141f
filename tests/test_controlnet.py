"""ControlNets and masks: the original code's numbers, what a hint is made of, latent inpainting, clear errors."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import FEW, command, refused
from helpers import TESTS, assert_same, noise, original, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

import cascade
import model
from cascade import CONTROLS, Cascade, canny, canny_hint, load_pixels
from model import CascadeError

ROUNDED = 2e-3                                          # Stage C is stored in fp16, its outputs were not
SIZE = {"width": 96, "height": 128}


@pytest.fixture(scope="module")
def controlled(folder):
    """A pipeline that has ControlNets."""
    tiny.write_controlnets(folder)
    return Cascade(folder, keep=True)


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
    maps = {}
    for i, (block, ours) in enumerate(model.load(path)(hint["hint"]).items()):
        maps[block] = theirs[f"projection.{i}"]
        assert_same(ours, maps[block][:1], 1e-6)
    assert list(maps) == [0, 2, 3, 6]
    path, inputs, plain = original("stage_c", tmp_path)
    inputs = {name: inputs[name] for name in ("x", "r", "clip_text_pooled", "clip_text", "clip_img")}
    unet = model.load(path, dtype=torch.float32)
    assert_same(unet(**inputs, control=maps), theirs["eps"], ROUNDED)
    assert relative_error(theirs["eps"], plain["eps"]) > 0.1
    scaled = {block: 0.6 * value for block, value in maps.items()}
    assert_same(unet(**inputs, control=scaled), theirs["eps_scaled_0.6"], ROUNDED)
    for block in (1, 6) if kind == "canny" else ():
        assert_same(unet(**inputs, control={block: maps[0]}), theirs[f"eps_only_block.{block}"], ROUNDED)


def test_the_edges_are_the_originals():
    stored = load_file(TESTS / "original" / "filter_canny.safetensors")
    assert torch.equal(canny_hint(stored["in.image_a"]), stored["out.edges_a"])


def test_canny_finds_the_outline_of_a_square_and_nothing_in_a_plain_image():
    image = np.zeros((20, 30, 3), np.uint8)
    assert not canny(image).any()
    image[5:15, 10:20] = 255
    edges = canny(image)
    assert edges[:, 9:20][4:15].any(0).all() and not edges[7:13, 12:18].any() and not edges[:3].any()


def test_blocks_are_counted_in_the_order_they_run_and_both_rows_of_guidance_get_the_maps():
    unet, config = tiny.networks()["stage_c"], tiny.STAGE_C
    assert config.residual_widths == [64, 128, 128, 128, 128, 128, 128, 64, 64]
    inputs = (noise(2, 16, 3, 4), torch.ones(2), noise(2, 1, 64), noise(2, 5, 64))
    seen = []
    for i, width in enumerate(config.residual_widths):
        seen.append(unet(*inputs, control={i: noise(1, width, 5, 3)}))
        both = unet(*inputs, control={i: noise(1, width, 5, 3).repeat(2, 1, 1, 1)})
        assert torch.equal(seen[-1], both)
    plain = unet(*inputs)
    assert all(relative_error(seen[i], other) > 1e-3 for i in range(9) for other in [plain, *seen[i + 1:]])
    assert torch.equal(plain, unet(*inputs, control={})) and torch.equal(plain, unet(*inputs, control={9: None}))


# ------------------------------------------------------------------------------ hints
def hint_of(controlled, monkeypatch, **arguments):
    """What the ControlNet is shown."""
    seen, control = [], arguments["control"]
    network = controlled.network(f"controlnet/{control}")
    monkeypatch.setitem(controlled.kept, f"controlnet/{control}", lambda hint: seen.append(hint) or network(hint))
    controlled.prior("a star", steps=1, **arguments)
    return seen[0]


def test_every_kind_is_shown_its_hint(controlled, images, monkeypatch):
    pixels = load_pixels("b.png", 96, 128)
    assert pixels.shape == (1, 3, 96, 96)
    hint = hint_of(controlled, monkeypatch, control="canny", hint="b.png")
    assert torch.equal(hint, canny_hint(pixels)) and hint.std() > 0.1
    hint = hint_of(controlled, monkeypatch, control="inpainting", hint="b.png", mask="left.png")
    white = hint[:, 3:]
    assert hint.shape == (1, 4, 96, 96) and white[..., :30].all() and not white[..., 30:].any()
    assert torch.equal(hint[:, :3], torch.where(white > 0, 1.0, pixels))
    hint = hint_of(controlled, monkeypatch, control="super_resolution", hint="b.png")
    latent = controlled.encode_semantic("b.png", 96, 128)
    assert torch.equal(hint, F.interpolate(latent, scale_factor=2))


def test_the_size_is_the_hints_and_twice_that_for_super_resolution(controlled, images):
    assert controlled.size(None, None, "canny", "b.png") == (96, 128)
    assert controlled.size(100, None, "canny", "b.png") == (100, 128)
    assert controlled.size(None, None, "super_resolution", Image.open("b.png")) == (192, 256)
    image, = controlled("a star", steps=1, decoder_steps=1, control="super_resolution", hint="b.png")
    assert image.size == (192, 256)


def test_hint_strength_and_kind_matter_and_a_hint_can_be_given_as_the_network_takes_it(controlled, images):
    few = {"steps": 2, **SIZE}
    canny = {"control": "canny", "hint": "b.png"}
    plain, half, full, other = (controlled.prior("a star", **few, **more) for more in (
        {}, canny | {"control_strength": 0.5}, canny, canny | {"hint": "left.png"}))
    latents = [plain, half, full, other]
    errors = [relative_error(latents[i], latents[j]) for i in range(4) for j in range(i)]
    assert min(errors) > 1e-4, errors
    assert torch.equal(plain, controlled.prior("a star", **few, **canny, control_strength=0.0))
    given = canny_hint(load_pixels("b.png", **SIZE))
    assert torch.equal(full, controlled.prior("a star", **few, control="canny", hint=given))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_controlnet_runs_in_any_type(controlled, folder, images, dtype):
    exact, ours = (pipeline.prior("a star", steps=1, control="super_resolution", hint="b.png")
                   for pipeline in (controlled, Cascade(folder, dtype=dtype)))
    assert relative_error(ours, exact) < 0.1


# ------------------------------------------------------------------------------ latent inpainting
@pytest.mark.parametrize("recipe", ["diffusers", "original", "lcm"])
def test_outside_the_mask_the_latent_stays(controlled, images, recipe):
    start = controlled.encode_semantic("b.png", **SIZE)  # (1, 16, 3, 3): the mask covers its first column
    options = {"init_image": "b.png", "strength": 1.0, "steps": 4, "recipe": recipe, **SIZE}
    seen = []
    ours = controlled.prior("a star", mask="left.png", images=2, callback=lambda step, x0: seen.append(x0), **options)
    for latent in [*ours, *torch.cat(seen)]:
        assert relative_error(latent[..., 1:], start[0, ..., 1:]) < 1e-3
        assert relative_error(latent[..., :1], start[0, ..., :1]) > 0.1
    assert torch.equal(controlled.prior("a star", mask="white.png", **options), controlled.prior("a star", **options))


# ------------------------------------------------------------------------------ the command
RUNS = {
    "--control canny --hint b.png --control-strength 0.5": {"control": "canny", "hint": "b.png", "control_strength": "0.5"},
    "--control inpainting --hint b.png --mask left.png": {
        "control": "inpainting", "hint": "b.png", "mask": "left.png", "control_strength": "1.0"},
    "--init-image b.png --mask left.png --strength 1": {"init_image": "b.png", "mask": "left.png", "strength": "1.0"}}


@pytest.mark.parametrize("run", RUNS)
def test_images_say_how_they_were_made(controlled, folder, images, run):
    few = ["--steps", 2, "--weights", folder]
    command(*run.split(), *few, "--decoder-steps", 1, "-o", "whole.png")
    command(*run.split(), *few, "-o", "half.safetensors")
    command("--latents", "half.safetensors", "--weights", folder, "--decoder-steps", 1, "-o", "half.png")
    assert Path("whole.png").read_bytes() == Path("half.png").read_bytes()
    texts = Image.open("whole.png").text
    names = ("control", "hint", "mask", "control_strength", "init_image", "strength")
    assert {name: texts[name] for name in names if name in texts} == RUNS[run]
    assert ("controlnet/canny.safetensors, cpu" in texts["networks"]) == ("canny" in run)


WRONG = {
    "--control canny": "control, hint: expected both", "--hint b.png": "control, hint: expected both",
    "--control soup --hint b.png": "--control: invalid", "--control canny --hint nowhere.png": "nowhere.png: there is no such",
    "--control inpainting --hint b.png": "control inpainting: needs a mask", "--mask left.png": "mask: needs",
    "--control canny --hint b.png --mask left.png": "mask: needs", "--control-strength 2": "--control-strength: needs --control",
    "--control canny --hint b.png --control-strength nan": "--control-strength: expected",
    "--init-image b.png --mask a.png": "mask: expected the size of its image, 96 x 128, got 64 x 64",
    "--init-image b.png --mask black.png": "mask: expected white", "--init-image b.png --mask nowhere.png": "nowhere.png: ",
    "--control inpainting --hint a.png --mask left.png": "mask: expected the size",
    "--control canny --hint b.png -o b.png": "b.png: is an input", "--reconstruct b.png --control canny": "--control: not used",
    "--init-image a.png --mask left.png -o left.png": "left.png: is an input"}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_options_are_refused_by_name(controlled, folder, images, arguments):
    prompt = [] if "--reconstruct" in arguments else ["a star"]
    refused([*prompt, *arguments.split(), *FEW[2 * (not prompt):], "--weights", folder], WRONG[arguments])


HINT = torch.zeros(1, 1, 64, 64)
WRONG_ARGUMENTS = [
    {"control": 3, "hint": HINT}, {"control": "plain", "hint": HINT}, {"control": "canny", "hint": HINT.repeat(1, 3, 1, 1)},
    {"control": "inpainting", "hint": HINT}, {"control": "canny", "hint": HINT[..., :31]}, {"control": "canny", "hint": HINT.repeat(2, 1, 1, 1)},
    {"control": "canny", "hint": HINT * torch.nan}, {"control": "canny", "hint": HINT.int()}, {"control": "canny", "hint": 3},
    {"control": "canny", "hint": HINT, "control_strength": float("inf")}, {"hint": HINT}, {"control": "canny"},
    {"control": "canny", "hint": HINT, "control_strength": "1"}, {"mask": Image.new("L", (64, 64))},
    {"init_image": Image.new("L", (64, 64)), "mask": HINT}, {"control": "inpainting", "hint": HINT, "mask": 3}]


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=lambda arguments: " ".join(arguments))
def test_wrong_arguments_are_refused(controlled, monkeypatch, arguments):
    monkeypatch.setattr(cascade, "sample", None)
    with pytest.raises(CascadeError):
        controlled("a star", width=64, height=64, **arguments)


# ------------------------------------------------------------------------------ files
@pytest.mark.parametrize("blocks, text", [
    (None, "3 projections: expected 8"), ("[0, 7]", "expected 3 numbers"), ("[0, 7, 7]", "expected 3 numbers"),
    ("3", "expected 3 numbers"), ("[0,", "expected the tensors of a controlnet"), ('["a", 1, 2]', "expected 3 numbers"),
    ("[0, 1, 8]", "64 channels for residual block 1, expected 128"), ("[0, 7, 99]", "residual block 99, expected 0")])
def test_a_controlnet_that_does_not_say_where_it_belongs_or_does_not_fit_is_refused(
        controlled, weights, images, monkeypatch, blocks, text):
    monkeypatch.setattr(Cascade, "encode_prompt", None)  # before any work
    path = weights / "controlnet/canny.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, blocks and {"blocks": blocks})
    refused(["--control", "canny", "--hint", "b.png", *FEW, "--weights", "weights"], text)


@pytest.mark.parametrize("kind", CONTROLS)
def test_another_file_in_a_controlnets_place_is_refused(controlled, weights, images, kind):
    path = weights / f"controlnet/{kind}.safetensors"
    arguments = ["--control", kind, "--hint", "b.png", *FEW, "--weights", "weights"]
    if kind == "inpainting":
        arguments += ["--mask", "left.png"]
    other = "inpainting" if kind == "canny" else "canny"
    for source in (f"controlnet/{other}.safetensors", "previewer.safetensors", "a.png", None):
        path.unlink(missing_ok=True)
        if source:
            path.hardlink_to(weights / source if source.endswith("s") else source)
        refused(arguments, f"controlnet/{kind}", "expected")


def test_eight_projections_mean_the_official_blocks(tmp_path):
    config = replace(tiny.CONTROLNETS["canny"], blocks=model.CONTROL_BLOCKS)
    network = tiny.randomise(model.ControlNet(config), 0)
    for blocks, metadata in (model.CONTROL_BLOCKS, None), (tuple(range(8)), {"blocks": json.dumps(list(range(8)))}):
        tiny.save(network.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
        assert model.load(tmp_path / "a.safetensors").config == replace(config, blocks=blocks)
