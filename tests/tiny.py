"""Tiny networks with every parameter random, and whole weights folders made of them, for the tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from model import (
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
    SemanticEncoderConfig,
    StageA,
    StageAConfig,
    UNet,
    UNetConfig,
)
from text_encoder import ImageConfig, ImageEncoder, TextConfig, TextEncoder

# Every kind of block, repeats on both ways, several levels: all that the official files have.
STAGE_C = UNetConfig(
    widths=(64, 128),
    down=("RTA", "RTARTA"),
    up=("RTARTA", "RTA"),
    down_repeat=(1, 2),
    up_repeat=(1, 2),
    c_cond=48,
    latent=16,
    patch=1,
    extras=("sca", "crp"),
    text=64,
    image=24,
    switch=(False,),
)
STAGE_B = UNetConfig(
    widths=(32, 64, 64),
    down=("RT", "RTRT", "RTA"),
    up=("RTARTA", "RT", "RTRT"),
    down_repeat=(1, 1, 1),
    up_repeat=(3, 2, 1),
    c_cond=48,
    latent=4,
    patch=2,
    extras=("sca",),
    text=64,
    semantic=16,
)
STAGE_A = StageAConfig(widths=(16, 32), deep_blocks=3, codes=24)
TEXT = TextConfig(vocabulary=520, width=64, layers=3, hidden=128, projection=64, end=519)
IMAGE = ImageConfig(side=30, patch=6, width=64, layers=3, hidden=128, projection=24)
ENCODER = SemanticEncoderConfig(
    stem=8,
    stages=(
        (True, 1, 8, 2),
        (True, 4, 16, 2),
        (True, 4, 16, 1),
        (False, 4, 24, 2),
        (False, 6, 24, 2),
        (False, 6, 32, 1),
    ),
    head=40,
)
PREVIEWER = PreviewerConfig(widths=(32, 24, 16, 16))


@torch.no_grad()
def randomise(network, seed):
    """Every parameter and statistic random, at a scale that keeps the signal about as large as it was."""
    source = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=source)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.dim() < 2 or tensor.shape[:3] == (1, 1, 1):  # biases, norms, GRN, Stage A's scalars
            is_scale = (
                "norm" in name
                and name.endswith("weight")
                or f"{name.removesuffix('weight')}running_var" in (network.state_dict())
            )
            tensor.copy_(0.3 * noise + (1 if is_scale and name.endswith("weight") else 0))
        else:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return network.eval().requires_grad_(False)


def networks(seed=0):
    """name -> network, the folder's files in the original layout."""
    made = {
        "stage_c": UNet(STAGE_C),
        "stage_b": UNet(STAGE_B),
        "stage_a": StageA(STAGE_A),
        "effnet_encoder": SemanticEncoder(ENCODER),
        "previewer": Previewer(PREVIEWER),
        "text_encoder/model": TextEncoder(TEXT),
        "image_encoder/model": ImageEncoder(IMAGE),
    }
    for i, network in enumerate(made.values()):
        randomise(network, 100 * seed + i)
    enter, leave = made["stage_a"].up_blocks[0][0], made["stage_a"].out_block[0]
    enter.weight.mul_(0.02)  # random UNets make latents of some dozens
    leave.weight.mul_(0.15), leave.bias.copy_(0.5 + 0.1 * leave.bias)  # and pictures should lie within [0, 1]
    return made


def write_tokenizer(folder):
    """CLIP's layout: 256 bytes, the same at a word's end, six merges, start, end: 520 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("a", "r"), ("c", "i"), ("ci", "r"), ("l", "e</w>")]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def write_folder(folder, seed=0, dtype=torch.float32):
    """A weights folder of original single files; the Stage C file says 128 x 128."""
    folder = Path(folder)
    write_tokenizer(folder / "tokenizer")
    for name, network in networks(seed).items():
        save(
            network.state_dict(),
            folder / f"{name}.safetensors",
            dtype,
            {"width": "128", "height": "128"} if name == "stage_c" else None,
        )
    return folder


def save(state, path, dtype=torch.float32, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: (value.to(dtype) if value.is_floating_point() else value).contiguous() for name, value in state.items()},
        path,
        metadata,
    )


def to_diffusers(state):
    """Tensors of an original UNet or Stage A file, named and split as diffusers has them."""
    renamed = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            stem, kind = name.split(".attn.in_proj_")
            for part, piece in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                renamed[f"{stem}.{part}.{kind}"] = piece.clone()
        else:
            name = name.replace(".attn.out_proj.", ".to_out.0.").replace(
                "vquantizer.codebook.", "vquantizer.embedding."
            )
            renamed["clip_txt_pooled_mapper." + name.split(".")[1] if name.startswith("clip_mapper.") else name] = (
                tensor
            )
    return renamed


def write_diffusers_folder(folder, original):
    """The same weights as a folder of original files, in the diffusers layout."""
    from safetensors.torch import load_file

    folder, original = Path(folder), Path(original)
    for place, name in (("prior", "stage_c"), ("decoder", "stage_b"), ("vqgan", "stage_a")):
        save(
            to_diffusers(load_file(original / f"{name}.safetensors")),
            folder / place / "diffusion_pytorch_model.safetensors",
        )
    (folder / "vqgan" / "config.json").write_text(json.dumps({"scale_factor": 0.43}))
    save(load_file(original / "text_encoder" / "model.safetensors"), folder / "text_encoder" / "model.safetensors")
    write_tokenizer(folder / "tokenizer")
    return folder


def weight_sum(network):
    """Tells one draw of the weights from another."""
    return sum(tensor.double().abs().sum() for tensor in network.state_dict().values())
