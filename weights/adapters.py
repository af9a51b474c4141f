"""What finetune.py adds to a cascade to train it: LoRAs, new tokens, a ControlNet and its hints.

A finished LoRA file needs none of this: model.load merges it into the weights.
"""
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from cascade import CONTROLS, canny_hint
from model import ControlNet, ControlNetConfig, require
from text_encoder import Tokenizer


# ---- LoRA --------------------------------------------------------------------------------------------

class LoraWeight(nn.Module):
    """W + up down / rank (Hu et al., 2021). As in the original code, `up` starts at random and `down` at zero; in the
    paper it is the other way round."""
    def __init__(self, weight, rank):
        super().__init__()
        self.enabled = True
        where = {"device": weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.zeros(rank, weight[0].numel(), **where))
        self.up = nn.Parameter(torch.randn(len(weight), rank, **where))

    def forward(self, weight):
        if not self.enabled:
            return weight
        change = self.up @ self.down / len(self.down)
        return weight + change.view_as(weight).to(weight.dtype)


def add_lora(unet, rank, layers, fixed=()):
    """Adds a LoraWeight to every linear layer and 1x1 convolution whose path contains one of the strings in `layers`
    -> {name of the layer in LoRA files: LoraWeight}. fixed: {layer: numbers of the rows that must not change}."""
    added = {}
    for path, layer in list(unet.named_modules()):
        name = "in_proj_weight" if hasattr(layer, "in_proj_weight") else "weight"
        weight = getattr(layer, name, None)
        is_matrix = weight is not None and weight.dim() > 1 and weight[0].numel() == weight.shape[1]
        if is_matrix and any(text in path for text in layers):
            lora = LoraWeight(weight, rank)
            if layer in fixed:
                mask = torch.ones_like(lora.up).index_fill_(0, fixed[layer], 0)
                lora.up.data *= mask
                lora.up.register_hook(lambda gradient, mask=mask: gradient * mask)
            parametrize.register_parametrization(layer, name, lora)
            added[path.replace(".", "_")] = lora
    require(added, f"--layers: no layer has {' or '.join(layers)} in its path")
    return added


@contextmanager
def disabled(added):
    """Switches the LoRA off inside a `with` block."""
    for lora in added.values():
        lora.enabled = False
    yield
    for lora in added.values():
        lora.enabled = True


def lora_tensors(added, stage):
    """The tensors of a LoRA file, in the names that OneTrainer writes and ComfyUI reads: q, k and v apart, alpha 1."""
    prefix = {"c": "lora_prior_unet_", "b": "lora_decoder_unet_"}[stage]
    tensors = {}
    for name, lora in added.items():
        ups = {name: lora.up}
        if name.endswith("attention_attn"):
            ups = dict(zip((f"{name}_to_q", f"{name}_to_k", f"{name}_to_v"), lora.up.chunk(3)))
        for name, up in ups.items():
            tensors[f"{prefix}{name}.lora_down.weight"] = lora.down.detach().clone()
            tensors[f"{prefix}{name}.lora_up.weight"] = up.detach().clone()
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(1.0)
    return tensors


# ---- new tokens --------------------------------------------------------------------------------------

class NewTokens(nn.Module):
    """The token embeddings with new rows appended: each is the mean of its word's rows plus a learned change."""
    def __init__(self, table, words):
        super().__init__()
        self.ids = len(table) + torch.arange(len(words))
        self.register_buffer("start", torch.stack([table[ids].mean(0) for ids in words]))   # (n, D)
        self.change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, table):
        return torch.cat([table, self.start + self.change])


def add_tokens(cascade, tokens):
    """Gives the cascade new tokens, [(token, word)] -> its tokenizer, its text encoder and their NewTokens."""
    encoder = cascade.network("text_encoder")
    names = [name for name, _ in tokens]
    tokenizer = Tokenizer(cascade.folder / "tokenizer", encoder.config.length, names)
    cascade.kept["tokenizer"] = tokenizer
    words = [tokenizer.bpe.encode(word, add_special_tokens=False).ids for _, word in tokens]
    embedding = encoder.text_model.embeddings.token_embedding
    new_tokens = NewTokens(embedding.weight, words)
    parametrize.register_parametrization(embedding, "weight", new_tokens, unsafe=True)  # the shape changes
    encoder.config = replace(encoder.config, vocabulary=encoder.config.vocabulary + len(words))
    return tokenizer, encoder, new_tokens


# ---- ControlNet --------------------------------------------------------------------------------------

def new_controlnet(options, cascade, widths):
    """A ControlNet without effect, as its last layers are zero. Its backbone starts from the semantic encoder, with the
    first layer cut or zero-padded to the hint's channels; for super-resolution it starts at random."""
    blocks = tuple(options.blocks)
    fits = all(0 <= block < len(widths) for block in blocks)
    require(fits, f"--blocks: expected numbers from 0 to {len(widths) - 1}, got {blocks}")
    channels = CONTROLS[options.kind]
    if options.kind == "super_resolution":
        controlnet = ControlNet(ControlNetConfig(channels, blocks=blocks, unet_width=widths[blocks[0]]))
    else:
        encoder = cascade.network("effnet_encoder")
        controlnet = ControlNet(ControlNetConfig(
            channels, encoder.config, features=encoder.config.head, blocks=blocks, unet_width=widths[blocks[0]]))
        backbone = encoder.backbone.state_dict()
        stem = torch.zeros_like(controlnet.backbone[0][0].weight)
        stem[:, :3] = backbone["0.0.weight"][:, :channels]
        controlnet.backbone.load_state_dict(backbone | {"0.0.weight": stem})
    for projection in controlnet.projections:
        nn.init.zeros_(projection[2].weight)
    return controlnet.to(cascade.device).eval()


def make_hint(kind, cascade, pixels):
    """Pixels (1, 3, H, W) -> what a ControlNet sees of them; for inpainting still without a mask."""
    if kind == "canny":
        return canny_hint(pixels)                                                       # (1, 1, H, W)
    if kind == "inpainting":
        return pixels
    latent = cascade.encode_pixels(F.interpolate(pixels, scale_factor=0.5))
    return F.interpolate(latent, scale_factor=2)                                        # (1, 16, Hc, Wc)


def mask_pixels(image):
    """An image (3, H, W), white in a random rectangle or, 2 of 5 times, outside it; and the mask: (4, H, W)."""
    mask = torch.zeros_like(image[:1])                                                  # (1, H, W)
    corners = torch.rand(2, 2).sort(dim=0).values * torch.tensor(mask.shape[1:])        # ((top, left), …)
    (top, left), (bottom, right) = corners.int().tolist()
    mask[:, top:bottom + 1, left:right + 1] = 1
    if torch.rand(()) < 0.4:
        mask = 1 - mask
    return torch.cat([image.maximum(mask), mask])
