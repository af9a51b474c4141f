"""LoRA files: every naming in circulation gives the same network, the original code's numbers, and clear errors."""
from pathlib import Path

import pytest
import tiny
import torch
from commands import FEW, command, refused
from helpers import TESTS, assert_same, original, relative_error
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
    path, inputs, plain = original("stage_c", tmp_path)
    inputs = {name: inputs[name] for name in ("x", "r", "clip_text_pooled", "clip_text", "clip_img")}
    _, _, theirs = original(f"lora_{maker}", tmp_path)
    ours = model.load(path, dtype=torch.float32, loras=[(original_file(maker), 1.0)])(**inputs)
    assert_same(ours, theirs["eps"], ROUNDED)
    assert relative_error(theirs["eps"], plain["eps"]) > 0.1
    if maker == "original":
        half = model.load(path, dtype=torch.float32, loras=[(original_file(maker), 0.5)])(**inputs)
        assert_same(half, theirs["eps_half"], ROUNDED)


def test_new_and_trained_tokens_give_the_originals_text_embeddings(tmp_path):
    path, inputs, theirs = original("lora_original", tmp_path)
    loras = [(original_file("original"), 1.0)]
    encoder = text_encoder.load(path, dtype=torch.float32, loras=loras, tokens=[[37, 41]])
    hidden, pooled = encoder(inputs["ids"], inputs["mask"])
    assert encoder.config.vocabulary == 521
    assert_same(hidden, theirs["hidden"], ROUNDED)
    assert_same(pooled[:, 0], theirs["pooled"], ROUNDED)


# ------------------------------------------------------------------------------ the names in circulation
def random_lora(seed=0):
    """{(block, layer): (down, up)} for three attention blocks of Stage C."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for block, c in BLOCKS.items():
        for layer in "q", "k", "v", "out":
            lora[block, layer] = [torch.randn(shape, generator=generator) for shape in ((RANK, c), (c, RANK))]
    return lora


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight", "alpha")
SPLIT = ("attention.attn.to_{}", "attention.attn.out_proj")
PARTS = ("attention.attn.in_proj.{}", "attention.attn.out_proj")
DIFFUSERS = ("attention.to_{}", "attention.to_out.0")
NAMINGS = {                             # prefix, separator, layers (q, k, v and out), tensors
    "kohya": ("lora_unet_", "_", SPLIT, KOHYA),
    "kohya, 22 February 2024": ("lora_unet_", "_", ("attention.attn.to_{}", "attention.attn.to_out"), KOHYA),
    "OneTrainer": ("lora_prior_unet_", "_", SPLIT, KOHYA),
    "OneTrainer, before March 2024": ("lora_prior_unet_", "_", DIFFUSERS, KOHYA),
    "OneTrainer, its bug": ("lora_prior_prior_", "_", DIFFUSERS, KOHYA),
    "OneTrainer, three days": ("lora_prior_unet_", "_", ("attention.attn.to_{}", "attention.attn.to_out_proj"), KOHYA),
    "OneTrainer 2026, Kohya": ("lora_unet_", "_", PARTS, KOHYA),
    "OneTrainer 2026, Diffusers": ("prior.", ".", DIFFUSERS, PEFT[:2]),
    "OneTrainer 2026, Original": ("", ".", PARTS, PEFT), "OneTrainer 2026, Comfy": ("diffusion_model.", ".", PARTS, PEFT),
    "ComfyUI": ("diffusion_model.", ".", SPLIT, ("lora_down", "lora_up", "alpha")),
    "ComfyUI, diffusers' tensors": ("lora_unet_", "_", SPLIT, ("lora.down.weight", "lora.up.weight", "alpha"))}


def write(path, lora, naming):
    prefix, separator, (qkv, out), (down_name, up_name, *alpha_name) = NAMINGS[naming]
    tensors = {}
    for (block, layer), (down, up) in lora.items():
        part = "qkv".index(layer) if "in_proj" in qkv and layer in "qkv" else layer
        name = out if layer == "out" else qkv.format(part)
        key = prefix + f"{block}.{name}".replace(".", separator)
        tensors[f"{key}{'_' if down_name.startswith('lora.') else '.'}{down_name}"] = down
        scale = 1 if alpha_name else ALPHA / RANK       # folded into up
        tensors[f"{key}{'_' if up_name.startswith('lora.') else '.'}{up_name}"] = scale * up
        if alpha_name:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


def expected(folder, lora, strength):
    """Stage C with the LoRA, computed by the definition."""
    network = model.load(folder / "stage_c.safetensors")
    for (block, layer), (down, up) in lora.items():
        attention = network.get_submodule(f"{block}.attention.attn")
        weight = attention.out_proj.weight if layer == "out" else attention.in_proj_weight.chunk(3)["qkv".index(layer)]
        weight += strength * ALPHA / RANK * up @ down
    return network


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_network(folder, tmp_path, naming):
    lora = random_lora()
    file = write(tmp_path / "a.safetensors", lora, naming)
    before = model.load(folder / "stage_c.safetensors").state_dict()
    ours = model.load(folder / "stage_c.safetensors", loras=[(file, 0.7)]).state_dict()
    theirs = expected(folder, lora, 0.7).state_dict()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    assert sum(not torch.equal(ours[name], before[name]) for name in ours) == 2 * len(BLOCKS)


def test_the_originals_numbered_and_fused_layers_give_the_same_network(folder, tmp_path):
    """q, k and v share a rank of 3 r; the scale is 1 / rank."""
    lora, state, tensors = random_lora(), model.load(folder / "stage_c.safetensors").state_dict(), {}
    blocks = [name.split(".attention")[0] for name in state if name.endswith("attention.attn.out_proj.weight")]
    for i, block in enumerate(blocks):
        c = state[f"{block}.attention.attn.out_proj.weight"].shape[0]
        pairs = [lora.get((block, layer), (torch.zeros(RANK, c), torch.zeros(c, RANK))) for layer in ("out", "q", "k", "v")]
        (down, up), *qkv = pairs
        tensors |= {f"weights.{2 * i}.lora_down": down, f"weights.{2 * i}.lora_up": ALPHA * up,
                    f"weights.{2 * i + 1}.lora_down": torch.cat([down for down, _ in qkv]),
                    f"weights.{2 * i + 1}.lora_up": 3 * ALPHA * torch.block_diag(*(up for _, up in qkv))}
    save_file(tensors, tmp_path / "a.safetensors")
    ours = model.load(folder / "stage_c.safetensors", loras=[(tmp_path / "a.safetensors", 1.0)]).state_dict()
    theirs = expected(folder, lora, 1.0).state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


SHAPES = {"lora_te_text_model_encoder_layers_1_mlp_fc1": ((1, 64), (128, 1)), "lora_prior_te_text_projection": ((1, 64), (64, 1)),
          "lora_unet_clf_1": ((1, 64, 1, 1), (16, 1, 1, 1)), "lora_unet_down_blocks_0_0_depthwise": ((1, 1), (64, 1))}
CHANGED = {"stage_c": {"clf.1.weight", "down_blocks.0.0.depthwise.weight"},
           "text_encoder": {"text_model.encoder.layers.1.mlp.fc1.weight", "text_projection.weight"}}


@pytest.mark.parametrize("name", CHANGED)
def test_one_file_changes_both_networks_and_convolutions_and_files_add_up(folder, tmp_path, name):
    """All entries of up @ down are 1, also for each of the nine taps of a convolution."""
    save_file({f"{layer}.lora_{part}.weight": torch.ones(shape) for layer, shapes in SHAPES.items()
               for part, shape in zip(("down", "up"), shapes)}, tmp_path / "a.safetensors")
    twice = [(tmp_path / "a.safetensors", 1.0), (tmp_path / "a.safetensors", 0.5)]
    load = text_encoder.load if name == "text_encoder" else model.load
    before = load(folder / tiny.file_name(name)).state_dict()
    for dtype in torch.float32, torch.bfloat16:
        after = load(folder / tiny.file_name(name), dtype=dtype, loras=twice).state_dict()
        for key in before:
            expected = before[key] + 1.0 + 0.5 if key in CHANGED[name] else before[key]
            assert torch.equal(after[key], expected.to(dtype)), key


# ------------------------------------------------------------------------------ errors
def broken(change):
    """The tensors of a small LoRA, changed."""
    layer = "lora_unet_down_blocks_0_2_kv_mapper_1"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 48), f"{layer}.lora_up.weight": torch.ones(64, 2),
               f"{layer}.alpha": torch.tensor(1.0)}
    change(tensors, layer)
    return tensors


FAULTS = {
    "no such layer": lambda tensors, layer: tensors.update({"lora_unet_input_blocks_1.alpha": torch.ones(1)}),
    "lora_te2_x.alpha": lambda tensors, layer: tensors.update({"lora_te2_x.alpha": torch.ones(1)}),
    "hada_w1": lambda tensors, layer: tensors.update({f"{layer}.hada_w1_a": torch.ones(1)}),
    "expected both": lambda tensors, layer: tensors.pop(f"{layer}.lora_up.weight"),
    "(64, rank)": lambda tensors, layer: tensors.update({f"{layer}.lora_up.weight": torch.ones(65, 2)}),
    "(rank, 48)": lambda tensors, layer: tensors.update({f"{layer}.lora_down.weight": torch.ones(2, 47)}),
    "(2, 0)": lambda tensors, layer: tensors.update({f"{layer}.lora_up.weight": torch.ones(2, 0)}),
    "expected a LoRA for": lambda tensors, layer: tensors.update({f"{layer}.lora_up.weight": torch.tensor(1.0)}),
    "one alpha": lambda tensors, layer: tensors.update({f"{layer}.alpha": torch.ones(2)}),
    "I8": lambda tensors, layer: tensors.update({f"{layer}.lora_up.weight": torch.ones(64, 2).char()}),
    "not finite": lambda tensors, layer: tensors.update({f"{layer}.alpha": torch.tensor(torch.inf)}),
    "expected a LoRA, got no tensors": lambda tensors, layer: tensors.clear()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_lora_file_is_refused_by_name(place, folder, fault):
    save_file(broken(FAULTS[fault]), "wrong.safetensors")
    refused(["a star", "--lora", "wrong.safetensors:0.5", *FEW, "--weights", folder], "wrong.safetensors", fault)


@pytest.mark.parametrize("option, text", [
    ("--lora nowhere.safetensors", "nowhere.safetensors: there is no such file"), ("--lora a.png", "a.png: expected"),
    ("--lora a.png:nan", "lora_strength: expected"), ("--lora a.png:inf", "lora_strength: expected"),
    ("--lora a.png:1:x", "a.png:1:x: there is no such file"), ("--lora=", "loras: expected"), ("--token x", "--token: expected"),
    ("--token [x]=red", "tokens: the LoRA files have 0"),
    ("--reconstruct a.png --lora a.png", "--lora: not used")])
def test_wrong_options_are_refused_by_name(place, folder, option, text):
    prompt = [] if "--reconstruct" in option else ["a star"]
    refused([*prompt, *option.split(), *(FEW if prompt else FEW[2:]), "--weights", folder], text)


@pytest.mark.parametrize("name, value", [
    *(("loras", value) for value in (None, "a", [3], [("a",)], [("a", "b")], [("a", True)], [(None, 1.0)])),
    *(("tokens", value) for value in (3, ["[x]"], {"[x]": 3}, {"": "dog"}, {"[x]": " "}, {"\ud800": "dog"}))])
def test_wrong_arguments_are_refused(folder, name, value):
    with pytest.raises(CascadeError, match="lora|tokens"):
        Cascade(folder, **{name: value})


def test_other_networks_take_no_lora(folder):
    with pytest.raises(CascadeError, match="a stage_b takes no LoRA"):
        model.load(folder / "stage_b.safetensors", loras=[("a.safetensors", 1.0)])


# ------------------------------------------------------------------------------ new tokens
def write_tokens(path, indices=(520,), width=64):
    save_file({"embeddings.embeddings": torch.ones(len(indices), width), "embeddings.indices": torch.tensor(indices)}, path)


def test_a_new_token_starts_from_its_word_and_is_read_whole(folder, tmp_path):
    write_tokens(tmp_path / "a.safetensors", (521, 4, 520))
    tokens = {"[one]": "red", "<two>": "circle"}
    prompts = ["a red star", "a red circle", "a [One] star", "a[one]<two>"]
    plain = Cascade(folder).encode_prompt(prompts[:2])
    zero = Cascade(folder, loras=[(tmp_path / "a.safetensors", 0.0)], tokens=tokens).encode_prompt(prompts)
    assert torch.allclose(zero.hidden[:2], plain.hidden[:2], atol=1e-5)
    assert torch.allclose(zero.hidden[0, :4], zero.hidden[2, :4], atol=1e-5)        # red is one token
    full = Cascade(folder, loras=[(tmp_path / "a.safetensors", 1.0)], tokens=tokens)
    assert (full.encode_prompt(prompts).hidden[2] - zero.hidden[2]).abs().max() > 1e-2
    table = full.network("text_encoder").text_model.embeddings.token_embedding.weight
    before = Cascade(folder).network("text_encoder").text_model.embeddings.token_embedding.weight
    ids = text_encoder.read_tokenizer(folder / "tokenizer").encode("circle", add_special_tokens=False).ids
    assert torch.allclose(table[521], before[ids].mean(0) + 1) and torch.equal(table[4], before[4] + 1)
    assert torch.equal(table[5], before[5]) and len(ids) > 1


def test_a_token_of_the_vocabulary_is_not_new(folder):
    with pytest.raises(CascadeError, match="'red</w>' is in the vocabulary already"):
        text_encoder.Tokenizer(folder / "tokenizer", tokens=["red</w>"])


@pytest.mark.parametrize("indices, width, text", [
    ((520,), 64, "--token '[new]=word'"), ((520,), 63, "expected embeddings"), ((-1,), 64, "expected embeddings"),
    ((0.5,), 64, "expected embeddings")])
def test_tokens_that_do_not_fit_are_refused(place, folder, indices, width, text):
    write_tokens("a.safetensors", indices, width)
    refused(["a star", "--lora", "a.safetensors", *FEW, "--weights", folder], "a.safetensors: ", text)


def test_the_record_holds_loras_and_tokens_and_latents_need_them_again(place, folder):
    write_tokens("t.safetensors")
    write("a.safetensors", random_lora(), "kohya")
    options = ["--lora", "t.safetensors", "--lora", "a.safetensors:0.25", "--token", "[x]=red"]
    command("a [x] star", *options, *FEW, "--weights", folder, "-o", "whole.png")
    texts = Image.open("whole.png").text
    assert texts["lora"] == "[['t.safetensors', 1.0], ['a.safetensors', 0.25]]" and texts["token"] == "[['[x]', 'red']]"
    command("a [x] star", *options, *FEW[:2], *FEW[4:], "--weights", folder, "-o", "half.safetensors")
    decode = ["--latents", "half.safetensors", "--decoder-steps", 1, "--weights", folder]
    command(*decode, *options, "-o", "half.png")
    assert Path("half.png").read_bytes() == Path("whole.png").read_bytes()
    refused([*decode, "-o", "c.png"], "half.safetensors", "t.safetensors")
