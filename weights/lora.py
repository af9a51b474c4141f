"""LoRA while it is trained: low-rank changes of a frozen network's weights, and new tokens for a text encoder.

To use finished LoRA files nothing of this is needed: model.load merges them into the weights.
"""
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from model import require
from text_encoder import Tokenizer


class LoraWeight(nn.Module):
    """W + up down / rank (Hu et al., 2021). As in the original, `up` starts at random and `down` at 0."""
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


def add_lora(unet, rank, layers):
    """Adds a LoraWeight to every linear layer and 1x1 convolution with one of the texts `layers` in its path
    -> {name of the layer in LoRA files: LoraWeight}."""
    added = {}
    for path, layer in list(unet.named_modules()):
        name = "in_proj_weight" if hasattr(layer, "in_proj_weight") else "weight"
        weight = getattr(layer, name, None)
        is_matrix = weight is not None and weight.dim() > 1 and weight[0].numel() == weight.shape[1]
        if is_matrix and any(text in path for text in layers):
            lora = LoraWeight(weight, rank)
            parametrize.register_parametrization(layer, name, lora)
            added[path.replace(".", "_")] = lora
    require(added, f"--layers: no layer has {' or '.join(layers)} in its path")
    return added


@contextmanager
def disabled(added):
    """The network without its LoRA, for a while."""
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


class NewTokens(nn.Module):
    """The table of token embeddings with more rows, each the mean of a word's rows and what is learned."""
    def __init__(self, table, words):
        super().__init__()
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
    parametrize.register_parametrization(embedding, "weight", new_tokens, unsafe=True)  # it changes the shape
    return tokenizer, encoder, new_tokens
