"""The networks of Stable Cascade (Würstchen v3).

    UNet                Stage C: text -> semantic latent; Stage B: semantic latent -> image latent; one class, two sizes
    StageA              a VQGAN: image latent <-> pixels, 4 times larger on each side
    SemanticEncoder     an EfficientNet-V2-S: pixels -> semantic latent, 32 times smaller on each side; the image is
                        first resized to 3/4, which makes it 42.67 times smaller than the image
    Previewer           semantic latent -> a small image, to preview Stage C's progress
    ControlNet          edges, an image with a mask, or a semantic latent -> feature maps that are added inside Stage C

`load(path)` opens the official file of any of them, in the original or the diffusers layout, and reads the network's
sizes off its tensors; `loras` are merged into them. Module names are the checkpoint's, so loading is strict. What some
of them mean:

    effnet              the semantic latent, made by an EfficientNet; effnet_mapper adds it to Stage B's features
    pixels_mapper       adds an image to Stage B's features; unused: training fed zeros, and so do we
    sca, crp            further time conditions beside r; always 0 when sampling
    clf                 the output layers: norm, 1x1 convolution, pixel shuffle
    gammas              the six learned scalars of a Stage A block

Letters in shape comments, in all files:

    N  images           P  prompts          B  rows of a batch: N, or 2N with guidance       R  reference images
    C  channels         H, W  height and width of the feature map, latent or image that a function works on
    Hc, Wc  height and width of the semantic latent (Stage C)       Hb, Wb  of the image latent (Stage B)
    T  tokens of a feature map, H * W       M  tokens of the condition       L  tokens of a prompt (77)
    D  width of the text embeddings (1280)  E  width of the image embeddings (768)           K  codes (8192)
    Q  patch size       S  channels of a skip, 0 without one

Inside the UNet and Stage A feature maps are channels-last, (B, H, W, C): norms, linear layers, GRN and attention all
work on the last axis. `Conv2d`, `ConvTranspose2d`, `PixelShuffle`, `PixelUnshuffle` and `ReplicationPad2d` are PyTorch's
layers for that layout; `Linear` is nn.Linear, safe in fp16. They are at the end of the file, with the other plumbing.

Sources: Pernias et al., Würstchen (2023), arXiv 2306.00637; the official files of stabilityai/stable-cascade;
Woo et al., ConvNeXt V2 (2023), arXiv 2301.00808; Tan and Le, EfficientNetV2 (2021), arXiv 2104.00298; Rampas et al.,
Paella (2022), arXiv 2211.07292 (Stage A); Zhang et al., ControlNet (2023), arXiv 2302.05543; Hu et al., LoRA (2021),
arXiv 2106.09685; the original code of Stable Cascade.
"""
import itertools
import json
import math
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

HEAD_DIM = 64               # channels of every attention head
TIME_DIM = 64               # channels of the embedding of one time
FREQUENCIES = torch.exp(                                # of the time embedding: (32), fp32, the same on every device
    torch.arange(TIME_DIM // 2, dtype=torch.float32) * (-math.log(10000) / (TIME_DIM // 2 - 1)))
CLIP_TOKENS = 4             # condition tokens made from one pooled text embedding or one image embedding


class CascadeError(Exception):
    """An error that the user can fix. Its message is one line: what, where, what to do."""
    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def require(valid, message: str):
    if not valid:
        raise CascadeError(message)


# ---------------------------------------------------------------------------------------------------- the UNet
LayerNorm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)  # over channels; nothing in it is learned


def resize(x, size):
    """Bilinear with aligned corners, in fp32: (B, H, W, C) -> (B, *size, C)."""
    if x.shape[1:3] == size:
        return x
    y = F.interpolate(x.permute(0, 3, 1, 2).float(), size, mode="bilinear", align_corners=True)
    return y.permute(0, 2, 3, 1).to(x.dtype)


def add_control(x, feature_map):
    """Adds a ControlNet's feature map, resized to the grid, to the input of a residual block."""
    if feature_map is None:
        return x
    feature_map = resize(feature_map.permute(0, 2, 3, 1), x.shape[1:3])
    return x + feature_map  # (B, H, W, C)


class ResidualBlock(nn.Module):
    """R: a ConvNeXt V2 block. The first block of a level on the way up also reads the level's skip."""
    def __init__(self, c, c_skip=0):
        super().__init__()
        self.depthwise = Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = LayerNorm(c)
        self.channelwise = nn.Sequential(
            Linear(c + c_skip, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c),
            nn.Identity(),  # dropout in training
            Linear(4 * c, c))
        self.reads_skip = c_skip > 0

    def forward(self, x, t_emb, cond, skip):
        y = self.norm(self.depthwise(x))  # (B, H, W, C)
        if self.reads_skip:
            y = torch.cat([y, skip], dim=-1)  # (B, H, W, C + S)
        return x + self.channelwise(y)  # (B, H, W, C)


class GlobalResponseNorm(nn.Module):
    """Channels compete across the whole feature map (ConvNeXt V2, section 4), so it cannot be computed tile by tile."""
    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, c))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, c))

    def forward(self, x):
        squares = x.square().sum((1, 2), keepdim=True)  # (B, 1, 1, C)
        norm = squares.clamp(min=1e-30).sqrt()  # the gradient of the root is infinite at 0
        relative_norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)  # (B, 1, 1, C)
        return self.gamma * (x * relative_norm) + self.beta + x  # (B, H, W, C)


class TimestepBlock(nn.Module):
    """T: scale and shift, computed from the time embedding. Each further time condition has its own mapper."""
    def __init__(self, c, time_conditions):
        super().__init__()
        self.mapper = Linear(TIME_DIM, 2 * c)
        self.time_conditions = time_conditions
        for name in time_conditions:
            self.add_module(f"mapper_{name}", Linear(TIME_DIM, 2 * c))

    def forward(self, x, t_emb, cond, skip):
        t_embs = t_emb.split(TIME_DIM, dim=1)  # (B, 64) each
        scale_shift = self.mapper(t_embs[0])  # (B, 2 * C)
        for name, emb in zip(self.time_conditions, t_embs[1:]):
            scale_shift = scale_shift + self.get_submodule(f"mapper_{name}")(emb)
        scale, shift = scale_shift[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, C) each
        return x * (1 + scale) + shift  # (B, H, W, C)


class AttentionBlock(nn.Module):
    """A: attention. Queries come from the feature map, keys and values from it and from the condition's tokens."""
    def __init__(self, c, c_cond):
        super().__init__()
        self.norm = LayerNorm(c)
        self.attention = nn.ModuleDict({"attn": Attention(c)})
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def forward(self, x, t_emb, cond, skip):
        tokens = self.norm(x).flatten(1, 2)  # (B, T, C)
        kv = torch.cat([tokens, self.kv_mapper(cond)], dim=1)  # (B, T + M, C)
        return x + self.attention.attn(tokens, kv).view_as(x)  # (B, H, W, C)


class Attention(nn.Module):
    """Multi-head attention; the weights of query, key and value are stacked in one tensor."""
    def __init__(self, c):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = Linear(c, c)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x, kv):
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)  # (C, C) each
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)  # (C) each
        kv = kv.to(k_weight)  # (B, T + M, C)
        q = F.linear(x.to(q_weight), q_weight, q_bias)  # (B, T, C)
        k = F.linear(kv, k_weight, k_bias)  # (B, T + M, C)
        v = F.linear(kv, v_weight, v_bias)  # (B, T + M, C)
        y = multi_head_attention(q, k, v)  # (B, T, C)
        return self.out_proj(y.to(x.dtype))  # (B, T, C)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(64) + mask) v, in heads of 64 channels (Vaswani et al., 2017, eq. 1).

    q (B, T, C), k and v (B, keys, C), attn_mask (B, 1, T, keys) to be added to the scores -> (B, T, C)
    """
    q = q.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, C / 64, T, 64)
    k = k.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, C / 64, keys, 64)
    v = v.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, C / 64, keys, 64)
    y = scaled_dot_product(q, k, v, attn_mask)  # (B, C / 64, T, 64)
    return y.transpose(1, 2).flatten(2)  # (B, T, C)


@dataclass(frozen=True)
class UNetConfig:
    """Levels are listed from the outermost to the innermost, in `up` the other way round. A level is a string of block
    letters, R, T or A, run `repeat` times. In the official networks `up` mirrors `down`, and `down_repeat` is 1:

        file            widths                  down                            up_repeat       parameters
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
    latent_channels: int                        # of the latent, in and out
    patch_size: int                             # the network works on patches of patch_size x patch_size of it
    time_conditions: tuple[str, ...]            # beside r: "sca", "crp"
    text_dim: int = 1280
    image_dim: int = 0                          # of the image embeddings; Stage C only
    semantic_channels: int = 0                  # of the semantic latent; Stage B only

    @property
    def is_stage_b(self):
        return self.semantic_channels > 0

    @property
    def residual_widths(self):
        """The channels of every residual block, in the order they run."""
        levels = zip(self.widths + self.widths[::-1], self.down + self.up, self.down_repeat + self.up_repeat)
        widths = []
        for width, letters, repeat in levels:
            widths += [width] * (letters.count("R") * repeat)
        return widths


class UNet(nn.Module):
    """Stage B or Stage C: predicts the noise in a latent."""
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        c = widths[0]
        c_cond = config.c_cond
        c_patch = config.latent_channels * config.patch_size ** 2

        # conditions
        if config.is_stage_b:
            self.effnet_mapper = self._mapper(config.semantic_channels, c)
            self.pixels_mapper = self._mapper(3, c)
            self.clip_mapper = nn.Linear(config.text_dim, c_cond * CLIP_TOKENS)
        else:
            self.clip_txt_mapper = nn.Linear(config.text_dim, c_cond)
            self.clip_txt_pooled_mapper = nn.Linear(config.text_dim, c_cond * CLIP_TOKENS)
            self.clip_img_mapper = nn.Linear(config.image_dim, c_cond * CLIP_TOKENS)
        self.clip_norm = LayerNorm(c_cond)

        # input, down, up, output
        self.embedding = nn.Sequential(
            PixelUnshuffle(config.patch_size), Conv2d(c_patch, c, 1), LayerNorm(c))
        self.down_downscalers = nn.ModuleList()
        self.down_blocks = nn.ModuleList()
        self.down_repeat_mappers = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        self.up_repeat_mappers = nn.ModuleList()
        self.up_upscalers = nn.ModuleList()
        for i, width in enumerate(widths):
            downscale = self._resample(widths[i - 1], width, up=False) if i > 0 else nn.Identity()
            self.down_downscalers.append(downscale)
            self.down_blocks.append(self._level(width, config.down[i]))
            self.down_repeat_mappers.append(self._repeat_mappers(width, config.down_repeat[i]))
        for j, width in enumerate(reversed(widths)):
            i = len(widths) - 1 - j  # the level, counted from the outermost
            self.up_blocks.append(self._level(width, config.up[j], c_skip=width if j > 0 else 0))
            self.up_repeat_mappers.append(self._repeat_mappers(width, config.up_repeat[j]))
            upscale = self._resample(width, widths[i - 1], up=True) if i > 0 else nn.Identity()
            self.up_upscalers.append(upscale)
        self.clf = nn.Sequential(
            LayerNorm(c), Conv2d(c, c_patch, 1), PixelShuffle(config.patch_size))

    @staticmethod
    def _mapper(c_in, c):
        return nn.Sequential(Conv2d(c_in, 4 * c, 1), nn.GELU(), Conv2d(4 * c, c, 1), LayerNorm(c))

    def _level(self, c, letters, c_skip=0):
        blocks = nn.ModuleList()
        for i, letter in enumerate(letters):
            if letter == "R":
                blocks.append(ResidualBlock(c, c_skip if i == 0 else 0))
            elif letter == "T":
                blocks.append(TimestepBlock(c, self.config.time_conditions))
            else:
                blocks.append(AttentionBlock(c, self.config.c_cond))
        return blocks

    @staticmethod
    def _repeat_mappers(c, repeat):
        return nn.ModuleList(Conv2d(c, c, 1) for _ in range(repeat - 1))

    def _resample(self, c_in, c_out, up):
        """Change level. Stage B halves or doubles height and width with a strided convolution. Stage C keeps them with a
        1x1 convolution, which its files call `blocks.0` on the way down and `blocks.1` on the way up."""
        if self.config.is_stage_b:
            conv = ConvTranspose2d if up else Conv2d
            layer = conv(c_in, c_out, 2, stride=2)
        else:
            conv = Conv2d(c_in, c_out, 1)
            blocks = [nn.Identity(), conv] if up else [conv, nn.Identity()]
            layer = nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))
        return nn.Sequential(LayerNorm(c_in), layer)

    def embed_time(self, r: Tensor, sca: Tensor | None, crp: Tensor | None) -> Tensor:
        """Sines and cosines of r, then of each further time condition: (B, 64 * number of times), fp32."""
        given = {"sca": sca, "crp": crp}
        times = [r]
        for name in self.config.time_conditions:
            times.append(torch.zeros_like(r) if given[name] is None else given[name])
        frequencies = FREQUENCIES.to(r.device)  # (32)
        positions = torch.stack(times, dim=1) * 10000  # (B, len(times)), as large as positions in a transformer
        angles = positions[:, :, None] * frequencies  # (B, len(times), 32)
        return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)

    def embed_clip(self, pooled: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """Condition tokens (B, M, c_cond). Stage C: L from the text, 4 from the pooled text, 4 from each image.
        Stage B: 4 from the pooled text."""
        if self.config.is_stage_b:
            mapped = [self.clip_mapper(pooled)]
        else:
            if image is None:
                image = pooled.new_zeros(pooled.shape[0], self.config.image_dim)  # (B, E)
            mapped = [
                self.clip_txt_mapper(text), self.clip_txt_pooled_mapper(pooled), self.clip_img_mapper(image)]
        tokens = [y.reshape(y.shape[0], -1, self.config.c_cond) for y in mapped]
        return self.clip_norm(torch.cat(tokens, dim=1))

    def forward(self, x: Tensor, r: Tensor, clip_text_pooled: Tensor,
                clip_text: Tensor | None = None, clip_img: Tensor | None = None,
                effnet: Tensor | None = None, pixels: Tensor | None = None,
                sca: Tensor | None = None, crp: Tensor | None = None,
                control: dict[int, Tensor] | None = None) -> Tensor:
        """Predicts the noise in a latent: eps, shaped like x (fp32 if the weights are fp16).

        x                   (B, 16, Hc, Wc) for Stage C; (B, 4, Hb, Wb), even sides, for Stage B
        r                   (B,) fp32, the time as the network sees it: 1 is pure noise, 0 is none
        clip_text_pooled    (B, D) or (B, 1, D)
        clip_text           (B, L, D), all tokens, padding included; Stage C only
        clip_img            (B, E) or (B, R, E), embeddings of reference images; Stage C only; zeros if None
        effnet              (B, 16, Hc, Wc), the semantic latent; Stage B only; not added if None
        pixels              (B, 3, any height, any width) in [0, 1], an image; Stage B only; zeros if None
        sca, crp            (B,), further times; zeros if None
        control             a ControlNet's output: {number of a residual block: (B or 1, C, any height, any width)}; each
                            map is added before its block. Blocks are counted in the order they run
        """
        x = self.embedding(upcast_fp16(x))  # (B, H, W, C)
        t_emb = self.embed_time(r, sca, crp).to(x.dtype)
        cond = self.embed_clip(clip_text_pooled, clip_text, clip_img)
        if self.config.is_stage_b:
            grid = x.shape[1:3]
            if effnet is not None:
                effnet = resize(effnet.permute(0, 2, 3, 1), grid)  # (B, H, W, 16)
                x = x + self.effnet_mapper(effnet)
            if pixels is None:
                pixels = x.new_zeros(x.shape[0], 3, 8, 8)
            pixels = self.pixels_mapper(pixels.permute(0, 2, 3, 1))
            x = x + resize(pixels, grid)  # (B, H, W, C)

        skips = []
        block_numbers = itertools.count()  # of the residual blocks
        down = zip(self.down_blocks, self.down_downscalers, self.down_repeat_mappers)
        for blocks, downscale, mappers in down:
            x = downscale(x)
            x = self._run_level(blocks, mappers, x, t_emb, cond, None, control, block_numbers)
            skips.append(x)
        up = zip(self.up_blocks, self.up_upscalers, self.up_repeat_mappers)
        for blocks, upscale, mappers in up:
            skip = skips.pop()
            x = resize(x, skip.shape[1:3])  # odd sides were rounded down on the way down
            x = self._run_level(blocks, mappers, x, t_emb, cond, skip, control, block_numbers)
            x = upscale(x)
        return self.clf(x)

    @staticmethod
    def _run_level(blocks, mappers, x, t_emb, cond, skip, control, block_numbers):
        """Runs the blocks of a level, as often as it repeats, with a 1x1 convolution between the runs."""
        for i in range(1 + len(mappers)):
            if i > 0:
                x = mappers[i - 1](x)
            for block in blocks:
                if control and isinstance(block, ResidualBlock):
                    x = add_control(x, control.get(next(block_numbers)))
                x = block(x, t_emb, cond, skip)
        return x


# ---------------------------------------------------------------------------------------------------- Stage A
@dataclass(frozen=True)
class StageAConfig:
    widths: tuple[int, ...] = (192, 384)        # channels of each level, the outermost first
    latent_channels: int = 4
    deep_blocks: int = 12                       # blocks of the decoder's innermost level
    codes: int = 8192
    scale_factor: float = 0.43


class StageABlock(nn.Module):
    """A depthwise convolution and an MLP, each with a learned scale, shift and gain: six scalars."""
    def __init__(self, c):
        super().__init__()
        self.norm = LayerNorm(c)
        self.depthwise = nn.Sequential(ReplicationPad2d(1), Conv2d(c, c, 3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def modulated_norm(self, x, i):
        return self.norm(x) * (1 + self.gammas[i]) + self.gammas[i + 1]

    def forward(self, x):
        x = x + self.gammas[2] * self.depthwise(self.modulated_norm(x, 0))  # (B, H, W, C)
        x = x + self.gammas[5] * self.channelwise(self.modulated_norm(x, 3))  # (B, H, W, C)
        return x


class StageA(nn.Module):
    """A VQGAN, used as a plain autoencoder: Stage B's latents are never quantised, and only `quantise` uses the codebook."""
    def __init__(self, config: StageAConfig):
        super().__init__()
        self.config = config
        widths, c_latent = config.widths, config.latent_channels
        down = []
        for i, width in enumerate(widths):
            if i > 0:
                down.append(Conv2d(widths[i - 1], width, 4, stride=2, padding=1))
            down.append(StageABlock(width))
        to_latent = nn.Conv2d(widths[-1], c_latent, 1, bias=False)
        down.append(nn.Sequential(to_latent, nn.BatchNorm2d(c_latent)))

        up = [nn.Sequential(Conv2d(c_latent, widths[-1], 1))]
        for _ in range(config.deep_blocks):
            up.append(StageABlock(widths[-1]))
        for i in range(len(widths) - 1, 0, -1):
            up.append(ConvTranspose2d(widths[i], widths[i - 1], 4, stride=2, padding=1))
            up.append(StageABlock(widths[i - 1]))

        self.in_block = nn.Sequential(PixelUnshuffle(2), Conv2d(3 * 4, widths[0], 1))
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = nn.ModuleDict({"codebook": nn.Embedding(config.codes, c_latent)})
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(Conv2d(widths[0], 3 * 4, 1), PixelShuffle(2))

    def encode(self, image: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], sides multiples of 4 -> image latent (B, 4, H / 4, W / 4), not quantised."""
        x = self.in_block(image)  # (B, H / 2, W / 2, C)
        for block in self.down_blocks[:-1]:
            x = block(x)
        z = self.down_blocks[-1](x.permute(0, 3, 1, 2))  # (B, 4, H / 4, W / 4)
        return z / self.config.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Image latent (B, 4, H, W) -> pixels (B, 3, 4 * H, 4 * W), approximately in [0, 1], not clamped."""
        x = z * self.config.scale_factor
        x = x.permute(0, 2, 3, 1)  # (B, H, W, 4)
        for block in self.up_blocks:
            x = block(x)
        return self.out_block(x)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Image latent (B, 4, H, W) -> the nearest codes (B, 4, H, W) and their indices (B, H, W)."""
        codebook = self.vquantizer.codebook.weight  # (K, 4)
        vectors = (z * self.config.scale_factor).permute(0, 2, 3, 1)  # (B, H, W, 4)
        distances = torch.cdist(vectors.flatten(0, 2).float(), codebook.float())  # (B * H * W, K)
        indices = distances.argmin(1).view(vectors.shape[:3])  # (B, H, W)
        codes = codebook[indices].permute(0, 3, 1, 2)  # (B, 4, H, W)
        return codes / self.config.scale_factor, indices


# ---------------------------------------------------------------------------------------------------- the semantic encoder
# From here on feature maps are channels-first, (B, C, H, W): convolutions and batch norms only.

@dataclass(frozen=True)
class SemanticEncoderConfig:
    """EfficientNet-V2-S. A stage is (fused, expansion, channels, blocks)."""
    stem: int = 24
    stages: tuple[tuple[bool, int, int, int], ...] = (
        (True, 1, 24, 2), (True, 4, 48, 4), (True, 4, 64, 4),
        (False, 4, 128, 6), (False, 6, 160, 9), (False, 6, 256, 15))
    head: int = 1280
    latent_channels: int = 16


STRIDES = (1, 2, 2, 2, 1, 2)        # of the first block of each stage
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def conv_norm(c_in, c_out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, eps=1e-3))


def conv_norm_act(*args, **kwargs):
    return conv_norm(*args, **kwargs).append(nn.SiLU())


class SqueezeExcite(nn.Module):
    """Scales every channel by a function of all channels' means."""
    def __init__(self, c, c_squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(c, c_squeezed, 1)
        self.fc2 = nn.Conv2d(c_squeezed, c, 1)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        scale = self.fc2(F.silu(self.fc1(means))).sigmoid()  # (B, C, 1, 1)
        return x * scale  # (B, C, H, W)


class MBConv(nn.Module):
    """Expand, convolve, project. A fused block does the first two in one 3x3 convolution; with an expansion of 1 that
    convolution is the whole block."""
    def __init__(self, c_in, c_out, fused, expansion, stride):
        super().__init__()
        c = c_in * expansion
        if fused and expansion == 1:
            layers = [conv_norm_act(c_in, c_out, 3, stride)]
        elif fused:
            layers = [conv_norm_act(c_in, c, 3, stride), conv_norm(c, c_out)]
        else:
            depthwise = conv_norm_act(c, c, 3, stride, groups=c)
            squeeze = SqueezeExcite(c, max(1, c_in // 4))
            layers = [conv_norm_act(c_in, c), depthwise, squeeze, conv_norm(c, c_out)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        y = self.block(x)
        return x + y if self.residual else y


def efficientnet(config, c_in=3):
    """The backbone of the semantic encoder, and of a ControlNet that looks at images."""
    backbone = nn.Sequential(conv_norm_act(c_in, config.stem, 3, stride=2))
    if c_in != 3:
        backbone[0][0].padding = (0, 0)  # a ControlNet's first convolution has none; the tensors do not show it
    c = config.stem
    for (fused, expansion, width, count), stride in zip(config.stages, STRIDES):
        blocks = [MBConv(c, width, fused, expansion, stride)]
        for _ in range(count - 1):
            blocks.append(MBConv(width, width, fused, expansion, stride=1))
        backbone.append(nn.Sequential(*blocks))
        c = width
    return backbone.append(conv_norm_act(c, config.head))


class SemanticEncoder(nn.Module):
    """Pixels -> the semantic latent that Stage C learns to generate and that Stage B is conditioned on."""
    def __init__(self, config: SemanticEncoderConfig):
        super().__init__()
        self.config = config
        self.backbone = efficientnet(config)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.head, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=False))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], sides multiples of 32 -> (B, 16, H / 32, W / 32).

        It is given images at 3/4 of their size, 768 x 768 for 1024 x 1024: hence 42.67 pixels per position.
        """
        mean = image.new_tensor(IMAGENET_MEAN)[:, None, None]  # (3, 1, 1)
        std = image.new_tensor(IMAGENET_STD)[:, None, None]  # (3, 1, 1)
        features = self.backbone((image - mean) / std)  # (B, C, H / 32, W / 32)
        return self.mapper(features)


# ---------------------------------------------------------------------------------------------------- the previewer
@dataclass(frozen=True)
class PreviewerConfig:
    widths: tuple[int, ...] = (512, 256, 128, 128)      # channels at 1, 2, 4 and 8 times the latent's size
    latent_channels: int = 16


class Previewer(nn.Module):
    """Semantic latent -> a small image, to preview Stage C's progress."""
    def __init__(self, config: PreviewerConfig):
        super().__init__()
        self.config = config
        c = config.widths[0]
        convs = [nn.Conv2d(config.latent_channels, c, 1), nn.Conv2d(c, c, 3, padding=1)]
        for width in config.widths[1:]:
            convs.append(nn.ConvTranspose2d(c, width, 2, stride=2))
            convs.append(nn.Conv2d(width, width, 3, padding=1))
            c = width
        layers = []
        for conv in convs:
            layers += [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(c, 3, 1))

    def forward(self, latent: Tensor) -> Tensor:
        """(B, 16, H, W) -> pixels (B, 3, 8 * H, 8 * W), approximately in [0, 1], not clamped."""
        return self.blocks(latent)


# ---------------------------------------------------------------------------------------------------- ControlNet
CONTROL_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)          # of the official ControlNets, whose files do not store them


@dataclass(frozen=True)
class ControlNetConfig:
    hint_channels: int                          # 1: edges; 4: an image and a mask; 16: a semantic latent
    encoder: SemanticEncoderConfig | None = None        # of a hint in pixels; None: the hint is a semantic latent
    widths: tuple[int, int] = (16384, 1024)     # channels of the network for a semantic latent
    depth: int = 8                              # number of its blocks
    features: int = 1280
    blocks: tuple[int, ...] = CONTROL_BLOCKS    # the residual blocks of Stage C that get a feature map
    unet_width: int = 2048                      # Stage C's channels


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). Unlike the UNets' it is affine, with an eps of 1e-5."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.blocks = nn.Sequential(
            ChannelNorm(c), nn.GELU(), nn.Conv2d(c, c, 3, padding=1),
            ChannelNorm(c), nn.GELU(), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x):
        return x + self.blocks(x)  # (B, C, H, W)


class ControlNet(nn.Module):
    """A hint -> feature maps for some of Stage C's residual blocks. It runs once, before sampling: it sees neither the noisy
    latent nor the time nor the prompt."""
    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config = config
        if config.encoder is None:
            c_hidden, c = config.widths
            self.backbone = nn.Sequential(
                nn.Conv2d(config.hint_channels, c_hidden, 1), nn.LeakyReLU(0.2), nn.Conv2d(c_hidden, c, 1))
            for _ in range(config.depth):
                self.backbone.append(ControlBlock(c))
            self.backbone.append(nn.Conv2d(c, config.features, 1))
        else:
            self.backbone = efficientnet(config.encoder, config.hint_channels)
        self.projections = nn.ModuleList()
        for _ in config.blocks:
            self.projections.append(nn.Sequential(
                nn.Conv2d(config.features, config.features, 1, bias=False), nn.LeakyReLU(0.2),
                nn.Conv2d(config.features, config.unet_width, 1, bias=False)))

    def forward(self, hint: Tensor) -> dict[int, Tensor]:
        """{number of the residual block: (B, unet_width, Hc, Wc)}

        hint        (B, 1 or 4, 32 * Hc, 32 * Wc) in [0, 1], not normalised; or a semantic latent (B, 16, Hc, Wc)
        """
        features = self.backbone(hint)  # (B, C, Hc, Wc)
        maps = {}
        for block, projection in zip(self.config.blocks, self.projections):
            maps[block] = projection(features)
        return maps


# ---------------------------------------------------------------------------------------------------- reading files
@contextmanager
def reading(path, expected: str):
    """Wraps every read of a user's file: any failure becomes a CascadeError of one line that names the file. Only regular
    files are opened, because reading a pipe might wait forever."""
    try:
        is_file = stat.S_ISREG(os.stat(Path(path)).st_mode)
        require(is_file, f"{path}: expected {expected}, got a folder or a special file")
        yield
    except FileNotFoundError as error:
        raise CascadeError(f"{path}: there is no such file") from error
    except CascadeError as error:
        if str(path) in str(error):
            raise
        raise CascadeError(f"{path}: {error}") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in the tokenizers library is not an Exception
        if out_of_memory(error):
            raise
        fault = " ".join(str(error).split())[:200] or type(error).__name__
        raise CascadeError(f"{path}: expected {expected}, but reading it failed ({fault})") from error


def exists(path) -> bool:
    """False if there is no such file; an error if that cannot be determined, as in a folder that may not be entered."""
    try:
        return bool(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CascadeError(f"{path}: cannot be opened ({error})") from error


# Prefixes that the names of a network may have. ComfyUI packs several networks into one file.
PREFIXES = (
    "", "state_dict.", "module.", "model.", "unet.", "stage_a.", "stage_b.", "stage_c.",
    "effnet_encoder.", "previewer.", "text_encoder.", "image_encoder.",
    "model.diffusion_model.",                           # ComfyUI: Stage C or Stage B
    "vae.encoder.", "vae.previewer.", "vae.",           # the semantic encoder and the previewer, or Stage A
    "clip_l_vision.")                                   # the image encoder
UNUSED = ("logit_scale", ".position_ids", "vae.encoder.mean", "vae.encoder.std")    # endings of names that are not weights
# (part of a name in another layout, the official part), replaced in this order. Other layouts store query, key and value
# as three tensors; the official one stacks them.
NAMES = (
    ("attention.to_", "attention.attn.to_"),            # diffusers
    ("attn.to_out.0.", "attn.out_proj."),
    ("vquantizer.embedding.", "vquantizer.codebook."),
    ("attn.to_q.", "attn.in_proj_"),                    # diffusers and ComfyUI
    ("attn.to_k.", "attn.in_proj_"),
    ("attn.to_v.", "attn.in_proj_"),
    ("clip_g.", ""),                                    # ComfyUI
    ("transformer.", ""))
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")


def qkv_order(name):
    """Sorts query before key before value."""
    return [".to_v." in name, ".to_k." in name]


def official_name(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    if name.endswith("text_projection"):
        name += ".weight"
    without_text_model = r"^(text_encoder\.)?(embeddings|encoder|final_layer_norm)\."
    return re.sub(without_text_model, r"\1text_model.\2.", name)


def is_transposed(name):
    """ComfyUI's text projection is a parameter of its own, (in, out), not the weight of a linear layer."""
    return name.endswith("text_projection")


class Weights(dict):
    """A safetensors file as {official name: shape}, in any layout. Asking for a missing name is an error.

    prefix      of the names of one network in a packed file; it is removed from them
    rename      False keeps the file's own names
    """
    def __init__(self, path, prefix="", rename=True):
        self.path = Path(path)
        self.sources = {}       # official name -> the tensors in the file that, stacked, make it
        with reading(path, "a complete safetensors file, never a pickle (.pt, .ckpt, .bin)"):
            self.file = safe_open(path, framework="pt")
            self.metadata = self.file.metadata() or {}
            names = sorted(self.file.keys(), key=qkv_order)
            is_stage_b = any(name.endswith("effnet_mapper.0.weight") for name in names)
            for name in names:
                official = official_name(name) if rename else name
                if is_stage_b:  # diffusers gives this layer the name of Stage C's
                    official = official.replace("clip_txt_pooled_mapper.", "clip_mapper.")
                require(official.startswith((prefix, *PREFIXES[1:])),
                        f"tensor {name} does not belong to any network")
                if official.startswith(prefix) and not official.endswith(UNUSED):
                    self.sources.setdefault(official.removeprefix(prefix), []).append(name)
            for name, parts in self.sources.items():
                shapes = [tuple(self.file.get_slice(part).get_shape()) for part in parts]
                self[name] = shapes[0]
                if len(parts) > 1:
                    self[name] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
                elif is_transposed(parts[0]):
                    self[name] = shapes[0][::-1]

    def __missing__(self, name):
        raise CascadeError(f"{self.path}: tensor {name} is missing")

    def check_float(self, name):
        types = {self.file.get_slice(part).get_dtype() for part in self.sources[name]}
        require(types.issubset(FLOAT_TYPES), f"{self.path}: tensor {name}: expected fp32, bf16, fp16 "
                f"or fp8 e4m3, got {', '.join(types)}; quantised files cannot be read")

    def load_into(self, network, device, dtype, loras=()):
        """Gives the file's tensors, changed by the LoRAs, to a network on the meta device. At most one copy of the weights
        is made, and none if type and device stay the same: then the file is memory-mapped."""
        expected = network.state_dict()
        for name in {**expected, **self}:
            where = f"{self.path}: tensor {name}"
            require(name in expected, f"{where} does not belong to this network")
            shape = tuple(expected[name].shape)
            require(self[name] == shape, f"{where}: expected shape {shape}, got {self[name]}")
            if expected[name].is_floating_point():
                self.check_float(name)
        tensors = {name: self.tensor(name, device, dtype) for name in self}
        for name in set().union(*(lora.updates for lora in loras)):
            weight = self.tensor(name, device, torch.float32).clone()
            for lora in loras:
                lora.merge(name, weight)
            tensors[name] = weight.to(tensors[name].dtype)
        network.load_state_dict(tensors, assign=True)
        return network.requires_grad_(False).eval()

    def tensor(self, name, device="cpu", dtype=None) -> Tensor:
        self[name]  # an error if it is missing
        with reading(self.path, "a complete safetensors file"):
            parts = [self.file.get_tensor(part) for part in self.sources[name]]
        if parts[0].dtype == torch.float8_e4m3fn:       # a type to store weights in; bf16 has all of its values
            parts = [part.to(dtype or torch.bfloat16) for part in parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if is_transposed(self.sources[name][0]):
            tensor = tensor.T.contiguous()
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    def series(self, pattern, start=0, step=1):
        """The shapes of pattern.format(start), pattern.format(start + step), … up to the first that is missing."""
        shapes = []
        while pattern.format(start) in self:
            shapes.append(self[pattern.format(start)])
            start += step
        return shapes

    def setting(self, name: str, default, valid: Callable, expected: str):
        """A value from the config.json next to the file; diffusers and transformers folders have one."""
        path = self.path.with_name("config.json")
        if not exists(path):
            return default
        with reading(path, "a JSON object"):
            value = json.loads(path.read_text("utf-8")).get(name, default)
            require(valid(value), f"{path}: {name}: expected {expected}, got {value!r:.80}")
        return value


LETTERS = {"depthwise.weight": "R", "mapper.weight": "T", "kv_mapper.1.weight": "A"}    # a tensor that only it has


def unet_config(weights: Weights) -> UNetConfig:
    is_stage_b = "effnet_mapper.0.weight" in weights
    pooled = weights["clip_mapper.weight" if is_stage_b else "clip_txt_pooled_mapper.weight"]  # 4 * c_cond, D
    patch_size = 2 if is_stage_b else 1  # cannot be read off the tensors
    weights.setting("switch_level", None,
                    lambda value: not value or isinstance(value, list) and not any(value),
                    "false for every level: no official Stage C switches resolution")

    def letters(level):
        """The letters of a level's blocks, such as RTARTA."""
        blocks = {}                                     # number of the block -> its letter
        for name in weights:
            if name.startswith(f"{level}."):
                number, _, tensor = name.removeprefix(f"{level}.").partition(".")
                if tensor in LETTERS:
                    blocks[int(number)] = LETTERS[tensor]
        return "".join(blocks[number] for number in sorted(blocks))

    def repeats(mappers):
        return 1 + len(weights.series(mappers + ".{}.weight"))

    def has_time(name):
        return any(f".mapper_{name}." in tensor for tensor in weights)

    widths = [shape[0] for shape in weights.series("down_blocks.{}.0.depthwise.weight")]
    levels = range(len(widths))
    return UNetConfig(
        widths=tuple(widths),
        down=tuple(letters(f"down_blocks.{i}") for i in levels),
        up=tuple(letters(f"up_blocks.{i}") for i in levels),
        down_repeat=tuple(repeats(f"down_repeat_mappers.{i}") for i in levels),
        up_repeat=tuple(repeats(f"up_repeat_mappers.{i}") for i in levels),
        c_cond=pooled[0] // CLIP_TOKENS,
        latent_channels=weights["embedding.1.weight"][1] // patch_size ** 2,
        patch_size=patch_size,
        time_conditions=tuple(filter(has_time, ("sca", "crp"))),
        text_dim=pooled[1],
        image_dim=0 if is_stage_b else weights["clip_img_mapper.weight"][1],
        semantic_channels=weights["effnet_mapper.0.weight"][1] if is_stage_b else 0)


def stage_a_config(weights: Weights) -> StageAConfig:
    widths = [weights["in_block.1.weight"][0]]
    widths += [shape[0] for shape in weights.series("down_blocks.{}.weight", start=1, step=2)]
    codes, latent_channels = weights["vquantizer.codebook.weight"]
    deep_blocks = len(weights.series("up_blocks.{}.gammas", start=1))
    scale_factor = weights.setting(
        "scale_factor", StageAConfig.scale_factor,
        lambda value: type(value) in (int, float) and 0 < value < math.inf, "a positive number")
    return StageAConfig(tuple(widths), latent_channels, deep_blocks, codes, scale_factor)


def efficientnet_config(weights: Weights) -> SemanticEncoderConfig:
    c = stem = weights["backbone.0.0.weight"][0]
    stages = []
    for i in range(1, 1 + len(STRIDES)):
        first = f"backbone.{i}.0.block"
        hidden, _, kernel, _ = weights[f"{first}.0.0.weight"]
        projection = max(j for j in (0, 1, 3) if f"{first}.{j}.0.weight" in weights)  # the last convolution
        width = weights[f"{first}.{projection}.0.weight"][0]
        count = len(weights.series(f"backbone.{i}.{{}}.block.0.0.weight"))
        stages.append((kernel == 3, hidden // c, width, count))
        c = width
    head = weights[f"backbone.{1 + len(STRIDES)}.0.weight"][0]
    return SemanticEncoderConfig(stem, tuple(stages), head)


def semantic_encoder_config(weights: Weights) -> SemanticEncoderConfig:
    return replace(efficientnet_config(weights), latent_channels=weights["mapper.0.weight"][0])


def previewer_config(weights: Weights) -> PreviewerConfig:
    norms = weights.series("blocks.{}.weight", start=2, step=6)  # one at each resolution
    return PreviewerConfig(tuple(shape[0] for shape in norms), weights["blocks.0.weight"][1])


def controlnet_config(weights: Weights) -> ControlNetConfig:
    projections = weights.series("projections.{}.2.weight")
    blocks = CONTROL_BLOCKS
    if "blocks" in weights.metadata:
        blocks = json.loads(weights.metadata["blocks"])
        valid = isinstance(blocks, list) and all(type(block) is int for block in blocks)
        require(valid and len(set(blocks)) == len(projections),
                f"metadata: blocks: expected {len(projections)} numbers, got {blocks!r:.80}")
    require(len(projections) == len(blocks), f"{len(projections)} projections: expected 8, or in the "
            "metadata \"blocks\", a JSON list of the residual blocks that they are for")
    unet_width, features = projections[0][:2]
    common = {"features": features, "blocks": tuple(blocks), "unet_width": unet_width}
    if "backbone.0.0.weight" in weights:
        hint_channels = weights["backbone.0.0.weight"][1]
        return ControlNetConfig(hint_channels, efficientnet_config(weights), **common)
    c_hidden, hint_channels = weights["backbone.0.weight"][:2]
    widths = (c_hidden, weights["backbone.2.weight"][0])
    depth = len(weights.series("backbone.{}.blocks.0.weight", start=3))
    return ControlNetConfig(hint_channels, None, widths, depth, **common)


# {name: (a tensor that no other network has, class, function that reads its config)}
NETWORKS = {
    "stage_b": ("effnet_mapper.0.weight", UNet, unet_config),
    "stage_c": ("clip_txt_mapper.weight", UNet, unet_config),
    "stage_a": ("vquantizer.codebook.weight", StageA, stage_a_config),
    "effnet_encoder": ("mapper.0.weight", SemanticEncoder, semantic_encoder_config),
    "previewer": ("blocks.0.weight", Previewer, previewer_config),
    "controlnet": ("projections.0.0.weight", ControlNet, controlnet_config)}


def identify(path, expect: str | None = None, networks: dict = NETWORKS):
    """The name of the network in a file, its weights and its config. Only the file's header is read."""
    weights = Weights(path)
    found = {}                                          # name of a network -> prefix of its tensors
    for name, (marker, _, _) in networks.items():
        for prefix in PREFIXES:
            if prefix + marker in weights:
                found[name] = prefix
    require(expect or len(found) < 2, f"{path}: holds {', '.join(found)}; name the one to load")
    name = expect or next(iter(found), None)
    require(name in found, f"{path}: expected {expect or ' or '.join(networks)}, "
            f"got {' and '.join(found) or 'an unknown network'}")
    weights = Weights(path, found[name])
    with reading(path, f"the tensors of a {name}"):
        return name, weights, networks[name][2](weights)


def load(path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
         expect: str | None = None, networks: dict = NETWORKS,
         loras: Sequence[tuple[str | Path, float]] = ()) -> nn.Module:
    """Loads a network of an official file, in the original, the diffusers or ComfyUI's layout, ready to run.

    dtype       of the weights; None keeps the file's
    expect      the name of the network; a file without it is an error, and one with several needs it
    networks    the networks that the file may hold; text_encoder.py has its own
    loras       LoRA files and their strengths, merged into the weights; for Stage C, Stage B and the text encoder
    """
    name, weights, config = identify(path, expect, networks)
    with reading(path, f"the tensors of a {name}"), torch.device("meta"):
        network = networks[name][1](config)
    require(not loras or name in ("stage_c", "stage_b", "text_encoder"), f"{path}: a {name} takes no LoRA")
    loras = [Lora(file, strength, network) for file, strength in loras]
    return weights.load_into(network, device, dtype, loras)


# ---------------------------------------------------------------------------------------------------- LoRA
# In a LoRA file a layer is named by a prefix and its path in the network, with "_" or "." between the parts, as in
# lora_unet_up_blocks_0_2_kv_mapper_1.lora_up.weight. Layers are compared without the prefix and with "_".
LORA_PREFIXES = (
    "lora_unet_", "lora_te_",                                       # kohya; OneTrainer since 2026
    "lora_prior_unet_", "lora_prior_prior_", "lora_prior_te_",      # OneTrainer since 2024
    "lora_decoder_unet_",                                           # Stage B's, by weights/finetune.py
    "prior_", "text_encoder_", "diffusion_model_")                  # diffusers' style, ComfyUI
LORA_TENSOR = re.compile(r"(.+)[._](?:lora[._](down|up|A|B)(?:\.weight)?|(alpha))")     # layer, matrix, or alpha
# Names of the layers of an attention block; the name here; which third of the stacked rows is meant, None for all.
LORA_ATTENTION = (
    ("attention_(attn_)?(to_out|to_out_0|to_out_proj)", "attention_attn_out_proj", None),
    ("attention_attn_in_proj", "attention_attn_in_proj_weight", None),
    ("attention_(attn_)?(to_q|in_proj_0)", "attention_attn_in_proj_weight", 0),
    ("attention_(attn_)?(to_k|in_proj_1)", "attention_attn_in_proj_weight", 1),
    ("attention_(attn_)?(to_v|in_proj_2)", "attention_attn_in_proj_weight", 2))
LORA_TOKENS = ("embeddings.embeddings", "embeddings.indices")       # see text_encoder.add_tokens


class Lora:
    """What a LoRA file adds to a network's weights: strength * alpha / rank * up @ down (Hu et al., 2021, section 4.1).
    One file may hold layers of Stage C, Stage B and the text encoder; each network ignores those of the others."""
    def __init__(self, path, strength: float, network: nn.Module):
        self.path = path
        self.strength = strength
        self.updates = {}       # name of a weight -> [(third of its rows, down, up, alpha / rank)]
        state = network.state_dict()
        names = layer_names(state)
        found = {}              # (layer, third) -> {"down", "up", "alpha": tensor}
        weights = Weights(path, rename=False)
        with reading(path, "a LoRA for Stage C, Stage B or the text encoder"):
            require(weights, "expected a LoRA, got no tensors")
            for tensor in weights:
                if tensor in LORA_TOKENS:
                    continue
                layer, third, part = parse_lora_name(tensor)
                if tensor.startswith("lora_decoder_unet_"):
                    marker = "clip_mapper"              # a layer that only Stage B has
                elif layer.startswith("text_"):
                    marker = "text_projection"          # only the text encoder
                else:
                    marker = "clip_txt_mapper"          # only Stage C
                if marker not in names:                 # a layer of another network
                    continue
                require(layer in names, f"{tensor}: no such layer in Stage C, Stage B or the text encoder")
                weights.check_float(tensor)
                parts = found.setdefault((layer, third), {})
                parts[part] = weights.tensor(tensor, dtype=torch.float32)
            for (layer, third), parts in found.items():
                name = names[layer]
                rows = state[name] if third is None else state[name].chunk(3)[third]
                update = read_lora_layer(layer, parts, rows.shape)
                self.updates.setdefault(name, []).append((third, *update))

    def merge(self, name, weight):
        """Merges the LoRA into a weight, fp32, in place."""
        for third, down, up, scale in self.updates.get(name, []):
            delta = self.strength * scale * (up.to(weight) @ down.to(weight))
            require(delta.isfinite().all(), f"{self.path}: its change of {name} is not finite")
            rows = weight if third is None else weight.chunk(3)[third]
            if delta.numel() == rows.numel():
                rows += delta.view_as(rows)
            else:  # a k x k convolution: one number for all its taps
                rows += delta[..., None, None]


def layer_names(state):
    """{layer: name of its weight}. The original's files number the layers, two for every attention block."""
    names, numbered = {}, []
    for name, tensor in state.items():
        if tensor.dim() > 1:
            names[name.removesuffix(".weight").replace(".", "_")] = name
        if name.endswith(".attention.attn.out_proj.weight"):
            numbered += [name, name.replace("out_proj.weight", "in_proj_weight")]
    return names | {f"weights_{i}": name for i, name in enumerate(numbered)}


def parse_lora_name(tensor):
    """lora_unet_up_blocks_0_2_attention_attn_to_q.alpha: the layer up_blocks_0_2_attention_attn_in_proj_weight, its
    third 0, its part alpha."""
    match = LORA_TENSOR.fullmatch(tensor)
    require(match, f"{tensor}: expected a LoRA, with names such as LAYER.lora_up.weight, "
            "LAYER.lora_down.weight and LAYER.alpha")
    layer, matrix, alpha = match.groups()
    part = {"A": "down", "B": "up"}.get(matrix, matrix or alpha)
    layer = layer.replace(".", "_")
    for prefix in LORA_PREFIXES:
        layer = layer.removeprefix(prefix)
    for pattern, ours, third in LORA_ATTENTION:
        if re.search(f"{pattern}$", layer):
            return re.sub(f"{pattern}$", ours, layer), third, part
    return layer, None, part


def read_lora_layer(layer, parts, shape):
    require({"down", "up"} <= parts.keys(), f"{layer}: expected both lora_down and lora_up")
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    rows, columns = shape[:2]
    rank = len(down)
    fits = rank > 0 and up.shape == (rows, rank) and down.shape[1] in (columns, shape[1:].numel())
    require(fits, f"{layer}: expected lora_up ({rows}, rank) and lora_down (rank, {columns}), "
            f"got {tuple(up.shape)} and {tuple(down.shape)}")
    default = 1 if layer.startswith("weights_") else rank  # without alpha only the original's files divide by the rank
    alpha = parts.get("alpha", torch.tensor(default))
    require(alpha.numel() == 1, f"{layer}: expected one alpha")
    return down, up, alpha.item() / rank


# ---------------------------------------------------------------------------------------------------- plumbing
# Skip on first reading: memory layout, number formats and speed. Nothing here changes the mathematics.

def channels_first(x):
    """(B, H, W, C) -> (B, C, H, W), without a copy, except on MPS, whose convolutions want contiguous tensors."""
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if x.device.type == "mps" else x


class Linear(nn.Linear):
    """(…, C) -> (…, C'), also where x is fp32 and the weights are fp16."""
    def forward(self, x):
        return scaled_linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d for channels-last feature maps."""
    def forward(self, x):
        if self.kernel_size == (1, 1):  # a linear layer
            return scaled_linear(x, self.weight.flatten(1), self.bias)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.conv2d(channels_first(x), weight, bias, self.stride, self.padding, groups=self.groups)
        return y.permute(0, 2, 3, 1)


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d for channels-last feature maps."""
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.conv_transpose2d(channels_first(x), weight, bias, self.stride, self.padding)
        return y.permute(0, 2, 3, 1)


class ReplicationPad2d(nn.ReplicationPad2d):
    """nn.ReplicationPad2d for channels-last feature maps."""
    def forward(self, x):
        y = super().forward(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).contiguous()       # CUDA's padding returns a channels-first tensor


class PixelUnshuffle(nn.PixelUnshuffle):
    """The way in: (B, C, Q * H, Q * W) -> (B, H, W, C * Q * Q)."""
    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)


class PixelShuffle(nn.PixelShuffle):
    """The way out: (B, H, W, C * Q * Q) -> (B, C, Q * H, Q * W)."""
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2))


def upcast_fp16(x):
    """A UNet's feature maps exceed the range of fp16, which ends at 65504. With fp16 weights they are therefore kept in
    fp32, and only the matrix products are fp16; layers see that from the types of x and of their weights."""
    return x.float() if x.dtype == torch.float16 else x


def scaled_linear(x, weight, bias):
    """F.linear in the weights' type. If x is wider, each row is scaled to 32 at most and its product scaled back: fp16
    overflows only where the layer makes a row more than 2047 times larger."""
    if x.dtype.itemsize <= weight.dtype.itemsize:
        return F.linear(x, weight, bias)
    largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True)
    scale = (largest / 32).clamp(min=1)
    return F.linear((x / scale).to(weight.dtype), weight) * scale + bias


def scaled_dot_product(q, k, v, attn_mask=None):
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention_by_head(q, k, v, attn_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask)


def attention_by_head(q, k, v, attn_mask=None):
    """Attention as plain matrix products, a few heads at a time. In bf16 on a CPU a step of Stage B takes 0.83, of Stage C
    0.90 of the time that it takes with PyTorch's kernel; in fp32 and elsewhere that kernel is faster."""
    heads = max(1, 2 ** 21 // (q.shape[2] * k.shape[2]))
    outputs = []
    for q, k, v in zip(q.split(heads, dim=1), k.split(heads, dim=1), v.split(heads, dim=1)):
        scores = q * HEAD_DIM ** -0.5 @ k.transpose(2, 3)
        if attn_mask is not None:
            scores = scores + attn_mask
        outputs.append(scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v)
    return torch.cat(outputs, dim=1)


def out_of_memory(error):
    """CUDA has an error of its own; CPU and MPS raise a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory: you tried", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
