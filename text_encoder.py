"""CLIP: the tokenizer, the text encoder (OpenCLIP ViT-bigG/14: 32 layers, D = 1280) for prompts, and the image encoder
(OpenAI ViT-L/14: 24 layers, 1024 channels, E = 768) for reference images.

    ids, mask = Tokenizer(folder)(["a red circle"])         (B, 77), (B, 77)
    hidden, pooled = load(file)(ids, mask)                  (B, 77, D), (B, 1, D)
    embedding = load(file)(pixels)                          (B, E)

Both encoders are stacks of the same transformer layer. Module names are those of the official files
text_encoder/model.safetensors and image_encoder/model.safetensors, so loading is strict. The letters in shape comments
are explained in model.py; here L also stands for the image encoder's tokens, and C is the width of a layer.

Sources: Radford et al., CLIP (2021), arXiv 2103.00020; the files of stabilityai/stable-cascade and -prior.
"""
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BytePairTokenizer
from torch import Tensor, nn

import model
from model import LORA_TOKENS, Weights, exists, multi_head_attention, reading, require

LENGTH = 77                                             # tokens of a prompt, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"


# ---------------------------------------------------------------------------------------------------- the tokenizer

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"      # a prompt is split into these first


def build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> BytePairTokenizer:
    """CLIP's byte-level BPE: lower case, split into words, each word's bytes merged into tokens, start and end added."""
    bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END)
    tokenizer = BytePairTokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False)
    return tokenizer


def read_tokenizer(folder: Path) -> BytePairTokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt, which hold the same."""
    if exists(folder / "tokenizer.json"):
        return read_tokenizer_json(folder / "tokenizer.json")
    is_complete = exists(folder / "vocab.json") and exists(folder / "merges.txt")
    require(is_complete, f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")
    with reading(folder / "merges.txt", "CLIP's merges, two tokens per line"):
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    with reading(folder / "vocab.json", "CLIP's vocabulary, {token: id}"):
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        return build_tokenizer(vocab, merges)


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    with reading(path, "CLIP's tokenizer"):
        # the pattern for words in newer files lists the special tokens too, which are matched before it
        text = path.read_text("utf-8").replace(r"<\\|startoftext\\|>|<\\|endoftext\\|>|", "")
        data = json.loads(text)
        bpe = data["model"]
        merges = bpe.pop("merges")                      # "a b", or in newer files ["a", "b"]
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        tokenizer = build_tokenizer(bpe.pop("vocab"), merges)
        clip = json.loads(tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer", "post_processor", "model"):
            require(agrees(data[part], clip[part]), f"expected CLIP's {part}, got another one")
        added = {token["content"] for token in data["added_tokens"]}
        require(added <= {START, END}, f"expected no added tokens, got {added!r:.80}")
    return tokenizer


def agrees(setting, clip):
    """Whether a setting in tokenizer.json is CLIP's. Older files omit some; empty, false and null count as equal."""
    if isinstance(clip, dict):
        same_type = setting.get("type") == clip.get("type")
        return same_type and all(agrees(value, clip[key]) for key, value in setting.items())
    if isinstance(clip, list):
        return len(setting) == len(clip) and all(map(agrees, setting, clip))
    return (setting or None) == (clip or None)


class Tokenizer:
    """Prompts -> ids and mask, (B, L) int64 each; L = length is the text encoder's, officially 77. Each of `tokens`, such as
    "[fernando]", is read as one token wherever it stands; their ids follow those of the vocabulary."""
    def __init__(self, folder, length: int = LENGTH, tokens: Sequence[str] = ()):
        self.bpe = read_tokenizer(Path(folder))
        self.end = self.bpe.token_to_id(END)
        for token in tokens:
            is_new = self.bpe.token_to_id(token) is None
            require(is_new, f"tokens: {token!r:.80} is in the vocabulary already")
            self.bpe.add_tokens([token])
        self.bpe.enable_truncation(length)
        self.bpe.enable_padding(length=length, pad_id=self.end, pad_token=END)

    def __call__(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Each row holds the start token, the prompt's tokens, the end token, and end tokens as padding. The mask is 1 up to
        and including the first end token. A prompt that is too long is cut, with a warning."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = self.bpe.encode_batch(prompts)
        for prompt, row in zip(prompts, rows):
            if row.overflowing:
                start, _ = row.overflowing[0].offsets[1]  # of the first token cut; offsets[0] is the start token's
                cut = prompt[start:]
                warnings.warn(f"the prompt {prompt[:30]!r} is cut to {len(row)} tokens, "
                              f"without {cut[:30]!r}", stacklevel=2)
        ids = torch.tensor([row.ids for row in rows])  # (B, L)
        mask = torch.tensor([row.attention_mask for row in rows])  # (B, L)
        return ids, mask


# ---------------------------------------------------------------------------------------------------- the layer
def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, attn_mask=None):
        y = multi_head_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), attn_mask)  # (B, L, C)
        return self.out_proj(y)  # (B, L, C)


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer."""
    def __init__(self, width, hidden, act):
        super().__init__()
        self.self_attn = SelfAttention(width)
        self.act = ACTIVATIONS[act]
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x, attn_mask=None):
        x = x + self.self_attn(self.layer_norm1(x), attn_mask)  # (B, L, C)
        hidden = self.act(self.mlp.fc1(self.layer_norm2(x)))
        return x + self.mlp.fc2(hidden)  # (B, L, C)


# ---------------------------------------------------------------------------------------------------- the text encoder
@dataclass(frozen=True)
class TextConfig:
    vocabulary: int = 49408
    length: int = LENGTH
    width: int = 1280
    layers: int = 32
    hidden: int = 5120                                  # channels inside the MLPs
    projection: int = 1280
    act: str = "gelu"                                   # or quick_gelu
    end: int = 49407                                    # id of the end token


class TextEncoder(nn.Module):
    """A transformer with a causal mask and a padding mask."""
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.width
        layers = [TransformerLayer(width, config.hidden, config.act) for _ in range(config.layers)]
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocabulary, width),
                "position_embedding": nn.Embedding(config.length, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and mask of the Tokenizer, (B, L) each -> hidden (B, L, D) and pooled (B, 1, D).

        hidden    the last layer's output before the final norm; Stage C reads all tokens, padding included
        pooled    that of the first end token, after the final norm, projected
        """
        clip = self.text_model
        B, L = ids.shape
        x = clip.embeddings.token_embedding(ids)  # (B, L, D)
        x = x + clip.embeddings.position_embedding.weight[:L]  # (B, L, D)
        causal = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        visible = causal & mask.bool()[:, None, None, :]  # (B, 1, L, L)
        attn_mask = torch.where(visible, 0.0, -math.inf).to(x.dtype)  # (B, 1, L, L)
        for layer in clip.encoder.layers:
            x = layer(x, attn_mask)
        first_end = (ids == self.config.end).int().argmax(dim=1)  # (B)
        end_token = x[torch.arange(B, device=x.device), first_end]  # (B, D)
        pooled = self.text_projection(clip.final_layer_norm(end_token))  # (B, D)
        return x, pooled.unsqueeze(1)


# ---------------------------------------------------------------------------------------------------- the image encoder

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    side: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    hidden: int = 4096                                  # channels inside the MLPs
    projection: int = 768
    act: str = "quick_gelu"


class ImageEncoder(nn.Module):
    """A vision transformer: a class token that sums up the image, then one token per patch."""
    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        width, tokens = config.width, 1 + (config.side // config.patch) ** 2
        layers = [TransformerLayer(width, config.hidden, config.act) for _ in range(config.layers)]
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False),
                "position_embedding": nn.Embedding(tokens, width)}),
            "pre_layrnorm": nn.LayerNorm(width),        # sic, as in the files
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "post_layernorm": nn.LayerNorm(width)})
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, H) in [0, 1], as `clip_preprocess` gives them -> embeddings (B, E)."""
        clip = self.vision_model
        mean = pixels.new_tensor(CLIP_MEAN)[:, None, None]  # (3, 1, 1)
        std = pixels.new_tensor(CLIP_STD)[:, None, None]  # (3, 1, 1)
        patches = clip.embeddings.patch_embedding((pixels - mean) / std)
        patches = patches.flatten(2).transpose(1, 2)  # (B, L - 1, C)
        class_token = clip.embeddings.class_embedding.expand(pixels.shape[0], 1, -1)  # (B, 1, C)
        x = torch.cat([class_token, patches], dim=1) + clip.embeddings.position_embedding.weight  # (B, L, C)
        x = clip.pre_layrnorm(x)
        for layer in clip.encoder.layers:
            x = layer(x)
        return self.visual_projection(clip.post_layernorm(x[:, 0]))


def clip_preprocess(image: Image.Image, side: int) -> Tensor:
    """An RGB image -> (3, side, side) in [0, 1]: the short side resized (bicubic), the centre cropped."""
    short = min(image.size)
    width, height = side * image.width // short, side * image.height // short
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


# ---------------------------------------------------------------------------------------------------- reading files
def layers_config(weights: Weights, network: str, act: str) -> dict:
    """The fields that both configs have, for the layers of text_model or vision_model."""
    mlps = weights.series(f"{network}.encoder.layers.{{}}.mlp.fc1.weight")
    names = list(ACTIVATIONS)                           # a list, since the file's value may be unhashable
    act = weights.setting("hidden_act", act, lambda value: value in names, " or ".join(names))
    return {"layers": len(mlps), "hidden": mlps[0][0], "act": act}


def text_config(weights: Weights) -> TextConfig:
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"]
    length = weights["text_model.embeddings.position_embedding.weight"][0]
    projection = weights["text_projection.weight"][0]
    end = weights.setting(
        "eos_token_id", 2, lambda value: type(value) is int and 0 <= value < vocabulary,
        f"a token id below {vocabulary}")
    if end == 2:                                        # old configs say 2 but mean the last token
        end = vocabulary - 1
    layers = layers_config(weights, "text_model", TextConfig.act)
    return TextConfig(vocabulary, length, width, projection=projection, end=end, **layers)


def image_config(weights: Weights) -> ImageConfig:
    width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"]
    tokens = weights["vision_model.embeddings.position_embedding.weight"][0]
    side = patch * math.isqrt(tokens - 1)
    projection = weights["visual_projection.weight"][0]
    layers = layers_config(weights, "vision_model", ImageConfig.act)
    return ImageConfig(side, patch, width, projection=projection, **layers)


NETWORKS = {
    "text_encoder": ("text_model.embeddings.token_embedding.weight", TextEncoder, text_config),
    "image_encoder": ("vision_model.embeddings.class_embedding", ImageEncoder, image_config)}


def load(path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
         expect: str | None = None, loras: Sequence[tuple[str | Path, float]] = (),
         tokens: Sequence[list[int]] = ()) -> nn.Module:
    """model.load with these two networks. LoRA files may also train tokens; `tokens` holds, for each new one in their order,
    the ids of the word that it starts from, which the files do not hold."""
    network = model.load(path, device, dtype, expect, NETWORKS, loras)
    if isinstance(network, TextEncoder) and (loras or tokens):
        add_tokens(network, loras, tokens)
    return network


def add_tokens(encoder: TextEncoder, loras, tokens):
    """Changes the token embeddings as the original's LoRA files say: `embeddings.embeddings` is added to the rows
    `embeddings.indices`. Rows after the vocabulary are new; they start as the mean of a word's rows."""
    embedding = encoder.text_model.embeddings.token_embedding.weight
    vocabulary, width = embedding.shape
    table = embedding.float()
    starts = [table[word].mean(dim=0, keepdim=True) for word in tokens]
    table = torch.cat([table, *starts])
    end = vocabulary                                    # of the rows in use
    for path, strength in loras:
        lora = Weights(path, rename=False)
        if LORA_TOKENS[0] not in lora:
            continue
        changes, indices = (lora.tensor(name, embedding.device) for name in LORA_TOKENS)
        fits = indices.dim() == 1 and indices.dtype == torch.int64 and (indices >= 0).all()
        fits = fits and changes.shape == (*indices.shape, width)
        require(fits, f"{path}: expected embeddings (n, {width}) and n indices, got "
                f"{tuple(changes.shape)} and {tuple(indices.shape)}")
        for i in indices.argsort().tolist():
            row = int(indices[i])
            if row >= vocabulary:                       # a new token: the next of `tokens`
                require(end < len(table), f"{path}: has a new token; give its name and the word it "
                        "starts from, with --token '[new]=word' or tokens={'[new]': 'word'}")
                row = end
                end += 1
            table[row] += strength * changes[i].float()
    require(end == len(table),
            f"tokens: the LoRA files have {end - vocabulary} new ones, got {len(tokens)}")
    table = table.to(embedding.dtype)
    encoder.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(table)
    encoder.config = replace(encoder.config, vocabulary=len(table))
