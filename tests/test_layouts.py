"""The files people have: ComfyUI's packed checkpoints, prefixes, fp8, several precisions next to each other."""
import pytest
import torch
from commands import refused
from helpers import SHORT
from safetensors.torch import load_file, save_file
from tiny import file_name, split_attention, write_tokenizer

from cascade import NETWORKS, PACKED, Cascade
from model import CascadeError, load

PREFIX = {"stage_c": "model.diffusion_model.", "stage_b": "model.diffusion_model.", "stage_a": "vae.",
          "effnet_encoder": "vae.encoder.", "previewer": "vae.previewer.", "image_encoder": "clip_l_vision."}
TEXTS = ["text_encoder.", "text_encoder.transformer.", "text_encoder.clip_g.transformer."]


def packed(folder, names, text=TEXTS[0], split=False):
    """The tensors of one of ComfyUI's files, with the constants that it saves as well."""
    tensors = {f"{text}logit_scale": torch.ones(()), "vae.encoder.mean": torch.ones(3),
               f"{text}text_model.embeddings.position_ids": torch.arange(77)}
    for name in names:
        state = load_file(folder / file_name(name))
        state = split_attention(state) if split else state
        tensors |= {PREFIX.get(name, text) + key: tensor for key, tensor in state.items()}
    if text == TEXTS[2]:
        projection = tensors.pop(f"{text}text_projection.weight")
        tensors["text_encoder.clip_g.text_projection"] = projection.T.contiguous()
    return tensors


def assert_same_tensors(network, path):
    state, expected = network.state_dict(), load_file(path)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("text, split", list(zip(TEXTS, (False, True, True))))
def test_a_packed_file_holds_the_tensors_of_the_single_files(folder, tmp_path, text, split):
    for file, names in PACKED.items():
        save_file(packed(folder, names, text, split), tmp_path / file)
        for name in names:
            network = load(tmp_path / file, expect=name, networks=NETWORKS)
            assert_same_tensors(network, folder / file_name(name))


def test_a_folder_of_packed_files_draws_the_same_image(folder, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "comfyui_checkpoints").mkdir()
    for place, (file, names) in zip(("", "comfyui_checkpoints/"), PACKED.items()):
        save_file(packed(folder, names), tmp_path / f"{place}{file}.safetensors", {"width": "128"})
    lora = {"embeddings.embeddings": torch.ones(1, 64), "embeddings.indices": torch.tensor([5])}
    save_file(lora, tmp_path / "lora.safetensors")
    loras = [(tmp_path / "lora.safetensors", 0.5)]
    theirs, ours = Cascade(tmp_path, loras=loras), Cascade(folder, loras=loras)
    options = SHORT | {"variation_images": torch.ones(1, 24)}
    assert torch.allclose(theirs("a star", **options), ours("a star", **options), atol=1e-5)
    assert theirs.file("previewer").stem == "stable_cascade_stage_c"
    assert theirs.file("stage_a").parent.name == "comfyui_checkpoints"


def test_what_is_left_over_in_a_packed_file_is_an_error(folder, place):
    tensors = packed(folder, PACKED["stable_cascade_stage_b"])
    for extra in ("extra", "model.diffusion_model.extra", "vae.extra"):
        save_file(tensors | {extra: torch.zeros(2)}, "b.safetensors")
        with pytest.raises(CascadeError, match="b.safetensors: tensor extra does not belong"):
            load("b.safetensors", expect="stage_a" if "vae" in extra else "stage_b")
    save_file(tensors, "b.safetensors")
    for expect, message in (("stage_c", "got stage_b and stage_a"), (None, "name the one to load")):
        with pytest.raises(CascadeError, match=message):
            load("b.safetensors", expect=expect)
    write_tokenizer(place / "tokenizer")
    save_file(tensors, "stable_cascade_stage_c.safetensors")
    expected = "stage_b is missing (expected stage_b.safetensors or", "_fp16"
    refused(["a star", "--weights", "."], *expected)


@pytest.mark.parametrize("name, prefix, without", [
    ("stage_b", "state_dict.", ""), ("stage_c", "unet.", ""), ("stage_a", "module.", ""),
    ("previewer", "previewer.", ""), ("text_encoder", "text_encoder.", ""), ("effnet_encoder", "model.", ""),
    ("image_encoder", "image_encoder.", ""), ("text_encoder", "", "text_model."),
    ("text_encoder", "text_encoder.", "text_model.")])
def test_files_with_a_prefix_or_without_the_level_text_model_load(folder, tmp_path, name, prefix, without):
    tensors = load_file(folder / file_name(name))
    renamed = {prefix + key.removeprefix(without): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "file")
    assert_same_tensors(load(tmp_path / "file", networks=NETWORKS), folder / file_name(name))


@pytest.mark.parametrize("split", [False, True])
def test_fp8_is_read_exactly_and_runs_in_any_type(weights, split):
    path = weights / "stage_c.safetensors"
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(split_attention(eight) if split else eight, path)
    state = load(path).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in eight.items())
    unet = Cascade(weights, dtype="fp16").network("stage_c")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float16}
