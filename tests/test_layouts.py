"""The files people have: ComfyUI's packed checkpoints, prefixes, fp8, several precisions next to each other."""
import pytest
import torch
from commands import refused
from safetensors.torch import load_file, save_file
from tiny import file_name, write_tokenizer

from cascade import NETWORKS, PACKED, Cascade
from model import CascadeError, load

PREFIX = {"stage_c": "model.diffusion_model.", "stage_b": "model.diffusion_model.", "stage_a": "vae.",
          "effnet_encoder": "vae.encoder.", "previewer": "vae.previewer.", "image_encoder": "clip_l_vision."}
TEXTS = ["text_encoder.", "text_encoder.transformer.", "text_encoder.clip_g.transformer."]
FEW = {"steps": 1, "decoder_steps": 1, "width": 64, "height": 64, "output": "pt", "variation_images": torch.ones(1, 24)}


def split_attention(state):
    """Query, key and value apart, as ComfyUI saves them."""
    split = {}
    for name, tensor in state.items():
        pieces = tensor.chunk(3) if ".in_proj_" in name else [tensor]
        for part, piece in zip("qkv", pieces):
            split[name.replace(".in_proj_", f".to_{part}.")] = piece.clone()
    return split


def packed(folder, names, text=TEXTS[0], split=False):
    """The tensors of one of ComfyUI's files, with the constants that it saves as well."""
    tensors = {f"{text}logit_scale": torch.ones(()), "vae.encoder.mean": torch.ones(3),
               f"{text}text_model.embeddings.position_ids": torch.arange(77)}
    for name in names:
        state = load_file(folder / file_name(name))
        state = split_attention(state) if split else state
        tensors |= {PREFIX.get(name, text) + key: tensor for key, tensor in state.items()}
    if text == TEXTS[2]:
        tensors["text_encoder.clip_g.text_projection"] = tensors.pop(f"{text}text_projection.weight").T.contiguous()
    return tensors


def same(network, path):
    state, expected = network.state_dict(), load_file(path)
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("text, split", list(zip(TEXTS, (False, True, True))))
def test_a_packed_file_holds_the_tensors_of_the_single_files(folder, tmp_path, text, split):
    for file, names in PACKED.items():
        save_file(packed(folder, names, text, split), tmp_path / file)
        for name in names:
            assert same(load(tmp_path / file, expect=name, networks=NETWORKS), folder / file_name(name))


def test_a_folder_of_packed_files_draws_the_same_image(folder, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "comfyui_checkpoints").mkdir()
    for place, (file, names) in zip(("", "comfyui_checkpoints/"), PACKED.items()):
        save_file(packed(folder, names), tmp_path / f"{place}{file}.safetensors", {"width": "128"})
    theirs, ours = Cascade(tmp_path), Cascade(folder)
    assert torch.allclose(theirs("a star", **FEW), ours("a star", **FEW), atol=1e-5)
    assert theirs.file("previewer").stem == "stable_cascade_stage_c"
    assert theirs.file("stage_a").parent.name == "comfyui_checkpoints"


def test_what_is_left_over_in_a_packed_file_is_an_error(folder, place):
    tensors = packed(folder, PACKED["stable_cascade_stage_b"])
    for extra in ("extra", "model.diffusion_model.extra", "vae.extra"):
        save_file(tensors | {extra: torch.zeros(2)}, "b.safetensors")
        with pytest.raises(CascadeError, match=f"b.safetensors: tensor {extra.split('.')[-1]} does not belong"):
            load("b.safetensors", expect="stage_a" if "vae" in extra else "stage_b")
    save_file(tensors, "b.safetensors")
    for expect, message in (("stage_c", "expected stage_c, got stage_b and stage_a"), (None, "name the one to load")):
        with pytest.raises(CascadeError, match=message):
            load("b.safetensors", expect=expect)
    write_tokenizer(place / "tokenizer")
    save_file(tensors, "stable_cascade_stage_c.safetensors")
    refused(["a star", "--weights", "."], "stage_b is missing (expected stage_b.safetensors or", "_fp16")


@pytest.mark.parametrize("name, prefix", [
    ("stage_b", "state_dict."), ("stage_c", "unet."), ("stage_a", "module."), ("previewer", "previewer."),
    ("text_encoder", "text_encoder."), ("effnet_encoder", "model."), ("image_encoder", "image_encoder.")])
def test_files_with_a_prefix_load(folder, tmp_path, name, prefix):
    tensors = load_file(folder / file_name(name))
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "file")
    assert same(load(tmp_path / "file", networks=NETWORKS), folder / file_name(name))


@pytest.mark.parametrize("prefix", ["", "text_encoder."])
def test_text_encoders_without_the_level_text_model_load(folder, tmp_path, prefix):
    tensors = load_file(folder / file_name("text_encoder"))
    save_file({prefix + name.removeprefix("text_model."): tensors[name] for name in tensors}, tmp_path / "file")
    assert same(load(tmp_path / "file", networks=NETWORKS), folder / file_name("text_encoder"))


@pytest.mark.parametrize("split", [False, True])
def test_fp8_is_read_exactly_and_runs_in_any_type(weights, split):
    path, tensors = weights / "stage_c.safetensors", load_file(weights / "stage_c.safetensors")
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    path.unlink()
    save_file(split_attention(eight) if split else eight, path)
    state = load(path).state_dict()
    assert all(state[name].dtype == torch.bfloat16 and torch.equal(state[name].float(), eight[name].float())
               for name in tensors)
    assert {each.dtype for each in Cascade(weights, dtype="fp16").network("stage_c").parameters()} == {torch.float16}
