"""Tiny networks in which every parameter is random, and whole weights folders made of them, for the tests."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import text_encoder
from model import (ControlNet, ControlNetConfig, Previewer, PreviewerConfig, SemanticEncoder, SemanticEncoderConfig, StageA,
                   StageAConfig, UNet, UNetConfig)
from text_encoder import ImageConfig, ImageEncoder, TextConfig, TextEncoder

# Every kind of block, repeats on both ways, several levels: all that the official files have.
STAGE_C = UNetConfig(
    widths=(64, 128), down=("RTA", "RTARTA"), up=("RTARTA", "RTA"), down_repeat=(1, 2), c_cond=48,
    up_repeat=(1, 2), latent_channels=16, patch_size=1, time_conditions=("sca", "crp"), text_dim=64,
    image_dim=24)
STAGE_B = UNetConfig(
    widths=(32, 64, 64), down=("RT", "RTRT", "RTA"), up=("RTARTA", "RT", "RTRT"), c_cond=48,
    down_repeat=(1, 1, 1), up_repeat=(3, 2, 1), latent_channels=4, patch_size=2, text_dim=64,
    time_conditions=("sca",), semantic_channels=16)
STAGE_A = StageAConfig(widths=(16, 32), deep_blocks=3, codes=24)
TEXT = TextConfig(vocabulary=520, width=64, layers=3, hidden=128, projection=64, end=519)
IMAGE = ImageConfig(side=30, patch=6, width=64, layers=3, hidden=128, projection=24)
ENCODER = SemanticEncoderConfig(stem=8, head=40, stages=(
    (True, 1, 8, 2), (True, 4, 16, 2), (True, 4, 16, 1),
    (False, 4, 24, 2), (False, 6, 24, 2), (False, 6, 32, 1)))
MERGES = ("r e", "re d</w>", "a r", "c i", "ci r", "l e</w>")
PREVIEWER = PreviewerConfig(widths=(32, 24, 16, 16))
NETWORKS = {
    "stage_c": (UNet, STAGE_C), "stage_b": (UNet, STAGE_B), "stage_a": (StageA, STAGE_A),
    "effnet_encoder": (SemanticEncoder, ENCODER), "previewer": (Previewer, PREVIEWER),
    "text_encoder": (TextEncoder, TEXT), "image_encoder": (ImageEncoder, IMAGE)}
CONTROL = {"features": 40, "blocks": (0, 7, 8), "unet_width": 64}  # the first and the last two residual blocks
CONTROLNETS = {
    "canny": ControlNetConfig(1, ENCODER, **CONTROL), "inpainting": ControlNetConfig(4, ENCODER, **CONTROL),
    "super_resolution": ControlNetConfig(16, None, (24, 16), 2, **CONTROL)}


@torch.no_grad()
def randomise(network, seed):
    """Makes every parameter and statistic random, at a scale that keeps the size of the signal."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        layer, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            tensor.fill_(7)
        elif kind == "running_var":
            tensor.copy_(0.5 + noise.abs())
        elif tensor.dim() < 2 or tensor.shape[:3] == (1, 1, 1):  # biases, norms, GRN, Stage A's scalars
            is_norm = "norm" in name or f"{layer}.running_var" in state
            tensor.copy_(0.3 * noise + (1 if is_norm and kind == "weight" else 0))
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return network.eval().requires_grad_(False)


def networks(seed=0):
    """All tiny networks by name, with weights drawn from the seed."""
    made = {name: randomise(network_class(config), 100 * seed + i)
            for i, (name, (network_class, config)) in enumerate(NETWORKS.items())}
    first, last = made["stage_a"].up_blocks[0][0], made["stage_a"].out_block[0]
    first.weight.mul_(0.02)  # the latents of random UNets are in the dozens
    last.weight.mul_(0.15)  # and most pixels should lie within [0, 1]
    last.bias.copy_(0.5 + 0.1 * last.bias)
    return made


def file_name(name):
    """The path of a network's original file within a weights folder."""
    return f"{name}/model.safetensors" if name in text_encoder.NETWORKS else f"{name}.safetensors"


def save(state, path, dtype=torch.float32, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype if tensor.is_floating_point() else None).contiguous()
               for name, tensor in state.items()}, path, metadata)


def write_tokenizer(folder, letters=sorted(pre_tokenizers.ByteLevel.alphabet()), merges=MERGES):
    """CLIP's layout: 256 bytes, the same at the end of a word, merges, start and end: here 520 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [*(pair.replace(" ", "") for pair in merges), text_encoder.START, text_encoder.END]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tokens


def write_folder(folder, seed=0, dtype=torch.float32):
    """A weights folder of original files; the Stage C file asks for 128 x 128 pixels."""
    folder = Path(folder)
    write_tokenizer(folder / "tokenizer")
    for name, network in networks(seed).items():
        metadata = {"width": "128", "height": "128"} if name == "stage_c" else None
        save(network.state_dict(), folder / file_name(name), dtype, metadata)
    for kind, config in CONTROLNETS.items():
        network, metadata = randomise(ControlNet(config), 0), {"blocks": json.dumps(config.blocks)}
        save(network.state_dict(), folder / file_name(f"controlnet/{kind}"), dtype, metadata)
    return folder


def split_attention(state):
    """Query, key and value apart, as diffusers and ComfyUI save them."""
    tensors = {}
    for name, tensor in state.items():
        pieces = tensor.chunk(3) if ".in_proj_" in name else [tensor]
        for part, piece in zip("qkv", pieces):
            tensors[name.replace(".in_proj_", f".to_{part}.")] = piece.clone()
    return tensors


def to_diffusers(state):
    """The tensors of an original UNet or Stage A file, named and split as in diffusers' files."""
    renamed = {}
    for name, tensor in split_attention(state).items():
        name = name.replace(".attn.out_proj.", ".to_out.0.").replace(".attn.to_", ".to_")
        name = name.replace(".codebook.", ".embedding.")
        renamed[name.replace("clip_mapper.", "clip_txt_pooled_mapper.")] = tensor
    return renamed


def write_diffusers_folder(folder, original):
    """The weights of a folder of original files, in the diffusers layout."""
    folder, original = Path(folder), Path(original)
    for place, name in (("prior", "stage_c"), ("decoder", "stage_b"), ("vqgan", "stage_a")):
        state = to_diffusers(load_file(original / file_name(name)))
        save(state, folder / place / "diffusion_pytorch_model.safetensors")
    (folder / "vqgan" / "config.json").write_text(json.dumps({"scale_factor": 0.43}))
    save(load_file(original / file_name("text_encoder")), folder / file_name("text_encoder"))
    write_tokenizer(folder / "tokenizer")
    return folder


def weight_sum(network):
    """Tells one set of random weights from another."""
    return sum(tensor.double().abs().sum() for tensor in network.state_dict().values())
