"""What a run writes about itself into images and latents, and how strictly it is read back."""
import json
import os

import pytest
import torch
from commands import FEW, SMALL, command, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from model import Weights

MADE = ["a red circle", "a stär", "--images", 2, "--seed", 9, "--steps", 2, "--negative", "blue", *SMALL]


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "a.safetensors"
    command(*MADE, "--weights", folder, "-o", path)
    return path


@pytest.fixture
def decode(folder, latents, tmp_path):
    """Decodes the saved latents with a changed record or other tensors; returns the refusal."""
    def run(text, tensors=None, function=refused, options=()):
        path = tmp_path / "changed.safetensors"
        save_file(tensors or load_file(latents), path, {"cascade": text} if text is not None else None)
        arguments = ["--latents", path, "--weights", folder, "-o", tmp_path / "a.png", *options]
        return function(*([tmp_path] if function is refused else []), *arguments, "--decoder-steps", 1)
    return run


def record(latents):
    return json.loads(Weights(latents).metadata["cascade"])


def test_images_and_latents_say_what_they_were_made_with(folder, latents, tmp_path):
    few = ["--weights", folder, "--decoder-steps", 1]
    command(*MADE, *few, "-o", tmp_path / "a.png")
    command("--latents", latents, *few, "-o", tmp_path / "b.png")
    for i in range(4):
        assert (tmp_path / f"a-{i}.png").read_bytes() == (tmp_path / f"b-{i}.png").read_bytes()
        with Image.open(tmp_path / f"a-{i}.png") as image:
            said = dict(image.text)
            assert image.size == (64, 64)
        networks = eval(said.pop("networks"))
        assert networks["stage_b"] == "stage_b.safetensors, cpu, torch.float32"
        assert said == {
            "prompts": ("a red circle", "a stär")[i // 2], "negative": "blue", "width": "64",
            "height": "64", "seed": str(9 + i), "recipe": "diffusers", "steps": "2",
            "guidance": "4.0", "guidance_interval": "[0.0, 1.0]", "decoder_steps": "1",
            "decoder_guidance": "0.0", "version": "2"}


def test_saved_latents_are_decoded_by_the_recipe_that_made_them(folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    made = ["a star", "--init-image", tmp_path / "red.png", "--recipe", "original", *SMALL]
    few = ["--weights", folder, "--decoder-steps", 2]
    command(*made, *few, "-o", tmp_path / "whole.png")
    command(*made, *few[:2], "-o", tmp_path / "half.safetensors")
    command("--latents", tmp_path / "half.safetensors", *few, "-o", tmp_path / "half.png")
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "half.png").read_bytes()
    with Image.open(tmp_path / "half.png") as image:
        assert image.text["decoder_guidance"] == "1.1" and image.text["init_image"] == "red.png"


def test_the_bytes_depend_neither_on_the_folder_nor_on_the_time(folder, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    images = []
    for place, red in ((tmp_path, "red.png"), (tmp_path.parent, tmp_path / "red.png")):
        monkeypatch.chdir(place)
        weights = os.path.relpath(folder)
        command("--variation-image", red, *FEW, "--weights", weights, "-o", "a.png")
        images.append((place / "a.png").read_bytes())
    assert images[0] == images[1]


# ------------------------------------------------------------------------------ reading
def test_metadata_that_is_no_record_is_refused(decode):
    for text in [None, "", "{", "[]", "null", "{}", "3", '"a"', "[[1]]", '{"version": 2}', "[" * 10 ** 5]:
        assert "changed.safetensors: expected" in decode(text)


WRONG = {
    "prompts": [3, [], [1], "ab", ["a"], ["a", "b", "c"], None, ["a", "\ud800"]],
    "negative": [3, ["a"], "\ud800"], "width": ["64", 128, 1e99, None, True], "height": [0, 8193, [64]],
    "images": [None, 0, 1, 2.0, "2"], "seed": [-1, 2 ** 32 - 2, 1.5, None, "9"],
    "recipe": ["soup", None, [], {}], "steps": [0, "20", 2.0], "strength": ["x", 2, float("nan"), True],
    "guidance": ["4", [], -1, float("inf")], "guidance_interval": [3, ["a"], [0.5], [1.0, 0.0]],
    "variation_image": [3, "a.png", {"a": 1}, [1], ["\ud800"]], "init_image": [3, ["a.png"], "\ud800"],
    "reconstruct": [3, True], "decoder_steps": ["1", 0], "decoder_guidance": ["1", -1],
    "networks": [None, [], 3, {"a": 3}, {"a": {"b": [1]}}, [["a", "b"]], {"\ud800": "a"}],
    "version": [1, 3, "2", None, True], "colour": ["red"]}


@pytest.mark.parametrize("name", WRONG)
def test_a_record_is_read_strictly(decode, latents, name):
    for value in WRONG[name]:
        line = decode(json.dumps(record(latents) | {name: value}))
        assert "changed.safetensors: " in line and "expected" in line, value
    less = record(latents)
    less.pop(name, None)
    if name != "colour":
        assert "changed.safetensors: expected" in decode(json.dumps(less))


def test_only_the_latents_of_the_record_are_decoded(decode, latents):
    text, z = json.dumps(record(latents)), load_file(latents)["latents"]
    for wrong in (z[:3], z[0], z[:, :4], z[..., :1], z.int(), z * torch.nan, z.to(torch.complex64)):
        assert "changed.safetensors: latents: expected" in decode(text, {"latents": wrong.contiguous()})
    assert "tensor latents is missing" in decode(text, {"other": z})
    assert decode(text, {"latents": z.half()}, command) == []


def test_what_is_no_file_of_latents_is_refused(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "text.safetensors").write_text("something else")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "pipe.safetensors",
                 tmp_path / "text.safetensors", folder / "stage_a.safetensors"):
        assert str(path) in refused(tmp_path, "--latents", path, "-o", tmp_path / "a.png")
