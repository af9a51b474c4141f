"""What a run writes about itself into images and latents, and how strictly it is read back."""
import ast
import json
import os

import pytest
import torch
from commands import FEW, SMALL, command, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from model import Weights

SETTINGS = {
    "prompts": "", "negative": "", "width": "64", "height": "64", "seed": "0", "steps": "4",
    "guidance": "4.0", "guidance_interval": "[0.0, 1.0]", "recipe": "diffusers",
    "decoder_steps": "1", "decoder_guidance": "0.0", "compression": "42.67", "version": "2"}
STAGE_C_ONLY = ("negative", "steps", "guidance", "guidance_interval")
RUNS = {
    "one stär --negative blue --images 3 --seed 9": {  # the last of six images
        "prompts": "stär", "negative": "blue", "seed": "14"},
    "--variation-image a.png --variation-image a.png --compression 64": {
        "variation_image": "['a.png', 'a.png']", "compression": "64.0"},
    "one two --variation-image a.png": {
        "prompts": "two", "variation_image": "['a.png']", "seed": "1"},
    "one --init-image a.png --strength 0.6": {
        "prompts": "one", "init_image": "a.png", "strength": "0.6"},
    "--init-image a.png --recipe original": {
        "init_image": "a.png", "strength": "0.8", "recipe": "original", "decoder_guidance": "1.1"},
    "--init-image a.png --mask m.png --strength 1": {
        "init_image": "a.png", "mask": "m.png", "strength": "1.0"},
    "--control canny --hint a.png --control-strength 0.5": {
        "control": "canny", "hint": "a.png", "control_strength": "0.5"},
    "--control inpainting --hint a.png --mask m.png": {
        "control": "inpainting", "hint": "a.png", "mask": "m.png", "control_strength": "1.0"},
    "--reconstruct a.png --seed 3": {
        "reconstruct": "a.png", "seed": "3"} | dict.fromkeys(STAGE_C_ONLY)}


@pytest.mark.parametrize("run", RUNS)
def test_images_and_latents_say_what_they_were_made_with(place, folder, run):
    Image.new("L", (64, 64), "white").save("m.png")
    steps = [] if "--reconstruct" in run else ["--steps", 4]
    made = [*run.split(), *SMALL, *steps, "--weights", folder]
    few = ["--weights", folder, "--decoder-steps", 1]
    command(*made, "--decoder-steps", 1, "-o", "whole.png")
    command(*made, "-o", "half.safetensors")
    command("--latents", "half.safetensors", *few, "-o", "half.png")
    wholes, halves = sorted(place.glob("whole*")), sorted(place.glob("half*.png"))
    assert [path.read_bytes() for path in wholes] == [path.read_bytes() for path in halves]
    with Image.open(halves[-1]) as image:
        texts = dict(image.text)
    assert image.size == (64, 64)
    networks = ast.literal_eval(texts.pop("networks"))
    assert networks["stage_b"] == "stage_b.safetensors, cpu, torch.float32"
    assert ("controlnet/canny" in networks) == ("canny" in run)
    expected = SETTINGS | RUNS[run]
    assert texts == {name: text for name, text in expected.items() if text is not None}


def test_the_bytes_depend_neither_on_the_folder_nor_on_the_time(place, folder, monkeypatch):
    images = []
    for here, red in ((place, "a.png"), (place.parent, place / "a.png")):
        monkeypatch.chdir(here)
        command("--variation-image", red, *FEW, "--weights", os.path.relpath(folder), "-o", "b.png")
        images.append((here / "b.png").read_bytes())
    assert images[0] == images[1]


# ------------------------------------------------------------------------------ reading
@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "a.safetensors"  # of two images for each of two prompts
    command("a", "b", "--images", 2, "--seed", 9, *FEW[:2], *SMALL, "--weights", folder, "-o", path)
    return path


@pytest.fixture
def decode(folder, latents, place):
    """Decodes the saved latents with a changed record or other tensors."""
    def run(text, tensors=None, expected="expected"):
        metadata = None if text is None else {"cascade": text}
        save_file(tensors or load_file(latents), "changed.safetensors", metadata)
        arguments = ["--latents", "changed.safetensors", "--decoder-steps", 1, "--weights", folder]
        if expected:
            refused(arguments, "changed.safetensors: ", expected)
        else:
            command(*arguments)
    return run


def test_metadata_that_is_no_record_is_refused(decode):
    for text in [None, "", "{", "[]", "null", "{}", "3", '"a"', "[[1]]", '{"version": 2}', "[" * 99_999]:
        decode(text)


WRONG = {
    "prompts": [3, [], [1], "ab", ["a"], ["a", "b", "c"], None, ["a", "\ud800"]],
    "negative": [3, ["a"], "\ud800"], "width": ["64", 128, 1e99, None, True],
    "height": [0, 8193, [64]], "images": [None, 0, 1, 2.0, "2"],
    "seed": [-1, 2 ** 32 - 2, 1.5, None, "9"], "recipe": ["soup", None, [], {}],
    "steps": [0, "20", 2.0], "strength": ["x", 2, float("nan"), True],
    "guidance": ["4", [], -1, float("inf")], "guidance_interval": [3, ["a"], [0.5], [1.0, 0.0]],
    "variation_image": [3, "a.png", {"a": 1}, [1], ["\ud800"]],
    "init_image": [3, ["a.png"], "\ud800"], "reconstruct": [3, True], "decoder_steps": ["1", 0],
    "decoder_guidance": ["1", -1],
    "networks": [None, [], 3, {"a": 3}, {"a": {"b": [1]}}, [["a", "b"]], {"\ud800": "a"}],
    "version": [1, 3, "2", None, True], "colour": ["red"]}
OPTIONAL = {                                            # fields that older records do not have
    "control": ["soup", 3], "hint": [3], "mask": [["a.png"]],
    "control_strength": ["1", -1, float("nan")],
    "lora": [3, ["a"], [["a"]], [["a", "b"]], [["a", float("inf")]]],
    "token": [3, ["a"], [["[x]", 3]], [["", "red"]]]}


@pytest.mark.parametrize("name", WRONG | OPTIONAL)
def test_a_record_is_read_strictly(decode, latents, name):
    record = json.loads(Weights(latents).metadata["cascade"])
    for value in (WRONG | OPTIONAL)[name]:
        decode(json.dumps(record | {name: value}))
    if name in record:
        record.pop(name)
        decode(json.dumps(record), expected="" if name in OPTIONAL else "expected")


def test_only_the_latents_of_the_record_are_decoded(decode, latents):
    text, z = Weights(latents).metadata["cascade"], load_file(latents)["latents"]
    for wrong in (z[:3], z[0], z[:, :4], z[..., :1], z.int(), z * torch.nan, z.to(torch.complex64)):
        decode(text, {"latents": wrong.contiguous()}, "latents: expected")
    decode(text, {"other": z}, "tensor latents is missing")
    decode(text, {"latents": z.half()}, expected="")


def test_what_is_no_file_of_latents_is_refused(place, folder):
    os.mkfifo("pipe")
    for path in ("nowhere", ".", "pipe", "a.png", folder / "stage_a.safetensors"):
        refused(["--latents", path, "-o", "b.png"], f"{path}: ")
