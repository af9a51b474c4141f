"""Weights folders that are incomplete, broken or put together from different cascades: one line that names the file."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import FEW, change_tensors, failing, refused
from safetensors.torch import save_file

import text_encoder
from cascade import NETWORKS, Cascade
from model import CascadeError, load

WITH = {"image_encoder": ["--variation-image", "a.png"], "previewer": ["--previews", "."],
        "effnet_encoder": ["--init-image", "a.png"]}


def refused_with(network, *texts):
    """A command that needs the network is refused in a line with these texts."""
    refused(["a star", *WITH.get(network, []), *FEW, "--weights", "weights"], *texts)


# ------------------------------------------------------------------------------ one file
FILE_FAULTS = {
    "empty": lambda path, data: path.write_bytes(b""),
    "cut in the middle": lambda path, data: path.write_bytes(data[:len(data) // 2]),
    "cut in the header": lambda path, data: path.write_bytes(data[:100]),
    "a checkpoint": lambda path, data: torch.save({"weight": torch.zeros(3)}, path),
    "a folder": lambda path, data: path.mkdir(), "a pipe": lambda path, data: os.mkfifo(path),
    "a link to itself": lambda path, data: path.symlink_to(path.name),
    "missing": lambda path, data: None}
MESSAGES = {"a link to itself": "cannot be opened", "missing": "is missing"}


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("network", ["stage_c", "text_encoder", "previewer"])
def test_a_broken_file_is_named(weights, network, fault):
    path = weights / tiny.file_name(network)
    data = path.read_bytes()
    path.unlink()
    FILE_FAULTS[fault](path, data)
    refused_with(network, tiny.file_name(network), MESSAGES.get(fault, "expected"))


def convert(tensors, function):
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = function(tensor)


TENSOR_FAULTS = {
    "try bf16 or fp32": lambda tensors: convert(tensors, lambda tensor: tensor * torch.inf),
    "got I8": lambda tensors: convert(tensors, lambda tensor: tensor.to(torch.int8)),
    "tensor extra": lambda tensors: tensors.update(extra=torch.zeros(2)),
    "is missing": lambda tensors: tensors.pop([name for name in tensors if "bias" in name][-1]),
    "expected": lambda tensors: tensors.update({sorted(tensors)[-1]: torch.zeros(3, 5, 7)})}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_wrong_tensors_are_named_with_their_file(weights, network, fault):
    change_tensors(weights, network, TENSOR_FAULTS[fault])
    refused_with(network, tiny.file_name(network), fault)


@pytest.mark.parametrize("size", ["", "0", "-128", "wide", "1e9", "128.0", "9" * 5000, "99999"])
def test_the_size_in_the_metadata_is_checked_like_an_option(weights, size):
    change_tensors(weights, "stage_c", lambda tensors: None, {"width": size, "height": "128"})
    refused(["a star", "--weights", "weights"], "stage_c.safetensors")


# ------------------------------------------------------------------------------ config.json and other text
CONFIGS = {
    ("text_encoder", "eos_token_id"): [None, "2", -1, 520, True, 519.0, [519]],
    ("text_encoder", "hidden_act"): [None, "relu", ["gelu"], {}],
    ("image_encoder", "hidden_act"): ["relu"],
    ("stage_a", "scale_factor"): [None, "1", 0, -1, True, float("nan"), float("inf"), [1]],
    ("stage_c", "switch_level"): [True, [False, True], 3, "no"]}


@pytest.mark.parametrize("network, name", CONFIGS, ids=str)
def test_a_wrong_value_in_config_json_is_named(weights, network, name):
    config = (weights / tiny.file_name(network)).with_name("config.json")
    for value in CONFIGS[network, name]:
        config.write_text(json.dumps({name: value}))
        refused_with(network, f"config.json: {name}: expected")


def test_the_tokenizers_end_must_be_the_text_encoders(weights):
    (weights / "text_encoder" / "config.json").write_text('{"eos_token_id": 100}')
    refused_with("text_encoder", "tokenizer: expected", "100", "got 519")


JSON_FAULTS = ["null", "3", '"a"', "[]", "{", "\xff", "[" * 10 ** 5]
TEXTS = {
    "text_encoder/config.json": JSON_FAULTS, "tokenizer/tokenizer.json": JSON_FAULTS,
    "tokenizer/vocab.json": [None, *JSON_FAULTS, '{"a": 0}'],
    "tokenizer/merges.txt": [None, "a b c", "a", "\xff", "yy zz"]}


@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_or_missing_text_file_is_named(weights, name):
    for text in TEXTS[name]:
        (weights / name).unlink(missing_ok=True)
        if text is not None:
            (weights / name).write_bytes(text.encode("latin-1"))
        refused_with("text_encoder", str(Path(name).parent), "expected")


# ------------------------------------------------------------------------------ networks that do not fit together
MISFITS = [
    ("text_encoder", "projection", 128), ("text_encoder", "width", 128),
    ("image_encoder", "projection", 32), ("stage_c", "latent_channels", 8),
    ("stage_c", "text_dim", 128), ("stage_c", "image_dim", 32), ("stage_b", "latent_channels", 8),
    ("stage_b", "semantic_channels", 8), ("stage_b", "text_dim", 128),
    *((network, "latent_channels", 8) for network in ("stage_a", "effnet_encoder", "previewer"))]


@pytest.mark.parametrize("network, name, value", MISFITS, ids=str)
def test_a_network_of_another_cascade_is_refused(weights, network, name, value):
    network_class, config = tiny.NETWORKS[network]
    other = tiny.randomise(network_class(replace(config, **{name: value})), seed=0)
    path = weights / tiny.file_name(network)
    path.unlink()
    tiny.save(other.state_dict(), path)
    refused_with("image_encoder" if name == "image_dim" else network, "expected", "got")


@pytest.mark.parametrize("place_of", tiny.NETWORKS)
def test_another_networks_file_is_refused(folder, place_of):
    for other in tiny.NETWORKS:
        if other != place_of:
            with pytest.raises(CascadeError, match=f"expected {place_of}, got {other}"):
                load(folder / tiny.file_name(other), expect=place_of, networks=NETWORKS)


# ------------------------------------------------------------------------------ tokenizers
def write_tokenizer_json(weights, setting="", value=None):
    """The tokenizer as transformers writes it, with one setting, such as `model.dropout`, changed."""
    data = part = json.loads(text_encoder.read_tokenizer(weights / "tokenizer").to_str())
    *parents, name = setting.split(".")
    for parent in parents:
        part = part[parent]
    if setting:
        part[name] = value(part[name]) if callable(value) else value
    (weights / "tokenizer" / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("setting, value", [
    ("", None), ("model.dropout", 0.0), ("model.byte_fallback", None),
    ("model.merges", lambda merges: [" ".join(pair) for pair in merges])], ids=str)
def test_clips_own_tokenizer_json_is_accepted(weights, setting, value):
    texts = ["A red circle", "  zwei Äpfel! 12", "<|startoftext|> red <|endoftext|> blue", ""]
    before = text_encoder.Tokenizer(weights / "tokenizer")(texts)
    write_tokenizer_json(weights, setting, value)
    after = text_encoder.Tokenizer(weights / "tokenizer")(texts)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


TOKENIZERS = [
    ("model", None), ("model.type", "WordPiece"), ("model.dropout", 0.1), ("model.speed", 3),
    ("model.end_of_word_suffix", ""), ("model.vocab", {}), ("model.vocab.a", -1),
    ("model.vocab.a", "1"), ("model.vocab.a</w>", 5000), ("model.vocab.<|endoftext|>", 3),
    ("model.vocab", lambda vocab: {token: i + 50 for token, i in vocab.items()}),
    ("model.merges", None), ("model.merges", [3]), ("model.merges", [["yy", "zz"]]),
    ("model.merges", [["a", "b", "c"]]), ("normalizer", None), ("normalizer", []),
    ("normalizer", {"type": "NFKC"}), ("normalizer.normalizers", []),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # aborts the process
    ("pre_tokenizer", None), ("pre_tokenizer.type", "Whitespace"), ("post_processor", None),
    ("post_processor.sep", ["<|startoftext|>", 518]), ("added_tokens", "ab"),
    ("added_tokens", [{"id": 7, "content": "red"}])]


@pytest.mark.parametrize("setting, value", TOKENIZERS, ids=str)
def test_a_tokenizer_json_that_is_not_clips_is_refused(weights, setting, value):
    write_tokenizer_json(weights, setting, value)
    refused_with("text_encoder", "tokenizer", "expected")


# ------------------------------------------------------------------------------ folders
def test_a_weights_folder_that_cannot_be_opened_is_refused(place):
    for name in ("nowhere", "a.png", "", "a\nb", "a\0b"):
        refused(["a star", "--weights", name])


def test_a_folder_that_may_not_be_entered_is_named_as_such(weights, monkeypatch):
    monkeypatch.setattr(os, "stat", failing(PermissionError(13, "Permission denied")))
    for open_it in (load, lambda path: Cascade(path.parent).file("stage_b")):
        with pytest.raises(CascadeError, match="stage_b.*Permission denied"):
            open_it(weights / "stage_b.safetensors")


@pytest.mark.slow
def test_a_header_of_40000_tensors_is_read_in_linear_time(weights):
    (weights / "stage_c.safetensors").unlink()
    tensors = {f"tensor.{i}": torch.zeros(1) for i in range(40_000)}
    save_file(tensors, weights / "stage_c.safetensors")
    refused_with("stage_c", "stage_c.safetensors: expected stage_c, got an unknown network")
