"""What a user can do wrong gives one clear line and exit status 2, and leaves no file behind and none overwritten."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_folder

import cascade
import text_encoder
from cascade import Cascade
from model import CascadeError, load

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--steps", "2", "--decoder-steps", "2", "--device", "cpu"]
FILES = {
    "stage_c": "stage_c.safetensors",
    "stage_b": "stage_b.safetensors",
    "stage_a": "stage_a.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("good"), seed=2)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "weights")


@pytest.fixture
def refused(good, tmp_path, capsys):
    """Runs the command with what is wrong and returns the line that it says, having seen that nothing was written."""

    def run(*arguments, weights=good, prompt=("a red circle",), output=None):
        kept = tmp_path / "kept.png"
        kept.write_bytes(b"an older picture")
        output = kept if output is None else output
        status = cascade.main([*prompt, "--weights", str(weights), "-o", str(output), *FEW, *map(str, arguments)])
        shown = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line
            and "\r" not in line
            and "it/s]" not in line
            and "?it/s" not in line
            and not line.startswith("Stage ")
        ]
        assert status == 2 and len(shown) == 1, shown
        assert kept.read_bytes() == b"an older picture"
        assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.glob("new*"))
        return shown[0]

    return run


def change(path, edit):
    """Rewrites a safetensors file with other tensors; its metadata stays."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, {"width": "128", "height": "128"})


# ------------------------------------------------------------------------------------------------ files


def test_an_unknown_weights_folder(refused, tmp_path):
    assert "nowhere: there is no such weights folder" in refused(weights=tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_where_to_get_it(refused, folder, name):
    (folder / FILES[name]).unlink()
    said = refused(weights=folder)
    assert f"{name} is missing" in said and "README" in said and Path(FILES[name]).name in said


def test_a_missing_tokenizer(refused, folder):
    shutil.rmtree(folder / "tokenizer")
    assert "no tokenizer here; wanted is tokenizer.json, or vocab.json and merges.txt" in refused(weights=folder)


BROKEN = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut in its header": lambda data: data[:100],
    "empty": lambda data: b"",
    "foreign": lambda data: b"not weights at all " * 100,
    "a pickle": lambda data: pickle.dumps({"weight": [1.0] * 100}),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["stage_c", "stage_a", "text_encoder"])
def test_a_broken_file_is_named(refused, folder, name, broken):
    path = folder / FILES[name]
    path.write_bytes(broken(path.read_bytes()))
    said = refused(weights=folder)
    assert FILES[name] in said and "not a whole safetensors file" in said and "never a pickle" in said


def test_a_torch_checkpoint_is_not_opened(refused, folder):
    torch.save({"weight": torch.zeros(3)}, folder / "stage_b.safetensors")
    assert "never a pickle" in refused(weights=folder)


def test_a_directory_in_place_of_a_file(refused, folder):
    (folder / "stage_b.safetensors").unlink()
    (folder / "stage_b.safetensors").mkdir()
    assert "stage_b.safetensors" in refused(weights=folder)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("stage_c", "up_blocks.0.1.mapper_crp.bias"),
        ("stage_b", "clip_mapper.weight"),
        ("stage_a", "up_blocks.1.channelwise.0.bias"),
        ("text_encoder", "text_model.encoder.layers.1.mlp.fc2.bias"),
    ],
)
def test_wrong_tensors_are_named(refused, folder, name, tensor):
    path = folder / FILES[name]
    original = path.read_bytes()
    change(path, lambda tensors: tensors.pop(tensor))
    assert f"tensor {tensor} is missing" in refused(weights=folder)
    path.write_bytes(original)
    change(path, lambda tensors: tensors.update({"stray.weight": torch.zeros(2)}))
    assert "tensor stray.weight has shape (2,), wanted is no tensor of this name" in refused(weights=folder)
    path.write_bytes(original)
    change(path, lambda tensors: tensors.update({tensor: torch.zeros(3, 5)}))
    said = refused(weights=folder)
    assert tensor in said and "(3, 5)" in said or "shape" in said


def test_shapes_that_no_network_has(refused, folder):
    change(folder / FILES["stage_c"], lambda tensors: tensors.update({"clip_img_mapper.weight": torch.zeros(7)}))
    assert "the tensors, or the config.json beside, do not fit a stage_c" in refused(weights=folder)


@pytest.mark.parametrize("place", FILES)
@pytest.mark.parametrize("other", FILES)
def test_a_stages_file_given_for_another(refused, folder, good, place, other):
    if place == other:
        return
    shutil.copy(good / FILES[other], folder / FILES[place])
    said = refused(weights=folder)
    assert f"wanted is {place}" in said and FILES[place] in said


def test_a_config_that_is_not_json(refused, folder):
    (folder / "text_encoder" / "config.json").write_text("{hidden_act: gelu")
    assert "config.json beside, do not fit a text_encoder (JSONDecodeError" in refused(weights=folder)


def test_an_activation_that_is_not_clips(refused, folder):
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    assert "'relu'" in refused(weights=folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_broken_tokenizer(refused, folder, name):
    (folder / "tokenizer" / name).write_text("{ this is not it")
    assert "the tokenizer's files cannot be read" in refused(weights=folder)


def test_a_tokenizer_that_is_not_clips(refused, folder):
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "tokenizer" / "merges.txt").write_text("")
    assert "tokenizer" in refused(weights=folder)


def test_a_tokenizer_with_more_tokens_than_the_tower(refused, folder):
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    words = {f"unused{i}": i for i in range(50)} | {word: i + 50 for word, i in words.items()}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    said = refused(weights=folder)
    assert "tokenizer" in said and "520" in said


# ------------------------------------------------------------------------------------------------ devices and types


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there(refused, device):
    assert f"device {device!r} cannot be used" in refused("--device", device)


def test_an_unknown_type(refused, good):
    assert "invalid choice: 'fp8'" in refused("--dtype", "fp8")
    for given in ({"dtype": "fp8"}, {"decoder_dtype": torch.int8}, {"dtype": None}):
        with pytest.raises(CascadeError, match="is none of fp32, bf16, fp16"):
            Cascade(good, **given)


def test_a_gpu_without_bf16(good, monkeypatch):
    """There is no GPU here: one of the generation before bf16 is played by its answers."""
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for given in ({"dtype": "bf16"}, {"dtype": "fp16", "decoder_dtype": "bf16"}):
        with pytest.raises(CascadeError, match="has no bf16; use fp16 or fp32"):
            Cascade(good, device="cuda", **given)
    Cascade(good, device="cuda", dtype="fp16")


def test_an_unknown_lite(good):
    with pytest.raises(CascadeError, match="lite is 'both'"):
        Cascade(good, lite="both")


# ------------------------------------------------------------------------------------------------ prompts and numbers


@pytest.mark.parametrize("prompts", [None, 3, [], [1], ["a", None], b"bytes", {"a": 1}], ids=repr)
def test_a_prompt_of_the_wrong_kind(good, prompts):
    with pytest.raises(CascadeError, match="prompts is .*; wanted is a string or a list of strings"):
        Cascade(good)(prompts)


def test_negatives_that_do_not_fit(good):
    with pytest.raises(CascadeError, match="3 negatives for 2 prompts"):
        Cascade(good)(["a", "b"], ["c", "d", "e"])
    with pytest.raises(CascadeError, match="negative is 3"):
        Cascade(good)("a", 3)


def test_no_prompt_or_a_prompt_beside_latents(refused, tmp_path):
    assert "wanted is one of: a prompt or a picture to draw after; --prompts FILE, without" in refused(prompt=())
    assert "wanted is one of:" in refused("--latents", tmp_path / "x.safetensors")


@pytest.mark.parametrize("option", ["--width", "--height"])
@pytest.mark.parametrize("value", ["0", "-128", "63", "1000000000"])
def test_a_size_out_of_bounds(refused, option, value):
    assert f"{option[2:]} is {value}; wanted is a whole number from 64" in refused(option, value)


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("--steps", "0", "steps is 0; wanted is a whole number from 1"),
        ("--steps", "-1", "steps is -1"),
        ("--steps", "1000000000", "steps is 1000000000"),
        ("--decoder-steps", "0", "steps is 0"),
        ("--images", "0", "images is 0"),
        ("--seed", "-1", "seed is -1"),
        ("--seed", str(2**64), "seed is"),
        ("--guidance", "nan", "guidance is nan"),
        ("--guidance", "inf", "guidance is inf"),
        ("--guidance", "-1", "guidance is -1"),
        ("--decoder-guidance", "nan", "guidance is nan"),
        ("--steps", "2.5", "invalid int value"),
        ("--guidance", "much", "invalid float value"),
        ("--lite", "both", "invalid choice"),
        ("--colour", "red", "unrecognized"),
    ],
)
def test_a_number_out_of_bounds(refused, option, value, wanted):
    assert wanted in refused(option, value)


@pytest.mark.parametrize(
    "given",
    [
        {"width": True},
        {"width": 100.5},
        {"height": "128"},
        {"steps": None},
        {"guidance": "4"},
        {"seed": 1.0},
        {"output": "jpeg"},
        {"decoder_steps": float("nan")},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind(good, given):
    with pytest.raises(CascadeError, match="wanted is"):
        Cascade(good)("a red circle", **{"steps": 1, "decoder_steps": 1} | given)


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "folder.png", "nowhere/picture.png", "kept.png/x.png"])
def test_an_output_that_cannot_be_written(refused, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    assert name.split("/")[0] in refused(output=tmp_path / name)


@pytest.mark.parametrize("name", ["new.png", "new.safetensors", None])
def test_a_disk_that_fails_leaves_nothing_half_written(refused, monkeypatch, tmp_path, name):
    def fails(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    assert "No space left on device" in refused(output=tmp_path / name if name else None)


def test_memory_that_runs_out(refused, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.\nMore lines")

    monkeypatch.setattr(cascade, "sample", fails)
    assert "out of memory; try --lite" in refused()


# ------------------------------------------------------------------------------------------------ latents


@pytest.fixture
def latents(good, tmp_path):
    path = tmp_path / "latents.safetensors"
    assert cascade.main(["a red circle", "--weights", str(good), "-o", str(path), *FEW]) == 0
    return path


def test_latents_that_are_not_there_or_not_latents(refused, tmp_path, good, capsys):
    capsys.readouterr()
    assert "no such file" in refused("--latents", tmp_path / "nowhere.safetensors", prompt=())
    (tmp_path / "foreign.safetensors").write_bytes(b"something else")
    assert "not a whole safetensors file" in refused("--latents", tmp_path / "foreign.safetensors", prompt=())
    assert "tensor latents is missing" in refused("--latents", good / "stage_a.safetensors", prompt=())
    save_file({"latents": torch.zeros(1, 16, 3, 3)}, tmp_path / "other.safetensors")
    assert "not saved by this command" in refused("--latents", tmp_path / "other.safetensors", prompt=())


def test_latents_are_drawn_into_a_picture_only(refused, latents, tmp_path, capsys):
    capsys.readouterr()
    said = refused("--latents", latents, prompt=(), output=tmp_path / "new.safetensors")
    assert said.endswith("wanted is a name that ends in .png")


@pytest.mark.parametrize("shape", [(16, 3, 3), (1, 4, 3, 3), (1, 16, 5, 5), (0, 16, 3, 3), (1, 16, 3, 3, 1)], ids=str)
def test_latents_of_another_shape(good, shape):
    with pytest.raises(CascadeError):
        Cascade(good).decode(torch.zeros(shape), "a red circle", width=128, height=128, steps=1)


def test_latents_that_are_not_a_multiple_of_the_prompts(good):
    with pytest.raises(CascadeError, match="3 latents for 2 prompts"):
        Cascade(good).decode(torch.zeros(3, 16, 3, 3), ["a", "b"], steps=1)


def test_latents_that_are_not_finite(good):
    with pytest.raises(CascadeError, match="Stage B: the latent is not finite after step 1 of 2"):
        Cascade(good).decode(torch.full((1, 16, 3, 3), float("nan")), steps=2)


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        ("stage_c", "clf.1.bias", "Stage C: the latent is not finite after step 1 of 2"),
        ("stage_b", "clf.1.bias", "Stage B: the latent is not finite after step 1 of 2"),
        ("stage_a", "out_block.0.bias", "Stage A: the picture is not finite"),
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_black_picture_is_saved(refused, folder, name, tensor, said, value):
    change(folder / FILES[name], lambda tensors: tensors[tensor].fill_(value))
    assert said in refused(weights=folder)


def test_weights_too_large_for_fp16_name_the_stage(refused, folder):
    change(folder / FILES["stage_b"], lambda tensors: tensors["clf.1.bias"].fill_(1e5))
    assert "Stage B" in refused("--decoder-dtype", "fp16", weights=folder)


# ------------------------------------------------------------------------------------------------ the shell


@pytest.mark.parametrize(
    "arguments", [["a red circle", "--weights", "nowhere"], ["--steps"], ["a", "--width", "0"]], ids=str
)
def test_the_shell_sees_one_line_and_exit_status_2(arguments, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "cascade.py", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2 and run.stdout == "" and not list(tmp_path.iterdir())
    assert run.stderr.startswith("cascade.py: ") and run.stderr.count("\n") == 1


def test_networks_opened_by_hand_say_the_same(good, tmp_path):
    with pytest.raises(CascadeError, match="there is no such file"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CascadeError, match="wanted is text_encoder"):
        text_encoder.load(good / "stage_a.safetensors")
    with pytest.raises(CascadeError, match="wanted is stage_b or"):
        load(good / "text_encoder" / "model.safetensors")
