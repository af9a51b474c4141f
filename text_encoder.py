"""The text side of Stable Cascade: CLIP's tokenizer and its text tower (OpenCLIP ViT-bigG/14: 32 layers, D = 1280).

    ids, mask = Tokenizer(folder)(["a red circle"])         (B, 77), (B, 77)
    hidden, pooled = load(folder_or_file)(ids, mask)        (B, 77, D), (B, 1, D)

Module names are those of the official file text_encoder/model.safetensors, so it loads strictly.

Letters: B batch, L tokens (77), D width.

Sources: Radford et al., CLIP (2021), arXiv 2103.00020; the files of stabilityai/stable-cascade.
"""
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BytePairTokenizer
from torch import nn

import model
from model import HEAD_WIDTH, CascadeError

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
    """Prompts -> ids and mask, both (B, 77) int64. Reads tokenizer.json or, without one, vocab.json and merges.txt."""
    def __init__(self, folder):
        folder = Path(folder)
        whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        if not whole.exists() and not (vocab.exists() and merges.exists()):
            raise CascadeError(f"{folder}: no tokenizer here; wanted is tokenizer.json, or vocab.json and merges.txt")
        try:
            self.bpe = BytePairTokenizer.from_file(str(whole)) if whole.exists() else build_tokenizer(vocab, merges)
        except Exception as error:                      # the library raises bare Exceptions
            reason = " ".join(str(error).split())
            raise CascadeError(f"{folder}: the tokenizer's files cannot be read ({reason})") from None
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.end = self.bpe.token_to_id(END)
        if self.end is None:
            raise CascadeError(f"{folder}: not CLIP's tokenizer, it has no {END}")

    def __call__(self, prompts):
        """Start, the prompt's tokens, end, then as many ends again as fill the 77; the mask is 1 up to the first end.
        What does not fit is cut, with a warning that says what."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows, masks = [], []
        for prompt, encoding in zip(prompts, self.bpe.encode_batch(prompts)):
            ids = encoding.ids                          # start ... end
            if len(ids) > LENGTH:
                cut = prompt[encoding.offsets[LENGTH - 1][0]:]
                warnings.warn(f"a prompt is cut to {LENGTH} tokens, its end is not read: {cut!r}", stacklevel=2)
                ids = ids[:LENGTH - 1] + [self.end]
            rows.append(ids + [self.end] * (LENGTH - len(ids)))
            masks.append([1] * len(ids) + [0] * (LENGTH - len(ids)))
        return torch.tensor(rows), torch.tensor(masks)


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


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask):
        q, k, v = (project(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))                  # each (B, D/64, L, 64)
        y = F.scaled_dot_product_attention(q, k, v, mask)                                   # softmax(q k' / 8 + mask) v
        return self.out_proj(y.transpose(1, 2).flatten(2))                                  # (B, L, D)


class Layer(nn.Module):
    """Pre-LN transformer layer."""
    def __init__(self, width, hidden, act):
        super().__init__()
        self.self_attn, self.act = SelfAttention(width), ACTS[act]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x, mask):
        x = x + self.self_attn(self.layer_norm1(x), mask)                                   # (B, L, D)
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


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
        """ids, mask (B, L): what Tokenizer gives.

        hidden    (B, L, D), the last layer's output, before the final norm: every row is used, pads too
        pooled    (B, 1, D), the projection of the row of the first end token, after the norm
        """
        tower, L = self.text_model, ids.shape[1]
        x = tower.embeddings.token_embedding(ids) + tower.embeddings.position_embedding.weight[:L]     # (B, L, D)
        causal = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()                          # (L, L)
        visible = causal & mask.bool()[:, None, None, :]                                               # (B, 1, L, L)
        for layer in tower.encoder.layers:
            x = layer(x, visible)
        first_end = (ids == self.config.end).int().argmax(dim=1)                                       # (B,)
        row = x[torch.arange(len(x), device=x.device), first_end]                                      # (B, D)
        return x, self.text_projection(tower.final_layer_norm(row)).unsqueeze(1)


def text_config(shapes):
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    told = shapes.config()
    act, end = told.get("hidden_act", TextConfig.act), told.get("eos_token_id", 2)
    if act not in ACTS:
        raise CascadeError(f"{shapes.path}: config.json says hidden_act {act!r}; wanted is {' or '.join(ACTS)}")
    return TextConfig(vocabulary, shapes["text_model.embeddings.position_embedding.weight"][0], width,
                      layers=shapes.count("text_model.encoder.layers.{}.layer_norm1.weight"),
                      hidden=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
                      projection=shapes["text_projection.weight"][0], act=act,
                      end=vocabulary - 1 if end == 2 else end)         # old configs say 2 and mean the last row


def load(path, device="cpu", dtype=None):
    """Opens text_encoder/model.safetensors, given itself or its folder. A config.json beside it says the activation and
    the end token; without one these are exact GELU and the vocabulary's last row. dtype None keeps the file's own."""
    path = Path(path)
    if path.is_dir():
        plain, bf16 = path / "model.safetensors", path / "model.bf16.safetensors"
        path = bf16 if bf16.exists() and not plain.exists() else plain
    sign = "text_model.embeddings.token_embedding.weight"
    return model.load(path, device, dtype, networks={"text_encoder": (sign, TextEncoder, text_config)})
