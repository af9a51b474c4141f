"""The networks of Stable Cascade (Wuerstchen v3), each the official network at any size.

    UNet                Stage C: text -> semantic latent; Stage B: semantic latent -> image latent; one class, two sizes
    StageA              a VQGAN: image latent <-> pixels, 4 times larger on each side
    SemanticEncoder     EfficientNet-V2-S: pixels -> semantic latent, 42.67 times smaller on each side
    Previewer           semantic latent -> a small picture, for looking on

Modules carry the names of the official single files, so each loads strictly. `load(path)` opens any of them, also in
the diffusers layout, and tells and sizes the network by the tensors inside.

Letters: B batch, C channels, C' those that come out, H W pixels, h w the semantic latent's sides, y x the sides of the
grid at hand, T its tokens, T' those that they look at, p a patch's side, s stride, L text tokens, D text width, n
pictures seen, E width of their embeddings (768), N condition tokens, K codes (8192). Inside the UNet and Stage A the
stream is channels-last, (B, y, x, C): norms, linears, GRN and attention all work on the last axis; only what goes in
and out is channels-first.

Sources: Pernias et al., "Wuerstchen" (2023), arXiv 2306.00637; the official files of stabilityai/stable-cascade;
ConvNeXt V2 (GRN), arXiv 2301.00808; EfficientNetV2, arXiv 2104.00298; Paella (Stage A), arXiv 2211.07292.
"""
import itertools
import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

HEAD_WIDTH = 64             # of every attention head; also the width of a timestep embedding
CLIP_TOKENS = 4             # condition tokens made from one pooled text or image embedding


class CascadeError(Exception):
    """What a user can cause and mend. The message is one line: what, where, what to do."""


# ------------------------------------------------------------------------------------------------ layers, channels-last
def wide(x):
    """fp16 ends at 65504, a UNet's stream does not: beside fp16 weights it is fp32, and products alone are fp16. This
    is called in one place; from there the types of the stream and of the weights decide."""
    return x.float() if x.dtype == torch.float16 else x


def linear(x, weight, bias):
    """F.linear in the weights' type. Where x is wider, each row is scaled to 32 at most: neither it nor its answer, if
    that is not 2047 times as large, leaves fp16 then."""
    if x.dtype.itemsize <= weight.dtype.itemsize:
        return F.linear(x, weight, bias)                                                # (*rest, C')
    size = (torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True) / 32).clamp(min=1)
    return F.linear((x / size).to(weight.dtype), weight) * size + bias                  # (*rest, C')


class Linear(nn.Linear):                                # (*rest, C) -> (*rest, C')
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):                                # (B, y, x, C) -> (B, y//s, x//s, C')
    def forward(self, x):
        if self.kernel_size == (1, 1):
            return linear(x, self.weight.flatten(1), self.bias)         # a 1x1 convolution is a linear
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)       # cheap in fp32: depthwise, or few
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, self.padding, groups=self.groups)
        return y.permute(0, 2, 3, 1)


class ConvTranspose2d(nn.ConvTranspose2d):              # (B, y, x, C) -> (B, 2y, 2x, C')
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, self.padding).permute(0, 2, 3, 1)


class PixelUnshuffle(nn.PixelUnshuffle):                # the way in: (B, C, p*y, p*x) -> (B, y, x, C*p*p)
    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)


class PixelShuffle(nn.PixelShuffle):                    # the way out: (B, y, x, C*p*p) -> (B, C, p*y, p*x)
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2))


def attention(q, k, v, mask=None):
    """softmax(q k' / 8 + mask) v for every head."""
    kernel = ATTENTION.get(q.device.type, F.scaled_dot_product_attention)
    return kernel(q, k, v, mask)                                                        # (B, heads, T, 64)


def by_head(q, k, v, mask=None):
    """The same, a few heads at a time: the scores of those, not of all, are in memory."""
    few, parts = max(1, 2 ** 21 // (q.shape[2] * k.shape[2])), []
    for q, k, v in zip(*(y.split(few, dim=1) for y in (q, k, v))):
        scores = q * HEAD_WIDTH ** -0.5 @ k.transpose(2, 3)                             # (B, few, T, T')
        scores = scores if mask is None else scores + mask
        parts.append(scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v)
    return torch.cat(parts, dim=1)                                                      # (B, heads, T, 64)


ATTENTION = {"cpu": by_head}                            # PyTorch's own kernel is slower there


LayerNorm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)      # over channels; nothing in it is learned


def resize(x, size):
    """Bilinear with corners aligned, in fp32: (B, y, x, C) -> (B, *size, C)."""
    if x.shape[1:3] == size:
        return x
    y = F.interpolate(x.permute(0, 3, 1, 2).float(), size, mode="bilinear", align_corners=True)     # (B, C, *size)
    return y.permute(0, 2, 3, 1).to(x.dtype)


# ------------------------------------------------------------------------------------------------ the UNet of B and C
@dataclass(frozen=True)
class UNetConfig:
    """Levels are listed from the outermost in, `up` from the innermost out. A level is a string of block kinds:
    R residual, T timestep, A attention; it is passed `repeat` times. The official ones, whose `up` mirrors `down` and
    whose way down has no repeats:

        file            widths                  down                            up repeats      parameters
        stage_c         2048 2048               RTA x 8, 24                     1 1             3589 M
        stage_c_lite    1536 1536               RTA x 4, 12                     1 1             1031 M
        stage_b         320 640 1280 1280       RT x 2, 6, RTA x 28, 6          3 3 2 2         1563 M
        stage_b_lite    320 576 1152 1152       RT x 2, 4, RTA x 14, 4          2 2 2 2         700 M
    """
    widths: tuple[int, ...]                     # channels of each level
    down: tuple[str, ...]
    up: tuple[str, ...]
    down_repeat: tuple[int, ...]
    up_repeat: tuple[int, ...]
    c_cond: int                                 # channels of a condition token
    latent: int                                 # channels of the latent, in and out
    patch: int                                  # its pixels are taken patch x patch together
    extras: tuple[str, ...]                     # timestep conditions beside r
    text: int = 1280                            # width of the text embeddings
    image: int = 0                              # width of the image embeddings: Stage C
    semantic: int = 0                           # channels of the semantic latent: Stage B
    switch: tuple[bool, ...] | None = None      # Stage C: does the change to this level halve the resolution?


class GlobalResponseNorm(nn.Module):
    """Channels compete over the whole picture (ConvNeXt V2, section 3): it cannot be computed tile by tile."""
    def __init__(self, c):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, c)) for _ in range(2))

    def forward(self, x):
        # vector_norm, but several times faster; clamped, since the root has no slope at 0
        norm = x.square().sum((1, 2), keepdim=True).clamp(min=1e-30).sqrt()             # (B, 1, 1, C)
        share = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, self.gamma * share + 1)                      # (B, y, x, C)


class ResidualBlock(nn.Module):
    """ConvNeXt block. The first of an up level also reads the skip of its level."""
    def __init__(self, c, c_skip=0):
        super().__init__()
        self.c_skip = c_skip
        self.depthwise = Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = LayerNorm(c)
        self.channelwise = nn.Sequential(Linear(c + c_skip, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c),
                                         nn.Identity(), Linear(4 * c, c))               # the names count a dropout

    def forward(self, x, t, cond, skip):
        y = self.norm(self.depthwise(x))                                                # (B, y, x, C)
        if self.c_skip:
            y = torch.cat([y, skip], dim=-1)                                            # (B, y, x, C + C_skip)
        return x + self.channelwise(y)


class TimestepBlock(nn.Module):
    """Scale and shift by the time; every extra condition has a mapper of its own."""
    def __init__(self, c, extras):
        super().__init__()
        self.mappers = ("mapper", *(f"mapper_{name}" for name in extras))
        for name in self.mappers:
            setattr(self, name, Linear(HEAD_WIDTH, 2 * c))

    def forward(self, x, t, cond, skip):
        chunks = t.chunk(len(self.mappers), dim=1)                                      # each (B, 64)
        mapped = sum(getattr(self, name)(chunk) for name, chunk in zip(self.mappers, chunks))       # (B, 2C)
        scale, shift = mapped[:, None, None].chunk(2, dim=-1)                           # each (B, 1, 1, C)
        return x * (1 + scale) + shift


class Attention(nn.Module):
    """Queries are the picture's tokens; keys and values are these and the condition's tokens after them."""
    def __init__(self, c):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))                       # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = Linear(c, c)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x, keys_values):
        tokens = x.to(keys_values.dtype)                                                # (B, T, C)
        q, k, v = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)         # each (B, T, C)
        k_cond, v_cond = keys_values.chunk(2, dim=-1)                                   # each (B, N, C)
        k, v = torch.cat([k, k_cond], dim=1), torch.cat([v, v_cond], dim=1)             # each (B, T + N, C)
        q, k, v = (y.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for y in (q, k, v))   # (B, C/64, T or T + N, 64)
        y = attention(q, k, v)                                                          # softmax(q k' / 8) v
        return self.out_proj(y.transpose(1, 2).flatten(2).to(x.dtype))                  # (B, T, C)


class AttentionBlock(nn.Module):
    def __init__(self, c, c_cond):
        super().__init__()
        self.norm = LayerNorm(c)
        self.attention = nn.ModuleDict({"attn": Attention(c)})
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def keys_values(self, cond):
        """The condition's tokens (B, N, c_cond) -> their keys and values, (B, N, 2C)."""
        mapped = self.kv_mapper(cond)                                                   # (B, N, C)
        attn, C = self.attention.attn, mapped.shape[2]
        return F.linear(mapped, attn.in_proj_weight[C:], attn.in_proj_bias[C:])         # (B, N, 2C)

    def forward(self, x, t, cond, skip):
        keys_values = cond[self] if isinstance(cond, dict) else self.keys_values(cond)  # UNet.prepare gives a dict
        tokens = self.norm(x).flatten(1, 2)                                             # (B, y*x, C), row by row
        return x + self.attention.attn(tokens, keys_values).view_as(x)


class Resize(nn.Module):                                # (B, y, x, C) -> (B, int(scale*y), int(scale*x), C)
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return resize(x, (int(x.shape[1] * self.scale), int(x.shape[2] * self.scale)))


class UNet(nn.Module):
    """Stage B or Stage C: predicts the noise in a latent."""
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c, c_cond, widths = config.widths[0], config.c_cond, config.widths
        if config.semantic:
            self.effnet_mapper = self._mapper(config.semantic, c)
            self.pixels_mapper = self._mapper(3, c)
            self.clip_mapper = nn.Linear(config.text, c_cond * CLIP_TOKENS)
        else:
            self.clip_txt_mapper = nn.Linear(config.text, c_cond)
            self.clip_txt_pooled_mapper = nn.Linear(config.text, c_cond * CLIP_TOKENS)
            self.clip_img_mapper = nn.Linear(config.image, c_cond * CLIP_TOKENS)
        self.clip_norm = LayerNorm(c_cond)
        patched = config.latent * config.patch ** 2
        self.embedding = nn.Sequential(PixelUnshuffle(config.patch), Conv2d(patched, c, 1), LayerNorm(c))

        levels = range(len(widths))
        self.down_downscalers = nn.ModuleList(self._change(i - 1, i) if i else nn.Identity() for i in levels)
        self.down_blocks = nn.ModuleList(self._level(widths[i], config.down[i]) for i in levels)
        self.down_repeat_mappers = nn.ModuleList(
            nn.ModuleList(Conv2d(c, c, 1) for _ in range(n - 1)) for c, n in zip(widths, config.down_repeat))
        deepest_first = list(enumerate(reversed(levels)))           # j counts the way up, i is the level
        self.up_blocks = nn.ModuleList(
            self._level(widths[i], config.up[j], c_skip=widths[i] if j else 0) for j, i in deepest_first)
        self.up_repeat_mappers = nn.ModuleList(
            nn.ModuleList(Conv2d(c, c, 1) for _ in range(n - 1)) for c, n in zip(widths[::-1], config.up_repeat))
        self.up_upscalers = nn.ModuleList(self._change(i, i - 1) if i else nn.Identity() for _, i in deepest_first)
        self.clf = nn.Sequential(LayerNorm(c), Conv2d(c, patched, 1), PixelShuffle(config.patch))

    @staticmethod
    def _mapper(c_in, c):
        return nn.Sequential(Conv2d(c_in, 4 * c, 1), nn.GELU(), Conv2d(4 * c, c, 1), LayerNorm(c))

    def _level(self, c, kinds, c_skip=0):
        build = {"R": lambda i: ResidualBlock(c, c_skip if i == 0 else 0),
                 "T": lambda i: TimestepBlock(c, self.config.extras),
                 "A": lambda i: AttentionBlock(c, self.config.c_cond)}
        return nn.ModuleList(build[kind](i) for i, kind in enumerate(kinds))

    def _change(self, i, j):
        """From level i to its neighbour j. In Stage C the 1x1 convolution is `blocks.0` going down, `blocks.1` up:
        the names count a resize, which is there even where it leaves the resolution as it is."""
        c_in, c_out, up, switch = self.config.widths[i], self.config.widths[j], j < i, self.config.switch
        if switch is None:
            change = (ConvTranspose2d if up else Conv2d)(c_in, c_out, 2, stride=2)
        else:
            conv, scale = Conv2d(c_in, c_out, 1), (2 if up else 0.5) if switch[min(i, j)] else 1
            layers = [Resize(scale), conv] if up else [conv, Resize(scale)]
            change = nn.Sequential(OrderedDict(blocks=nn.Sequential(*layers)))
        return nn.Sequential(LayerNorm(c_in), change)

    def embed_time(self, r, sca, crp):
        """r and what the network has of sca and crp, each (B,) in [0, 1], or None for 0 -> (B, 64 * (1 + extras))."""
        half, extras = HEAD_WIDTH // 2, {"sca": sca, "crp": crp}
        frequencies = torch.arange(half, device=r.device).float().mul(-math.log(10000) / (half - 1)).exp()
        times = [r, *(torch.zeros_like(r) if extras[name] is None else extras[name] for name in self.config.extras)]
        angles = torch.stack(times, dim=1)[:, :, None] * 10000 * frequencies               # (B, 1 + extras, 32)
        return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)                   # (B, 64 * (1 + extras))

    def embed_clip(self, pooled, text, image):
        """The condition's tokens: 4 of the pooled text, in Stage C after the text's L and before 4 of every image."""
        if self.config.semantic:
            mapped = [self.clip_mapper(pooled)]
        else:
            image = pooled.new_zeros(pooled.shape[0], self.config.image) if image is None else image
            mapped = [self.clip_txt_mapper(text), self.clip_txt_pooled_mapper(pooled), self.clip_img_mapper(image)]
        tokens = [y.reshape(y.shape[0], -1, self.config.c_cond) for y in mapped]    # each (B, 4 or L or 4n, c_cond)
        return self.clip_norm(torch.cat(tokens, dim=1))                                 # (B, N, c_cond)

    def prepare(self, clip_text_pooled, clip_text=None, clip_img=None, **rest):
        """Arguments of `forward` -> others, to the same numbers: what every attention block makes of the condition, the
        same in every step, is made here, once."""
        cond = self.embed_clip(clip_text_pooled, clip_text, clip_img)                   # (B, N, c_cond)
        blocks = [block for block in self.modules() if isinstance(block, AttentionBlock)]
        return {"cond": {block: block.keys_values(cond) for block in blocks}, **rest}

    def forward(self, x, r, clip_text_pooled=None, clip_text=None, clip_img=None, effnet=None, pixels=None, sca=None,
                crp=None, cond=None):
        """Predicts the noise in a latent: epsilon, shaped like x; beside fp16 weights it comes in fp32.

        x                   (B, 16, h, w) for Stage C, (B, 4, H/4, W/4) with even sides for Stage B
        r                   (B,) fp32, the time: 1 is pure noise, 0 is none
        clip_text_pooled    (B, D) or (B, 1, D)
        clip_text           (B, L, D), all rows of the text tower; Stage C needs it, Stage B has no use for it
        clip_img            (B, E) or (B, n, E), embeddings of pictures for Stage C; zeros if None
        effnet              (B, 16, h, w), the semantic latent for Stage B; nothing is added if None
        pixels              (B, 3, any, any) in [0, 1], a picture for Stage B; zeros if None
        sca, crp            (B,), extra times; zeros if None
        cond                what `prepare` made of clip_text_pooled, clip_text and clip_img, in their place
        """
        x = self.embedding(wide(x))                                                     # (B, y, x, C)
        t = self.embed_time(r, sca, crp).to(x.dtype)                                    # (B, 64 * (1 + extras))
        if cond is None:
            cond = self.embed_clip(clip_text_pooled, clip_text, clip_img)               # (B, N, c_cond)
        if self.config.semantic:
            if effnet is not None:
                x = x + self.effnet_mapper(resize(effnet.permute(0, 2, 3, 1), x.shape[1:3]))
            pixels = x.new_zeros(x.shape[0], 3, 8, 8) if pixels is None else pixels
            x = x + resize(self.pixels_mapper(pixels.permute(0, 2, 3, 1)), x.shape[1:3])

        skips = []
        for blocks, change, mappers in zip(self.down_blocks, self.down_downscalers, self.down_repeat_mappers):
            x = self._run(blocks, mappers, change(x), t, cond)
            skips.append(x)
        for blocks, change, mappers in zip(self.up_blocks, self.up_upscalers, self.up_repeat_mappers):
            skip = skips.pop()
            x = resize(x, skip.shape[1:3])              # an odd side lost a row on its way down
            x = change(self._run(blocks, mappers, x, t, cond, skip))
        return self.clf(x)                                                              # (B, 16 or 4, p*y, p*x)

    @staticmethod
    def _run(blocks, mappers, x, t, cond, skip=None):
        """A level: its blocks in order and, where it repeats, a 1x1 convolution before each further pass."""
        for mapper in [None, *mappers]:
            x = mapper(x) if mapper else x
            for block in blocks:
                x = block(x, t, cond, skip)
        return x


# ------------------------------------------------------------------------------------------------ Stage A
@dataclass(frozen=True)
class StageAConfig:
    widths: tuple[int, ...] = (192, 384)        # channels of each level, the outermost first
    latent: int = 4
    deep_blocks: int = 12                       # residual blocks of the decoder's inner level
    codes: int = 8192
    scale_factor: float = 0.43


STRIP = 4096                                    # positions that a block of Stage A works on at a time


class StageABlock(nn.Module):
    """A depthwise convolution, then an MLP, each with a learned scale, shift and gain: six scalars. It goes over the
    picture in strips of rows: only one strip's hidden values are in memory, a quarter of the peak at 1024x1024."""
    def __init__(self, c):
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def norm(self, x, i):
        scale, shift = (1 + self.gammas[i]).expand(x.shape[-1]), self.gammas[i + 1].expand(x.shape[-1])
        return F.layer_norm(x, x.shape[-1:], scale, shift, 1e-6)                        # (B, y, x, C)

    def forward(self, x):
        strips, rows = [], max(1, STRIP // x.shape[2])
        for top in range(0, x.shape[1], rows):
            near = self.norm(x[:, max(top - 1, 0):top + rows + 1], 0)       # with a row of either neighbour
            y = self.depthwise(near.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, min(top, 1):][:, :rows]
            y = torch.addcmul(x[:, top:top + rows], y, self.gammas[2])
            strips.append(torch.addcmul(y, self.channelwise(self.norm(y, 3)), self.gammas[5]))
        return torch.cat(strips, dim=1)                                                 # (B, y, x, C)


class StageA(nn.Module):
    """VQGAN. Stage B paints latents that were never quantised, so only the tensors and `quantise` keep the codebook."""
    def __init__(self, config: StageAConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        down, up = [], []                                               # `up` is built from its end
        for i, c in enumerate(widths):
            if i:
                down.append(Conv2d(widths[i - 1], c, 4, stride=2, padding=1))
                up.insert(0, ConvTranspose2d(c, widths[i - 1], 4, stride=2, padding=1))
            down.append(StageABlock(c))
            up[:0] = [StageABlock(c) for _ in range(config.deep_blocks if i == len(widths) - 1 else 1)]
        self.in_block = nn.Sequential(PixelUnshuffle(2), Conv2d(3 * 4, widths[0], 1))
        self.down_blocks = nn.Sequential(*down, nn.Sequential(nn.Conv2d(c, config.latent, 1, bias=False),
                                                              nn.BatchNorm2d(config.latent)))
        self.vquantizer = nn.ModuleDict({"codebook": nn.Embedding(config.codes, config.latent)})
        self.up_blocks = nn.Sequential(nn.Sequential(Conv2d(config.latent, c, 1)), *up)
        self.out_block = nn.Sequential(Conv2d(widths[0], 3 * 4, 1), PixelShuffle(2))

    def encode(self, image):
        """Pixels (B, 3, H, W) in [0, 1], sides multiples of 4 -> image latent (B, 4, H/4, W/4), not quantised."""
        x = self.in_block(image)                                                        # (B, H/2, W/2, C)
        for block in self.down_blocks[:-1]:
            x = block(x)
        return self.down_blocks[-1](x.permute(0, 3, 1, 2)) / self.config.scale_factor   # (B, 4, H/4, W/4)

    def decode(self, z):
        """Image latent (B, 4, y, x) -> pixels (B, 3, 4y, 4x), about [0, 1] and not clamped."""
        x = (z * self.config.scale_factor).permute(0, 2, 3, 1)                          # (B, y, x, 4)
        for block in self.up_blocks:
            x = block(x)
        return self.out_block(x)                                                        # (B, 3, 4y, 4x)

    def quantise(self, z):
        """Image latent (B, 4, y, x) -> the nearest codes (B, 4, y, x) and their numbers (B, y, x)."""
        codes = self.vquantizer.codebook.weight                                         # (K, 4)
        tokens = (z * self.config.scale_factor).permute(0, 2, 3, 1)                     # (B, y, x, 4)
        numbers = torch.cdist(tokens.flatten(0, 2).float(), codes.float()).argmin(1).view(tokens.shape[:3])
        return codes[numbers].permute(0, 3, 1, 2) / self.config.scale_factor, numbers   # (B, 4, y, x), (B, y, x)


# ------------------------------------------------------------------------------------------------ the semantic encoder
# From here on channels-first, (B, C, H, W): convolutions and batch norms only.
@dataclass(frozen=True)
class SemanticEncoderConfig:
    """EfficientNet-V2-S. A stage is (fused, expansion, channels, blocks)."""
    stem: int = 24
    stages: tuple[tuple[bool, int, int, int], ...] = ((True, 1, 24, 2), (True, 4, 48, 4), (True, 4, 64, 4),
                                                      (False, 4, 128, 6), (False, 6, 160, 9), (False, 6, 256, 15))
    head: int = 1280
    latent: int = 16


STRIDES = (1, 2, 2, 2, 1, 2)        # of the first block of each stage
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_norm(c_in, c_out, kernel, stride=1, groups=1, act=True):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, eps=1e-3), *([nn.SiLU()] if act else []))


class SqueezeExcite(nn.Module):
    """Every channel is scaled by what the channels' means say."""
    def __init__(self, c, c_squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, c_squeezed, 1), nn.Conv2d(c_squeezed, c, 1)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)                                            # (B, C, 1, 1)
        return x * self.fc2(F.silu(self.fc1(means))).sigmoid()


class MBConv(nn.Module):
    """Widen, look around, narrow again; fused means that one 3x3 convolution does the first two."""
    def __init__(self, c_in, c_out, fused, expansion, stride):
        super().__init__()
        narrow = not fused or expansion > 1                             # else one convolution does it all
        c = c_in * expansion if narrow else c_out
        layers = [conv_norm(c_in, c, 3, stride)] if fused else [
            conv_norm(c_in, c, 1), conv_norm(c, c, 3, stride, groups=c), SqueezeExcite(c, max(1, c_in // 4))]
        layers += [conv_norm(c, c_out, 1, act=False)] if narrow else []
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)                    # (B, C', H/s, W/s)


class SemanticEncoder(nn.Module):
    """Pixels -> the semantic latent that Stage C learns to imagine and Stage B to paint from."""
    def __init__(self, config: SemanticEncoderConfig):
        super().__init__()
        self.config = config
        self.backbone = nn.Sequential(conv_norm(3, config.stem, 3, stride=2))
        c = config.stem
        for (fused, expansion, width, blocks), stride in zip(config.stages, STRIDES):
            self.backbone.append(nn.Sequential(*(
                MBConv(width if i else c, width, fused, expansion, 1 if i else stride) for i in range(blocks))))
            c = width
        self.backbone.append(conv_norm(c, config.head, 1))
        self.mapper = nn.Sequential(nn.Conv2d(config.head, config.latent, 1, bias=False),
                                    nn.BatchNorm2d(config.latent, affine=False))

    def forward(self, image):
        """(B, 3, H, W) in [0, 1], sides multiples of 32 -> (B, 16, H/32, W/32). Officially 768 for pictures of 1024."""
        mean, std = (image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.mapper(self.backbone((image - mean) / std))


# ------------------------------------------------------------------------------------------------ the previewer
@dataclass(frozen=True)
class PreviewerConfig:
    widths: tuple[int, ...] = (512, 256, 128, 128)      # channels at 1, 2, 4 and 8 times the latent's size
    latent: int = 16


class Previewer(nn.Module):
    """Semantic latent -> a small picture, good enough to look on."""
    def __init__(self, config: PreviewerConfig):
        super().__init__()
        self.config = config
        c, layers = config.widths[0], []
        convs = [nn.Conv2d(config.latent, c, 1), nn.Conv2d(c, c, 3, padding=1)]
        for c_in, c in zip(config.widths, config.widths[1:]):
            convs += [nn.ConvTranspose2d(c_in, c, 2, stride=2), nn.Conv2d(c, c, 3, padding=1)]
        for conv in convs:
            layers += [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(c, 3, 1))

    def forward(self, latent):
        """(B, 16, h, w) -> pixels (B, 3, 8h, 8w), about [0, 1] and not clamped."""
        return self.blocks(latent)


# ------------------------------------------------------------------------------------------------ reading files
# What a diffusers file calls otherwise. Query, key and value are three tensors there, one here.
DIFFUSERS = (("attention.to_q.", "attention.attn.in_proj_"), ("attention.to_k.", "attention.attn.in_proj_"),
             ("attention.to_v.", "attention.attn.in_proj_"), ("attention.to_out.0.", "attention.attn.out_proj."),
             ("vquantizer.embedding.", "vquantizer.codebook."))


class Weights(dict):
    """A safetensors file as {official name: shape}, whatever its layout. Asking for what is not there names it."""
    def __init__(self, path):
        self.path, self.sources = path, {}      # official name -> the file's tensors that, stacked, make it
        try:
            self.file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CascadeError(f"{path}: there is no such file") from None
        except (SafetensorError, OSError) as error:
            raise CascadeError(f"{path}: not a whole safetensors file ({error}); only safetensors are read, never a "
                               "pickle (.pt, .ckpt, .bin): get the official .safetensors file again") from None
        self.metadata, names = self.file.metadata() or {}, self.file.keys()
        for name in sorted(names, key=lambda name: (".to_k." in name) + 2 * (".to_v." in name)):    # q, k, v
            official = name
            for theirs, ours in DIFFUSERS:
                official = official.replace(theirs, ours)
            if "effnet_mapper.0.weight" in names:
                official = official.replace("clip_txt_pooled_mapper.", "clip_mapper.")
            self.sources.setdefault(official, []).append(name)
        for name, parts in self.sources.items():
            shapes = [tuple(self.file.get_slice(part).get_shape()) for part in parts]
            self[name] = shapes[0] if len(parts) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def __missing__(self, name):
        raise CascadeError(f"{self.path}: tensor {name} is missing")

    def fill(self, network, device, dtype):
        """Puts the file's tensors in place of a meta network's: one copy of the weights at most, none where neither
        type nor device changes (then they stay in the file, mapped into memory)."""
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for name in {**wanted, **self}:
            if self[name] != wanted.get(name):
                raise CascadeError(f"{self.path}: tensor {name} has shape {self[name]}, wanted is "
                                   f"{wanted.get(name, 'no tensor of this name')}")
        network.load_state_dict({name: self.tensor(name, device, dtype) for name in self}, assign=True)
        return network.requires_grad_(False).eval()

    def tensor(self, name, device="cpu", dtype=None):
        self[name]                                      # says so where it is missing
        parts = [self.file.get_tensor(part) for part in self.sources[name]]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    def each(self, pattern, start=0, step=1):
        """The shapes of pattern.format(start), pattern.format(start + step), ... up to the first that is not there."""
        names = map(pattern.format, itertools.count(start, step))
        return [self[name] for name in itertools.takewhile(self.__contains__, names)]

    def config(self):
        """What the config.json beside the file says; diffusers and transformers folders have one."""
        path = Path(self.path).parent / "config.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def unet_config(shapes):
    semantic = "effnet_mapper.0.weight" in shapes
    pooled = shapes["clip_mapper.weight" if semantic else "clip_txt_pooled_mapper.weight"]      # (4 * c_cond, D)
    marks = {"R": "depthwise.weight", "T": "mapper.weight", "A": "kv_mapper.1.weight"}

    def kinds(level):
        found = ""
        while kind := next((kind for kind, mark in marks.items() if f"{level}.{len(found)}.{mark}" in shapes), ""):
            found += kind
        return found

    widths = tuple(shape[0] for shape in shapes.each("down_blocks.{}.0.depthwise.weight"))
    levels = range(len(widths))
    patch = 2 if semantic else 1                # cannot be read off the tensors
    return UNetConfig(
        widths=widths,
        down=tuple(kinds(f"down_blocks.{i}") for i in levels),
        up=tuple(kinds(f"up_blocks.{i}") for i in levels),
        down_repeat=tuple(1 + len(shapes.each(f"down_repeat_mappers.{i}.{{}}.weight")) for i in levels),
        up_repeat=tuple(1 + len(shapes.each(f"up_repeat_mappers.{i}.{{}}.weight")) for i in levels),
        c_cond=pooled[0] // CLIP_TOKENS, text=pooled[1],
        patch=patch, latent=shapes["embedding.1.weight"][1] // patch ** 2,
        extras=tuple(name for name in ("sca", "crp") if any(f".mapper_{name}." in tensor for tensor in shapes)),
        image=0 if semantic else shapes["clip_img_mapper.weight"][1],
        semantic=shapes["effnet_mapper.0.weight"][1] if semantic else 0,
        switch=None if "down_downscalers.1.1.weight" in shapes else (False,) * (len(levels) - 1))


def stage_a_config(shapes):
    widths = tuple(shape[0] for shape in (shapes["in_block.1.weight"], *shapes.each("down_blocks.{}.weight", 1, 2)))
    codes, latent = shapes["vquantizer.codebook.weight"]
    scale_factor = shapes.config().get("scale_factor", StageAConfig.scale_factor)
    return StageAConfig(widths, latent, len(shapes.each("up_blocks.{}.gammas", start=1)), codes, scale_factor)


def semantic_encoder_config(shapes):
    c = stem = shapes["backbone.0.0.weight"][0]
    stages = []
    for i in range(1, 1 + len(STRIDES)):
        block = f"backbone.{i}.0.block"
        hidden, _, kernel, _ = shapes[f"{block}.0.0.weight"]
        width = next(shapes[f"{block}.{j}.0.weight"][0] for j in (3, 1, 0) if f"{block}.{j}.0.weight" in shapes)
        stages.append((kernel == 3, hidden // c, width, len(shapes.each(f"backbone.{i}.{{}}.block.0.0.weight"))))
        c = width
    latent, head = shapes["mapper.0.weight"][:2]
    return SemanticEncoderConfig(stem, tuple(stages), head, latent)


def previewer_config(shapes):
    norms = shapes.each("blocks.{}.weight", 2, 6)               # one after each change of size; the last layer has none
    return PreviewerConfig(tuple(shape[0] for shape in norms), shapes["blocks.0.weight"][1])


# A network is known by one tensor that no other has.
NETWORKS = {"stage_b": ("effnet_mapper.0.weight", UNet, unet_config),
            "stage_c": ("clip_txt_mapper.weight", UNet, unet_config),
            "stage_a": ("vquantizer.codebook.weight", StageA, stage_a_config),
            "effnet_encoder": ("mapper.0.weight", SemanticEncoder, semantic_encoder_config),
            "previewer": ("blocks.0.weight", Previewer, previewer_config)}


def load(path, device="cpu", dtype=None, expect=None, networks=NETWORKS):
    """Opens any official file, in the original or the diffusers layout, and returns the network inside, ready to run.

    dtype       of the weights; the file's own if None
    expect      one of the networks: anything else in the file is an error
    networks    {kind: (a tensor that tells it, class, function that reads its config off the Weights)}
    """
    weights = Weights(path)
    kind = next((kind for kind, (sign, _, _) in networks.items() if sign in weights), None)
    if kind is None or expect not in (None, kind):
        raise CascadeError(f"{path}: wanted is {expect or ' or '.join(networks)}, the file holds {kind or 'none'}")
    _, network, read_config = networks[kind]
    try:
        with torch.device("meta"):
            network = network(read_config(weights))
    except (IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, ValueError) as error:
        raise CascadeError(f"{path}: the tensors, or the config.json beside, do not fit a {kind} ({error!r})") from None
    return weights.fill(network, device, dtype)
