"""LoRA files: every naming in circulation gives the same network, the original code's numbers, and clear errors."""
from pathlib import Path

import pytest
import tiny
import torch
from commands import SMALL, command, refused
from helpers import TESTS, assert_same, original, original_stage_c, relative_error
from PIL import Image
from safetensors.torch import save_file

import model
import text_encoder
from cascade import Cascade
from model import CascadeError

ROUNDED = 2e-3                                          # the stored weights are fp16, the outputs were not
BLOCKS = {"down_blocks.0.2": 64, "down_blocks.1.5": 128, "up_blocks.1.2": 64}       # of tests/tiny.py, and their channels
RANK, ALPHA = 4, 2.0


# ------------------------------------------------------------------------------ the original code's numbers
def original_file(maker):
    return TESTS / "original" / f"lora_{maker}_format.safetensors"


@pytest.mark.parametrize("maker", ["original", "kohya", "onetrainer"])
def test_stage_c_gives_the_makers_numbers(tmp_path, maker):
    path, inputs, plain = original_stage_c(tmp_path)
    _, _, theirs = original(f"lora_{maker}", tmp_path)
    assert relative_error(theirs["eps"], plain) > 0.1
    for strength, name in (1.0, "eps"), (0.5, "eps_half"):
        if name in theirs:
            unet = model.load(path, dtype=torch.float32, loras=[(original_file(maker), strength)])
            assert_same(unet(**inputs), theirs[name], ROUNDED)
    assert ("eps_half" in theirs) == (maker == "original")


def test_new_and_trained_tokens_give_the_originals_text_embeddings(tmp_path):
    path, inputs, theirs = original("lora_original", tmp_path)
    loras = [(original_file("original"), 1.0)]
    encoder = text_encoder.load(path, dtype=torch.float32, loras=loras, tokens=[[37, 41]])
    hidden, pooled = encoder(inputs["ids"], inputs["mask"])
    assert encoder.config.vocabulary == 521
    assert_same(hidden, theirs["hidden"], ROUNDED)
    assert_same(pooled[:, 0], theirs["pooled"], ROUNDED)


# ------------------------------------------------------------------------------ the names in circulation
QKV_OUT = range(4)                                      # the layers of an attention block, in this order
SPLIT = "attn.to_q attn.to_k attn.to_v attn.out_proj"
PARTS = "attn.in_proj.0 attn.in_proj.1 attn.in_proj.2 attn.out_proj"
DIFFUSERS = "to_q to_k to_v to_out.0"
THREE_DAYS = SPLIT.replace("out_proj", "to_out_proj")
KOHYA = ".lora_down.weight .lora_up.weight .alpha"
PEFT = ".lora_A.weight .lora_B.weight .alpha"
DIFFUSERS_TENSORS = "_lora.down.weight _lora.up.weight .alpha"
NAMINGS = {                                             # prefix, separator, layers, tensors
    "kohya": ("lora_unet_", "_", SPLIT, KOHYA),
    "kohya, 22 February 2024": ("lora_unet_", "_", SPLIT.replace("out_proj", "to_out"), KOHYA),
    "OneTrainer": ("lora_prior_unet_", "_", SPLIT, KOHYA),
    "OneTrainer, before March 2024": ("lora_prior_unet_", "_", DIFFUSERS, KOHYA),
    "OneTrainer, its bug": ("lora_prior_prior_", "_", DIFFUSERS, KOHYA),
    "OneTrainer, three days": ("lora_prior_unet_", "_", THREE_DAYS, KOHYA),
    "OneTrainer 2026, Kohya": ("lora_unet_", "_", PARTS, KOHYA),
    "OneTrainer 2026, Diffusers": ("prior.", ".", DIFFUSERS, PEFT.removesuffix(" .alpha")),
    "OneTrainer 2026, Original": ("", ".", PARTS, PEFT),
    "OneTrainer 2026, Comfy": ("diffusion_model.", ".", PARTS, PEFT),
    "ComfyUI": ("diffusion_model.", ".", SPLIT, ".lora_down .lora_up .alpha"),
    "ComfyUI, diffusers' tensors": ("lora_unet_", "_", SPLIT, DIFFUSERS_TENSORS)}


def random_lora():
    """{(block, layer): (down, up)} for three attention blocks of Stage C."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return {(block, layer): (randn(RANK, c), randn(c, RANK)) for block, c in BLOCKS.items() for layer in QKV_OUT}


def write(path, lora, naming):
    prefix, separator, layers, names = NAMINGS[naming]
    tensors = {}
    for (block, layer), (down, up) in lora.items():
        key = prefix + f"{block}.attention.{layers.split()[layer]}".replace(".", separator)
        scale = 1 if "alpha" in names else ALPHA / RANK  # folded into up
        for name, tensor in zip(names.split(), (down, scale * up, torch.tensor(ALPHA))):
            tensors[key + name] = tensor
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_network(folder, tmp_path, naming):
    """The weights are those of the definition."""
    lora = random_lora()
    file = write(tmp_path / "a.safetensors", lora, naming)
    ours = model.load(folder / "stage_c.safetensors", loras=[(file, 0.7)]).state_dict()
    before, expected = (model.load(folder / "stage_c.safetensors") for _ in range(2))
    for (block, layer), (down, up) in lora.items():
        attention = expected.get_submodule(f"{block}.attention.attn")
        weight = [*attention.in_proj_weight.chunk(3), attention.out_proj.weight][layer]
        weight += 0.7 * ALPHA / RANK * up @ down
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(ours[name], tensor, atol=1e-5), name
    changed = [name for name, tensor in before.state_dict().items() if not torch.equal(tensor, ours[name])]
    assert len(changed) == 2 * len(BLOCKS)


SHAPES = {                                              # of down and up
    "lora_te_text_model_encoder_layers_1_mlp_fc1": ((1, 64), (128, 1)),
    "lora_prior_te_text_projection": ((1, 64), (64, 1)),
    "lora_unet_clf_1": ((1, 64, 1, 1), (16, 1, 1, 1)),
    "lora_unet_down_blocks_0_0_depthwise": ((1, 1), (64, 1))}
CHANGED = {"stage_c": {"clf.1.weight", "down_blocks.0.0.depthwise.weight"},
           "text_encoder": {"text_model.encoder.layers.1.mlp.fc1.weight", "text_projection.weight"}}


@pytest.mark.parametrize("name", CHANGED)
def test_one_file_changes_both_networks_and_convolutions_and_files_add_up(folder, tmp_path, name):
    """All entries of up @ down are 1, also for each of the nine taps of a convolution."""
    tensors = {f"{layer}.lora_{part}.weight": torch.ones(shape) for layer, shapes in SHAPES.items()
               for part, shape in zip(("down", "up"), shapes)}
    save_file(tensors, tmp_path / "a.safetensors")
    twice = [(tmp_path / "a.safetensors", 1.0), (tmp_path / "a.safetensors", 0.5)]
    load = text_encoder.load if name == "text_encoder" else model.load
    before = load(folder / tiny.file_name(name)).state_dict()
    for dtype in torch.float32, torch.bfloat16:
        after = load(folder / tiny.file_name(name), dtype=dtype, loras=twice).state_dict()
        for key in before:
            expected = before[key] + 1.0 + 0.5 if key in CHANGED[name] else before[key]
            assert torch.equal(after[key], expected.to(dtype)), key


# ------------------------------------------------------------------------------ errors
LAYER = "lora_unet_down_blocks_0_2_kv_mapper_1"
DOWN, UP, FACTOR = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"
TENSORS = {DOWN: torch.ones(2, 48), UP: torch.ones(64, 2), FACTOR: torch.tensor(1.0)}
FAULTS = {                                              # the tensors that differ; None: they are missing
    "no such layer": {"lora_unet_input_blocks_1.alpha": torch.ones(1)},
    "lora_te2_x.alpha": {"lora_te2_x.alpha": torch.ones(1)},
    "hada_w1": {f"{LAYER}.hada_w1_a": torch.ones(1)}, "expected both": {UP: None},
    "(64, rank)": {UP: torch.ones(65, 2)}, "(rank, 48)": {DOWN: torch.ones(2, 47)},
    "(2, 0)": {UP: torch.ones(2, 0)}, "expected a LoRA for": {UP: torch.tensor(1.0)},
    "one alpha": {FACTOR: torch.ones(2)}, "I8": {UP: torch.ones(64, 2).char()},
    "not finite": {FACTOR: torch.tensor(torch.inf)},
    "expected a LoRA, got no tensors": dict.fromkeys(TENSORS)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_lora_file_is_refused_by_name(place, folder, fault):
    tensors = TENSORS | FAULTS[fault]
    save_file({name: tensors[name] for name in tensors if tensors[name] is not None}, "wrong.safetensors")
    refused(["star", "--lora", "wrong.safetensors:0.5", "--weights", folder], "wrong.safetensors", fault)


@pytest.mark.parametrize("options, text", [
    ("star --lora nowhere.safetensors", "nowhere.safetensors: there is no such file"),
    ("star --lora a.png", "a.png: expected"), ("star --lora a.png:nan", "lora_strength: expected"),
    ("star --lora a.png:inf", "lora_strength: expected"),
    ("star --lora=", "loras: expected"), ("star --lora a.png:1:x", "a.png:1:x: there is no such file"),
    ("star --token x", "--token: expected"),
    ("star --token [x]=red", "tokens: the LoRA files have 0"),
    ("--reconstruct a.png --lora a.png", "--lora: not used")])
def test_wrong_options_are_refused_by_name(place, folder, options, text):
    refused([*options.split(), "--weights", folder], text)


def test_other_networks_take_no_lora(folder):
    with pytest.raises(CascadeError, match="a stage_a takes no LoRA"):
        model.load(folder / "stage_a.safetensors", loras=[("a.safetensors", 1.0)])


# ------------------------------------------------------------------------------ new tokens
def write_tokens(path, indices=(520,), width=64):
    embeddings = {"embeddings": torch.ones(len(indices), width), "indices": torch.tensor(indices)}
    save_file({f"embeddings.{name}": tensor for name, tensor in embeddings.items()}, path)
    return path


def token_table(cascade):
    return cascade.network("text_encoder").text_model.embeddings.token_embedding.weight


def test_a_new_token_starts_from_its_word_and_is_read_whole(folder, tmp_path):
    file = write_tokens(tmp_path / "a.safetensors", (521, 4, 520))
    tokens = {"[one]": "red", "<two>": "circle"}
    plain = Cascade(folder)
    zero, full = (Cascade(folder, loras=[(file, scale)], tokens=tokens) for scale in (0.0, 1.0))
    red_and_circle = plain.encode_prompt(["a red star", "a red circle"]).hidden
    prompts = ["a red star", "a red circle", "a [One] star", "a[one]<two>"]
    hidden, changed = (cascade.encode_prompt(prompts).hidden for cascade in (zero, full))
    assert torch.allclose(hidden[:2], red_and_circle[:2], atol=1e-5)
    assert torch.allclose(hidden[0, :4], hidden[2, :4], atol=1e-5)                  # red is one token
    assert (changed[2] - hidden[2]).abs().max() > 1e-2
    before, after = token_table(plain), token_table(full)
    tokenizer = text_encoder.read_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode("circle", add_special_tokens=False).ids
    assert torch.allclose(after[521], before[ids].mean(0) + 1) and len(ids) > 1
    assert torch.equal(after[4], before[4] + 1) and torch.equal(after[5], before[5])


def test_a_token_of_the_vocabulary_is_not_new(folder):
    with pytest.raises(CascadeError, match="'red</w>' is in the vocabulary already"):
        text_encoder.Tokenizer(folder / "tokenizer", tokens=["red</w>"])


@pytest.mark.parametrize("indices, width, text", [
    ((520,), 64, "--token '[new]=word'"), ((520,), 63, "expected embeddings"),
    ((-1,), 64, "expected embeddings"), ((0.5,), 64, "expected embeddings")])
def test_tokens_that_do_not_fit_are_refused(place, folder, indices, width, text):
    write_tokens("a.safetensors", indices, width)
    refused(["star", "--lora", "a.safetensors", "--weights", folder], "a.safetensors: ", text)


def test_the_record_holds_loras_and_tokens_and_latents_need_them_again(place, folder):
    write_tokens("t.safetensors")
    write("a.safetensors", random_lora(), "kohya")
    loras = ["--lora", "t.safetensors", "--lora", "a.safetensors:0.25", "--token", "[x]=red"]
    prior = ["a [x] star", *loras, "--steps", 2, *SMALL, "--weights", folder]
    decode = ["--latents", "half.safetensors", "--decoder-steps", 1, "--weights", folder]
    command(*prior, "--decoder-steps", 1, "-o", "whole.png")
    texts = Image.open("whole.png").text
    assert texts["lora"] == "[['t.safetensors', 1.0], ['a.safetensors', 0.25]]"
    assert texts["token"] == "[['[x]', 'red']]"
    command(*prior, "-o", "half.safetensors")
    command(*decode, *loras, "-o", "half.png")
    assert Path("half.png").read_bytes() == Path("whole.png").read_bytes()
    refused([*decode, "-o", "c.png"], "half.safetensors", "t.safetensors")
