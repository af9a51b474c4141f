"""Weights folders that are incomplete, broken or put together from different cascades: one line that names the file."""
import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from commands import FEW, changed_copy, refused
from PIL import Image
from safetensors.torch import save_file

import text_encoder
from cascade import NETWORKS, Cascade
from model import CascadeError, load

WITH = {"image_encoder": "--variation-image", "effnet_encoder": "--init-image",
        "previewer": "--previews"}
JSON_FAULTS = ["null", "3", '"a"', "[]", "{", "\xff", "[" * 10 ** 5]


@pytest.fixture
def weights(folder, tmp_path):
    """A folder whose files may be replaced, but not written to: they are links."""
    return shutil.copytree(folder, tmp_path / "weights", copy_function=os.link)


def run_with(network, weights, place):
    """The refusal of a command that needs the network."""
    image = place / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    (place / "previews").mkdir(exist_ok=True)
    source = place / "previews" if network == "previewer" else image
    options = [WITH[network], source] if network in WITH else []
    few = ["--steps", 2, *FEW[2:]]
    return refused(place, "a star", *options, *few, "--weights", weights, "-o", place / "a.png")


# ------------------------------------------------------------------------------ one file
FILE_FAULTS = {
    "empty": lambda path, data: path.write_bytes(b""),
    "cut in the middle": lambda path, data: path.write_bytes(data[:len(data) // 2]),
    "cut in the header": lambda path, data: path.write_bytes(data[:100]),
    "text": lambda path, data: path.write_bytes(b"these are no weights" * 100),
    "a pickle": lambda path, data: path.write_bytes(pickle.dumps([1.0] * 100)),
    "a checkpoint": lambda path, data: torch.save({"weight": torch.zeros(3)}, path),
    "a folder": lambda path, data: path.mkdir(),
    "a pipe": lambda path, data: os.mkfifo(path),
    "a link to itself": lambda path, data: path.symlink_to(path.name),
    "missing": lambda path, data: None}


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("network", ["stage_c", "text_encoder", "previewer"])
def test_a_broken_file_is_named(weights, tmp_path, network, fault):
    path = weights / tiny.file_name(network)
    data = path.read_bytes()
    path.unlink()
    FILE_FAULTS[fault](path, data)
    line = run_with(network, weights, tmp_path)
    assert tiny.file_name(network) in line
    if fault == "missing":
        assert f"{network} is missing" in line and "README" in line
    elif "link" not in fault:
        assert "never a pickle" in line


def convert(tensors, function):
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = function(tensor)


TENSOR_FAULTS = {
    "not finite": lambda tensors: convert(tensors, lambda tensor: tensor * torch.nan),
    "got I8": lambda tensors: convert(tensors, lambda tensor: tensor.to(torch.int8)),
    "tensor extra does not belong": lambda tensors: tensors.update(extra=torch.zeros(2)),
    "is missing": lambda tensors: tensors.pop([name for name in tensors if "bias" in name][-1]),
    "expected": lambda tensors: tensors.update({sorted(tensors)[-1]: torch.zeros(3, 5, 7)})}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
@pytest.mark.parametrize("network", tiny.NETWORKS)
def test_wrong_tensors_are_named_with_their_file(folder, tmp_path, network, fault):
    weights = changed_copy(folder, tmp_path, network, TENSOR_FAULTS[fault])
    line = run_with(network, weights, tmp_path)
    assert fault in line and tiny.file_name(network) in line


@pytest.mark.parametrize("network, tensor", [
    ("stage_c", "clf.1.bias"), ("stage_b", "clf.1.bias"), ("stage_a", "out_block.0.bias"),
    ("text_encoder", "text_projection.weight"), ("effnet_encoder", "mapper.1.running_mean")])
def test_infinity_in_one_tensor_blames_the_network_that_has_it(folder, tmp_path, network, tensor):
    weights = changed_copy(folder, tmp_path, network, lambda all: all[tensor].fill_(torch.inf))
    assert f"{tiny.file_name(network)} may be broken" in run_with(network, weights, tmp_path)


def test_weights_too_large_for_fp16_name_the_stage(folder, tmp_path):
    weights = changed_copy(folder, tmp_path, "stage_b", lambda all: all["clf.1.bias"].fill_(1e5))
    line = refused(tmp_path, "a star", *FEW, "--weights", weights, "--decoder-dtype", "fp16")
    assert "Stage B" in line and "try bf16 or fp32" in line


@pytest.mark.parametrize("size", ["", "0", "-128", "wide", "1e9", "128.0", "9" * 5000, "99999"])
def test_the_size_in_the_metadata_is_checked_like_an_option(folder, tmp_path, size):
    metadata = {"width": size, "height": "128"}
    weights = changed_copy(folder, tmp_path, "stage_c", lambda tensors: None, metadata)
    assert "stage_c.safetensors" in refused(tmp_path, "a star", "--weights", weights)


@pytest.mark.slow
def test_a_header_of_40000_tensors_is_read_in_linear_time(weights, tmp_path):
    tensors = {f"tensor.{i}": torch.zeros(1) for i in range(40_000)}
    (weights / "stage_c.safetensors").unlink()
    save_file(tensors, weights / "stage_c.safetensors")
    assert "expected stage_c, got an unknown network" in run_with("stage_c", weights, tmp_path)


# ------------------------------------------------------------------------------ config.json
CONFIGS = {
    ("text_encoder", "eos_token_id"): [None, "2", -1, 520, True, 519.0, [519], 100],
    ("text_encoder", "hidden_act"): [None, "relu", ["gelu"], {}],
    ("image_encoder", "hidden_act"): ["relu"],
    ("stage_a", "scale_factor"): [None, "1", 0, -1, True, float("nan"), float("inf"), [1]],
    ("stage_c", "switch_level"): [True, [False, True], 3, "no"]}
CONFIGS = [(*key, value) for key, values in CONFIGS.items() for value in values]


@pytest.mark.parametrize("network, name, value", CONFIGS, ids=str)
def test_a_wrong_value_in_config_json_is_named(weights, tmp_path, network, name, value):
    config = (weights / tiny.file_name(network)).with_name("config.json")
    config.write_text(json.dumps({name: value}))
    line = run_with(network, weights, tmp_path)
    if value == 100:  # a token, but not the end
        assert "tokenizer: expected 100 as the end token" in line and "got 519" in line
    else:
        assert f"config.json: {name}: expected" in line


@pytest.mark.parametrize("text", JSON_FAULTS, ids=lambda text: text[:5])
def test_a_config_json_that_is_none_is_named(weights, tmp_path, text):
    (weights / "text_encoder" / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: expected a JSON object" in run_with("text_encoder", weights, tmp_path)


# ------------------------------------------------------------------------------ networks that do not fit together
MISFITS = {
    "text_encoder": [{"projection": 128}, {"width": 128}], "image_encoder": [{"projection": 32}],
    "stage_c": [{"latent_channels": 8}, {"text_dim": 128}, {"image_dim": 32}],
    "stage_b": [{"latent_channels": 8}, {"semantic_channels": 8}, {"text_dim": 128}],
    "stage_a": [{"latent_channels": 8}], "effnet_encoder": [{"latent_channels": 8}],
    "previewer": [{"latent_channels": 8}]}
MISFITS = [(network, change) for network, changes in MISFITS.items() for change in changes]


@pytest.mark.parametrize("network, change", MISFITS, ids=str)
def test_a_network_of_another_cascade_is_refused(weights, tmp_path, network, change):
    network_class, config = tiny.NETWORKS[network]
    other = tiny.randomise(network_class(replace(config, **change)), seed=0)
    path = weights / tiny.file_name(network)
    path.unlink()
    tiny.save(other.state_dict(), path, metadata={"width": "64", "height": "64"})
    needs = "image_encoder" if "image_dim" in change else network
    line = run_with(needs, weights, tmp_path)
    assert "expected" in line and "got" in line


@pytest.mark.parametrize("place", tiny.NETWORKS)
def test_another_networks_file_is_refused(weights, tmp_path, place):
    for other in tiny.NETWORKS:
        if other != place:
            path = weights / tiny.file_name(place)
            path.unlink()
            os.link(weights.parent / "weights" / tiny.file_name(other), path)
            with pytest.raises(CascadeError, match=f"expected {place}, got {other}"):
                load(path, expect=place, networks=NETWORKS)


# ------------------------------------------------------------------------------ tokenizers
def write_tokenizer_json(weights, setting="", value=None):
    """The tokenizer as transformers writes it, with one setting, such as `model.dropout`, changed."""
    folder = weights / "tokenizer"
    data = part = json.loads(text_encoder.read_tokenizer(folder).to_str())
    *parents, name = setting.split(".")
    for parent in parents:
        part = part[parent]
    if setting:
        part[name] = value(part[name]) if callable(value) else value
    (folder / "tokenizer.json").write_text(json.dumps(data))


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
def test_a_tokenizer_json_that_is_not_clips_is_refused(weights, tmp_path, setting, value):
    write_tokenizer_json(weights, setting, value)
    line = refused(tmp_path, "a star", *FEW, "--weights", weights)
    assert "tokenizer" in line and "expected" in line


TEXTS = {"tokenizer.json": JSON_FAULTS, "vocab.json": [*JSON_FAULTS, '{"a": 0}'],
         "merges.txt": ["a b c", "a", "\xff", "yy zz"]}
TEXTS = [(name, text) for name, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize("name, text", TEXTS, ids=lambda value: value[:14])
def test_a_broken_tokenizer_file_is_named(weights, tmp_path, name, text):
    (weights / "tokenizer" / name).unlink(missing_ok=True)  # it is a link
    (weights / "tokenizer" / name).write_bytes(text.encode("latin-1"))
    assert "tokenizer" in refused(tmp_path, "a star", *FEW, "--weights", weights)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_missing_tokenizer_is_named(weights, tmp_path, name):
    os.rename(weights / name, tmp_path / "elsewhere")
    line = refused(tmp_path, "a star", *FEW, "--weights", weights)
    assert "tokenizer: expected tokenizer.json, or vocab.json and merges.txt" in line


# ------------------------------------------------------------------------------ folders
@pytest.mark.parametrize("name", ["nowhere", "image.png", "", "a\nb", "a\0b"])
def test_a_weights_folder_that_cannot_be_opened(tmp_path, name):
    (tmp_path / "image.png").touch()
    path = tmp_path / name if name else ""
    assert refused(tmp_path, "a star", "--weights", path, "-o", tmp_path / "a.png")


def test_a_folder_that_may_not_be_entered_is_named_as_such(weights, monkeypatch):
    stat = os.stat

    def forbidding(path, *given, **named):
        if "stage_b" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", forbidding)  # root may enter everything
    for open_it in (load, lambda path: Cascade(path.parent).file("stage_b")):
        with pytest.raises(CascadeError, match="stage_b.*Permission denied"):
            open_it(weights / "stage_b.safetensors")
