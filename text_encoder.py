"""CLIP: the tokenizer and the text tower (OpenCLIP ViT-bigG/14: 32 layers, D = 1280), which read prompts for Stable
Cascade, and the image tower (OpenAI ViT-L/14: 24 layers, D = 1024), which looks at pictures for it. One kind of layer
makes both towers.

    ids, mask = Tokenizer(folder)(["a red circle"])         (B, 77), (B, 77)
    hidden, pooled = load(file)(ids, mask)                  (B, 77, D), (B, 1, D)
    embedding = load(file)(pixels)                          (B, E)

Module names are those of the official files text_encoder/model.safetensors and image_encoder/model.safetensors, so they
load strictly.

Letters: B batch, L tokens (77 of a text, 257 of a picture), D width, S the side of what the image tower sees (224),
E the width of the embedding that it gives (768).

Sources: Radford et al., CLIP (2021), arXiv 2103.00020; the files of stabilityai/stable-cascade and -prior.
"""
import json
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BytePairTokenizer
from torch import nn

import model
from model import HEAD_WIDTH, CascadeError, attention

LENGTH = 77                                             # tokens of a prompt, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"


# ------------------------------------------------------------------------------------------------ the tokenizer

def build_tokenizer(vocab, merges):
    """CLIP's byte-level BPE from its two files; a tokenizer.json says the same."""
    lines = [line for line in merges.read_text("utf-8").splitlines() if line and not line.startswith("#version")]
    pairs, words = [tuple(line.split()) for line in lines], json.loads(vocab.read_text("utf-8"))
    tokenizer = BytePairTokenizer(models.BPE(words, pairs, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, words[END]), (START, words[START]),
                                                            trim_offsets=False, add_prefix_space=False)
    return tokenizer


class Tokenizer:
    """Prompts -> ids and mask, both (B, L) int64, where L = length is what the text tower takes, officially 77. Reads
    tokenizer.json or, without one, vocab.json and merges.txt."""
    def __init__(self, folder, length=LENGTH):
        folder = Path(folder)
        whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        if not whole.exists() and not (vocab.exists() and merges.exists()):
            raise CascadeError(f"{folder}: no tokenizer here; wanted is tokenizer.json, or vocab.json and merges.txt")
        try:
            self.bpe = BytePairTokenizer.from_file(str(whole)) if whole.exists() else build_tokenizer(vocab, merges)
        except Exception as error:                      # the library raises bare Exceptions
            reason = " ".join(str(error).split())
            raise CascadeError(f"{folder}: the tokenizer's files cannot be read ({reason})") from None
        self.end = self.bpe.token_to_id(END)
        if self.end is None:
            raise CascadeError(f"{folder}: not CLIP's tokenizer, it has no {END}")
        self.bpe.enable_truncation(length)
        self.bpe.enable_padding(length=length, pad_id=self.end, pad_token=END)

    def __call__(self, prompts):
        """Start, the prompt's tokens, end, then as many ends again as fill the row; the mask is 1 up to the first end.
        What does not fit is cut, with a warning that says what."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = self.bpe.encode_batch(prompts)
        for prompt, row in zip(prompts, rows):
            if row.overflowing:
                cut = prompt[row.overflowing[0].offsets[1][0]:]                 # from the first token after start
                warnings.warn(f"a prompt is cut to {len(row)} tokens, its end is not read: {cut!r}", stacklevel=2)
        ids, mask = [row.ids for row in rows], [row.attention_mask for row in rows]
        return torch.tensor(ids), torch.tensor(mask)                                        # each (B, L)


# ------------------------------------------------------------------------------------------------ both towers' layer

ACTS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (project(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))                  # each (B, D/64, L, 64)
        y = attention(q, k, v, mask)                                                        # softmax(q k' / 8 + mask) v
        return self.out_proj(y.transpose(1, 2).flatten(2))                                  # (B, L, D)


class Layer(nn.Module):
    """Pre-LN transformer layer."""
    def __init__(self, width, hidden, act):
        super().__init__()
        self.self_attn, self.act = SelfAttention(width), ACTS[act]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)                                   # (B, L, D)
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


# ------------------------------------------------------------------------------------------------ the text tower

@dataclass(frozen=True)
class TextConfig:
    vocabulary: int = 49408
    length: int = LENGTH
    width: int = 1280
    layers: int = 32
    hidden: int = 5120                                  # of the MLPs
    projection: int = 1280
    act: str = "gelu"                                   # or quick_gelu
    end: int = 49407                                    # id of the end token


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(config.vocabulary, width),
                                         "position_embedding": nn.Embedding(config.length, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                Layer(width, config.hidden, config.act) for _ in range(config.layers))}),
            "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, ids, mask):
        """What Tokenizer gives, ids and mask, each (B, L) -> hidden (B, L, D) and pooled (B, 1, D).

        hidden    the last layer's output, before the final norm: every row is used, pads too
        pooled    the projection of the row of the first end token, after the norm
        """
        tower, L = self.text_model, ids.shape[1]
        x = tower.embeddings.token_embedding(ids) + tower.embeddings.position_embedding.weight[:L]  # (B, L, D)
        causal = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()                     # (L, L)
        visible = causal & mask.bool()[:, None, None, :]                                          # (B, 1, L, L)
        bias = torch.where(visible, 0.0, -math.inf).to(x.dtype)                                   # (B, 1, L, L)
        for layer in tower.encoder.layers:
            x = layer(x, bias)
        first_end = (ids == self.config.end).int().argmax(dim=1)                                  # (B,)
        row = x[torch.arange(x.shape[0], device=x.device), first_end]                             # (B, D)
        return x, self.text_projection(tower.final_layer_norm(row)).unsqueeze(1)                  # (B, L, D), (B, 1, D)


# ------------------------------------------------------------------------------------------------ the image tower

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    side: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    hidden: int = 4096                                  # of the MLPs
    projection: int = 768
    act: str = "quick_gelu"


class ImageEncoder(nn.Module):
    """Vision transformer: a token for every patch of the picture, and before them one of its own that sums it up."""
    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        width, tokens = config.width, 1 + (config.side // config.patch) ** 2
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False),
                "position_embedding": nn.Embedding(tokens, width)}),
            "pre_layrnorm": nn.LayerNorm(width),                                            # spelt so in the files
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                Layer(width, config.hidden, config.act) for _ in range(config.layers))}),
            "post_layernorm": nn.LayerNorm(width)})
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, pixels):
        """(B, 3, S, S) in [0, 1], as `fit` gives them -> the picture's embedding (B, E)."""
        tower, embeddings = self.vision_model, self.vision_model.embeddings
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        x = embeddings.patch_embedding((pixels - mean) / std).flatten(2).transpose(1, 2)    # (B, L - 1, D), row by row
        x = torch.cat([embeddings.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)     # (B, L, D)
        x = tower.pre_layrnorm(x + embeddings.position_embedding.weight)
        for layer in tower.encoder.layers:
            x = layer(x)
        return self.visual_projection(tower.post_layernorm(x[:, 0]))                        # (B, E)


def fit(picture, side):
    """An RGB picture of pillow's -> (3, S, S) in [0, 1]: the short side resized to S, bicubic, the middle cut out."""
    width, height = (side * pixels // min(picture.size) for pixels in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255                       # (3, S, S)


# ------------------------------------------------------------------------------------------------ reading files

def text_config(shapes):
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    length, said = shapes["text_model.embeddings.position_embedding.weight"][0], shapes.config()
    mlps = shapes.each("text_model.encoder.layers.{}.mlp.fc1.weight")
    end = said.get("eos_token_id", 2)                                   # old configs say 2 and mean the last row
    return TextConfig(vocabulary, length, width, len(mlps), mlps[0][0], shapes["text_projection.weight"][0],
                      said.get("hidden_act", TextConfig.act), vocabulary - 1 if end == 2 else end)


def image_config(shapes):
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    tokens = shapes["vision_model.embeddings.position_embedding.weight"][0]
    mlps = shapes.each("vision_model.encoder.layers.{}.mlp.fc1.weight")
    return ImageConfig(patch * math.isqrt(tokens - 1), patch, width, len(mlps), mlps[0][0],
                       shapes["visual_projection.weight"][0], shapes.config().get("hidden_act", ImageConfig.act))


TOWERS = {"text_encoder": ("text_model.embeddings.token_embedding.weight", TextEncoder, text_config),
          "image_encoder": ("vision_model.embeddings.class_embedding", ImageEncoder, image_config)}


# Opens a tower's file, as model.load does the others. A config.json beside it says the activation and the end token;
# without one these are the official ones and the last row.
load = partial(model.load, networks=TOWERS)
