"""Stable Cascade, from a prompt to an image.

    python cascade.py "a large red circle on a white background"
    python cascade.py "a small blue star" --images 4 --seed 7 -o star.png       star-0.png to star-3.png, seeds 7 to 10
    python cascade.py --prompt-file prompts.txt -o out/image.png                one prompt per line: out/image-0.png, …
    python cascade.py "a circle" --negative "red" --guidance 6
    python cascade.py "a green heart" -o heart.safetensors                      Stage C only: save semantic latents
    python cascade.py --latents heart.safetensors -o heart.png                  Stage B and A: decode them
    python cascade.py "a blue star" --animate star.gif                          noise becoming the image
    python cascade.py --variation-image a.png                                   a variation of an image
    python cascade.py "a blue star" --init-image a.png --strength 0.7           image to image
    python cascade.py "a blue star" --init-image a.png --mask b.png             repaint where the mask is white
    python cascade.py "a blue star" --control canny --hint a.png                draw along the edges of an image
    python cascade.py "a dog" --lora dog.safetensors:0.8                        with a LoRA, at strength 0.8
    python cascade.py --reconstruct a.png                                       to the semantic latent and back
    python cascade.py "an astronaut" --weights weights/official --lite --dtype bf16

The text encoder reads the prompt. Stage C generates a semantic latent from it, 42.67 times smaller than the image on
each side. Stage B generates an image latent from that, 4 times smaller. Stage A decodes it into pixels. Each network is
loaded when it is needed and released afterwards.
"""
# The letters in shape comments are explained in model.py; here H, W are always pixels.
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # until main: Ctrl-C ends the imports without a traceback

import argparse
import ctypes
import io
import itertools
import json
import math
import numbers
import os
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import model
import text_encoder
from model import CascadeError, Weights, exists, out_of_memory, reading, require
from sampler import RECIPES, draw_noise, generators, sample

COMPRESSION = 42.67                                     # pixels per position of the semantic latent: the default
TINY = Path(__file__).resolve().parent / "weights" / "tiny"
NETWORKS = model.NETWORKS | text_encoder.NETWORKS
CHANNELS = {                                            # of latents, which the networks hand to each other
    "latent_channels": {"stage_c": 16, "stage_b": 4, "stage_a": 4, "effnet_encoder": 16, "previewer": 16},
    "semantic_channels": {"stage_b": 16, "stage_c": 0},
    "hint_channels": {
        "controlnet/canny": 1, "controlnet/inpainting": 4, "controlnet/super_resolution": 16}}
CONTROLS = ("canny", "inpainting", "super_resolution")  # kinds of ControlNet
NETWORK_NAMES = (*NETWORKS, *CHANNELS["hint_channels"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("pil", "np", "pt", "latent")
LITE = {False: (), True: ("stage_c", "stage_b"), "prior": ("stage_c",), "decoder": ("stage_b",)}
OneImage = str | Path | Image.Image                     # a path or a PIL image
Device = str | torch.device
Dtype = str | torch.dtype
Steps = int | list[float]                               # a number of steps, or the times themselves


# ---------------------------------------------------------------------------------------------------- the pipeline
@dataclass(frozen=True)
class TextEmbeddings:
    """The text embeddings of P prompts: P conditional rows, then P unconditional rows."""
    hidden: Tensor  # (2P, L, D)
    pooled: Tensor  # (2P, 1, D)

    def to(self, device: Device) -> "TextEmbeddings":
        return TextEmbeddings(self.hidden.to(device), self.pooled.to(device))

    def check(self):
        check_tensor("text embeddings: hidden", self.hidden, (None, None, None))
        check_tensor("text embeddings: pooled", self.pooled, (len(self.hidden), 1, None))
        require(len(self.hidden) % 2 == 0, "text embeddings: expected an even number of rows")


Prompts = str | list[str] | TextEmbeddings


def append_zeros(conditional):
    """Conditional rows, followed by as many unconditional rows of zeros."""
    return torch.cat([conditional, torch.zeros_like(conditional)])


def skip_noise_of_prior(noise_generators, shape, prior_steps):
    """In diffusers both stages draw from the same generator. Skip what Stage C drew from it: the initial noise, then once
    per step. None: Stage C did not run."""
    if prior_steps is not None:
        check(prior_steps=prior_steps)
        for _ in range(1 + prior_steps):
            draw_noise(noise_generators, shape, "cpu")


class Cascade:
    """The networks of one weights folder: original single files, diffusers folders, ComfyUI's files, or a mixture.

    device          "auto": CUDA if it is available, else MPS, else the CPU
    dtype           "auto": fp32 on a CPU and on MPS; on CUDA bf16 if the GPU has it, else fp16
    lite            True: the lite Stage C and Stage B; "prior" or "decoder": only one of them
    decoder_dtype   dtype of Stage B and A (default: dtype)
    keep            keep networks in memory; otherwise every call loads each of them again
    progress        show progress bars
    loras           LoRA files for Stage C and the text encoder, [(file, strength), ...]
    tokens          {new token: the word that it starts from}, for LoRAs with new tokens, in the order of training

    On CUDA, PyTorch computes fp32 convolutions in TF32 and may sum products of bf16 or fp16 in these types, unless a
    script calls `accumulate_in_fp32`, as the command does.
    """
    def __init__(self, folder: str | Path = TINY, device: Device = "auto", dtype: Dtype = "auto",
                 lite: bool | str = False, decoder_dtype: Dtype | None = None, keep: bool = False,
                 progress: bool = False, loras: list[tuple[str | Path, float]] = (),
                 tokens: dict[str, str] | None = None):
        self.folder = check_folder(folder)
        self.device = check_device(device)
        prior_dtype = check_dtype("dtype", dtype, self.device)
        decoder_dtype = prior_dtype if decoder_dtype is None else decoder_dtype
        decoder_dtype = check_dtype("decoder_dtype", decoder_dtype, self.device)
        self.dtypes = dict.fromkeys(NETWORK_NAMES, prior_dtype)
        self.dtypes["stage_b"] = self.dtypes["stage_a"] = decoder_dtype
        check(lite=lite)
        self.lite = LITE[lite]
        self.loras = check_loras(loras)
        self.tokens = check_tokens({} if tokens is None else tokens)
        self.keep, self.progress = keep, progress
        self.kept = {}

    @torch.no_grad()
    def __call__(self, prompts: Prompts = "", negative: str | list[str] = "", *,
                 width: int | None = None, height: int | None = None, images: int = 1, seed: int = 0,
                 compression: float = COMPRESSION, steps: Steps = 20, guidance: float = 4.0,
                 decoder_steps: Steps = 10, decoder_guidance: float | None = None,
                 recipe: str = "diffusers", output: str = "pil",
                 variation_images: list | OneImage | Tensor | None = None,
                 init_image: OneImage | Tensor | None = None, strength: float = 0.8,
                 interval: tuple[float, float] = (0.0, 1.0), callback: Callable | None = None,
                 control: str | None = None, hint: OneImage | Tensor | None = None,
                 mask: OneImage | None = None, control_strength: float = 1.0):
        """Prompts -> images, `images` for each prompt; image i of the batch has the seed `seed + i`. See `prior`
        and `decode` for the arguments."""
        check(decoder_steps=decoder_steps, output=output)
        if decoder_guidance is not None:
            check(decoder_guidance=decoder_guidance)
        for name in ("text_encoder", "stage_c", "stage_b", "stage_a"):
            self.file(name)  # a missing file is an error now, not after Stage C
        width, height = self.size(width, height, control, hint)
        text = self.encode_prompt(prompts, negative)
        latents = self.prior(
            text, width=width, height=height, compression=compression, images=images, seed=seed,
            steps=steps, guidance=guidance, recipe=recipe, variation_images=variation_images,
            init_image=init_image, strength=strength, interval=interval, callback=callback,
            control=control, hint=hint, mask=mask, control_strength=control_strength)
        prior_steps = count_steps(steps, 1.0 if init_image is None else strength)
        return self.decode(
            latents, text, width=width, height=height, compression=compression, seed=seed,
            steps=decoder_steps, guidance=decoder_guidance, recipe=recipe, prior_steps=prior_steps,
            output=output)

    @torch.no_grad()
    def prior(self, prompts: Prompts = "", negative: str | list[str] = "", *,
              width: int | None = None, height: int | None = None, images: int = 1, seed: int = 0,
              compression: float = COMPRESSION, steps: Steps = 20, guidance: float = 4.0,
              recipe: str = "diffusers",
              variation_images: list | OneImage | Tensor | None = None,
              init_image: OneImage | Tensor | None = None, strength: float = 0.8,
              interval: tuple[float, float] = (0.0, 1.0), callback: Callable | None = None,
              control: str | None = None, hint: OneImage | Tensor | None = None,
              mask: OneImage | None = None, control_strength: float = 1.0) -> Tensor:
        """Stage C: prompts -> semantic latents (N, 16, Hc, Wc), fp32.

        prompts             strings, or TextEmbeddings, which include the negative prompts
        compression         pixels per position of the semantic latent; up to 64 for large images
        steps               a number, or a list of falling times, such as [1, 0.8, 0.5, 0]; then strength is not used
        variation_images    reference images, or their CLIP embeddings (R, E)
        init_image          image to image: start from this image, or from a semantic latent (1 or N, 16, Hc, Wc), noised
                            to t = strength; int(steps * strength) steps remain
        recipe, interval    see sampler.py
        callback            callback(step, x0) after every step, from 1; x0 is the predicted clean latent
        control, hint       the kind of ControlNet, and the image that it sees, or the network's input as a tensor
        mask                image of the initial or hint image's size: only what is white (above 127) is painted
        control_strength    factor of the ControlNet's feature maps
        """
        check(steps=steps, guidance=guidance, images=images, strength=strength)
        check(recipe=recipe, interval=interval, control_strength=control_strength)
        check_control(control, hint, mask, init_image)
        width, height = self.size(width, height, control, hint)
        text = self.encode_prompt(prompts, negative)
        N = images * len(text.pooled) // 2
        noise_generators = generators(check_seeds(seed, N), N)
        shape = (16, *semantic_sides(width, height, compression))
        condition = {"clip_text": text.hidden.repeat_interleave(images, dim=0),  # (2 * N, L, D)
                     "clip_text_pooled": text.pooled.repeat_interleave(images, dim=0)}
        if variation_images is not None:
            embeddings = self.encode_image(variation_images)  # (R, E)
            condition["clip_img"] = append_zeros(embeddings.expand(N, -1, -1))  # (2 * N, R, E)
        extras = {}
        if control is not None:
            maps = self._control_maps(control, hint, mask, width, height, compression)
            extras["control"] = {block: control_strength * value for block, value in maps.items()}
        if init_image is not None:
            init_latent = self.encode_semantic(init_image, width, height, compression)  # (1 or N, 16, Hc, Wc)
            count = len(init_latent)
            require(count in (1, N), f"init_image: expected 1 or {N} latents, got {count}")
            extras |= {"init_latent": init_latent, "strength": strength}
            if mask is not None:
                white = load_mask(mask, init_image, width, height)  # (1, 1, H, W)
                extras["mask"] = F.adaptive_max_pool2d(white, shape[1:]).bool()  # (1, 1, Hc, Wc)
            if not isinstance(steps, list):
                steps = int(steps * strength)
            require(steps, f"strength: {strength} leaves no step; expected more of either")
        recipe = replace(RECIPES[recipe], interval=tuple(interval))
        return self._denoise("stage_c", shape, condition, steps, guidance, noise_generators, recipe,
                             callback, **extras)

    @torch.no_grad()
    def decode(self, latents: Tensor, prompts: Prompts = "", negative: str | list[str] = "", *,
               width: int | None = None, height: int | None = None, seed: int = 0,
               compression: float = COMPRESSION, steps: Steps = 10, guidance: float | None = None,
               recipe: str = "diffusers", prior_steps: int | None = 20, output: str = "pil",
               callback: Callable | None = None):
        """Stage B and A: semantic latents (N, 16, Hc, Wc) -> N images of exactly width x height pixels.

        prompts         the prompts of the latents, in the same order, or their TextEmbeddings
        width, height   default: the latents' sides, times the compression
        guidance        default: the recipe's, 1.1 for "original", else none
        prior_steps     Stage C's steps, whose noise is skipped, as in diffusers; None: skip nothing
        output          "pil": a list of images; "np": (N, H, W, 3), "pt": (N, 3, H, W), fp32 in [0, 1]; "latent": the image
                        latents (N, 4, Hb, Wb)
        callback        as for `prior`; x0 is an image latent
        """
        width, height = self._decoded_size(latents, width, height, compression)
        check(steps=steps, output=output, recipe=recipe)
        text = self.encode_prompt(prompts, negative)
        N, P = len(latents), len(text.pooled) // 2
        require(N % P == 0, f"{N} latents for {P} prompts: expected a multiple of the prompts' number")
        recipe = replace(RECIPES[recipe], shift=RECIPES[recipe].decoder_shift)
        guidance = recipe.decoder_guidance if guidance is None else guidance
        check(guidance=guidance)
        noise_generators = generators(check_seeds(seed, N), N)
        skip_noise_of_prior(noise_generators, latents.shape[1:], prior_steps)
        condition = {"clip_text_pooled": text.pooled.repeat_interleave(N // P, dim=0),  # (2 * N, 1, D)
                     "effnet": append_zeros(latents)}  # (2 * N, 16, Hc, Wc)
        shape = (4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))  # even, for Stage B's patches
        z = self._denoise("stage_b", shape, condition, steps, guidance, noise_generators, recipe,
                          callback)
        if output == "latent":
            return z
        return to_output(self._decode_pixels(z)[:, :, :height, :width], output)

    def _decoded_size(self, latents, width, height, compression):
        check(compression=compression)
        check_tensor("latents", latents, (None, 16, None, None))
        Hc, Wc = latents.shape[2:]
        width = int(Wc * compression) if width is None else width
        height = int(Hc * compression) if height is None else height
        check(width=width, height=height)
        check_tensor("latents", latents, (None, 16, *semantic_sides(width, height, compression)))
        return width, height

    def _denoise(self, name, shape, condition, steps, guidance, noise_generators, recipe,
                 callback=None, **extras):
        """Stage B or C: noise -> the last latents (N, *shape), fp32."""
        require(callback is None or callable(callback), "callback: expected a function")
        unet = self.network(name)
        self._check_condition(name, unet.config, condition)
        self._check_control(name, unet.config, extras.get("control", {}))
        latents = sample(
            unet, shape, condition, steps, guidance, noise_generators, recipe, **extras)
        steps = count_steps(steps)
        progress = tqdm(latents, label(name), steps, disable=not self.progress)
        finite = []                                     # after each step, on the device
        for i, (x, x0) in enumerate(progress, start=1):
            finite.append(x.isfinite().all())
            if i == steps or callback or self.device.type == "cpu":  # elsewhere reading it waits for the device
                failed = 1 + int(torch.stack(finite).int().argmin())  # the first non-finite step
                self.check_finite(name, x, f" after step {failed} of {steps}")
            if callback:
                callback(i, x0)
        return x0 if recipe.return_x0 else x

    def _check_condition(self, name, config, condition):
        """Do the embeddings have the widths that this network takes?"""
        widths = {"clip_text": config.text_dim, "clip_text_pooled": config.text_dim,
                  "clip_img": config.image_dim}
        for key in condition.keys() & widths:
            check_tensor(f"{self.file(name)}: {key}", condition[key], (None, None, widths[key]))

    def _check_control(self, name, config, control):
        """Checks that the ControlNet's feature maps fit the residual blocks of this network."""
        widths = dict(enumerate(config.residual_widths))
        for block, feature_map in control.items():
            width, channels = widths.get(block, 0), feature_map.shape[1]
            require(width == channels, f"{self.file(name)}: the ControlNet is for another Stage C: it has "
                    f"{channels} channels for residual block {block}, expected {width}")

    def _decode_pixels(self, z):
        """Stage A, one image at a time: (N, 4, Hb, Wb) -> (N, 3, 4 * Hb, 4 * Wb) in [0, 1], fp32."""
        stage_a = self.network("stage_a")
        pixels = [stage_a.decode(latent[None].to(self.dtypes["stage_a"])).float() for latent in z]
        return self.check_finite("stage_a", torch.cat(pixels)).clamp(0, 1)

    @torch.no_grad()
    def encode_prompt(self, prompts: Prompts, negative: str | list[str] = "") -> TextEmbeddings:
        """Embeds P prompts and their negative prompts, one for all or one for each. TextEmbeddings are returned
        as they are."""
        if isinstance(prompts, TextEmbeddings):
            require(negative == "", "negative: expected none, as TextEmbeddings include it")
            prompts.check()
            return prompts.to(self.device)
        prompts = check_strings("prompts", prompts)
        negative = check_strings("negative", negative)
        if len(negative) == 1:
            negative = negative * len(prompts)
        require(len(negative) == len(prompts),
                f"negative: expected 1 or {len(prompts)} prompts, got {len(negative)}")
        encoder = self.network("text_encoder")
        tokenizer = self._tokenizer(encoder.config)
        unique = list(dict.fromkeys(prompts + negative))
        ids, mask = tokenizer(unique)
        require(ids.max() < encoder.config.vocabulary, f"{self.folder / 'tokenizer'}: expected "
                f"ids below {encoder.config.vocabulary}, got {ids.max()}")
        hidden, pooled = encoder(ids.to(self.device), mask.to(self.device))
        self.check_finite("text_encoder", hidden)
        self.check_finite("text_encoder", pooled)
        order = [unique.index(text) for text in prompts + negative]
        return TextEmbeddings(hidden[order], pooled[order])

    def _tokenizer(self, config):
        tokenizer = self.kept.get("tokenizer")
        if tokenizer is None:
            tokenizer = text_encoder.Tokenizer(
                self.folder / "tokenizer", config.length, self.tokens)
            require(tokenizer.end == config.end, f"{self.folder / 'tokenizer'}: expected the text "
                    f"encoder's end token {config.end}, got {tokenizer.end}")
        if self.keep:
            self.kept["tokenizer"] = tokenizer
        return tokenizer

    @torch.no_grad()
    def encode_image(self, images: list | OneImage | Tensor) -> Tensor:
        """CLIP embeddings (R, E) of reference images. Embeddings are returned as they are."""
        if torch.is_tensor(images):
            check_tensor("variation_images", images, (None, None))
            return images
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        require(images, "variation_images: expected at least one image")
        opened = [load_image(image) for image in images]
        encoder = self.network("image_encoder")
        side = encoder.config.side
        pixels = torch.stack([text_encoder.clip_preprocess(image, side) for image in opened])
        embeddings = encoder(pixels.to(self.device, self.dtypes["image_encoder"]))
        return self.check_finite("image_encoder", embeddings)

    @torch.no_grad()
    def encode_semantic(self, image: OneImage | Tensor, width: int | None = None,
                        height: int | None = None, compression: float = COMPRESSION) -> Tensor:
        """The semantic latent (1, 16, Hc, Wc), fp32, of an image that is resized and cropped to width x height. Latents
        are returned as they are."""
        width, height = self.size(width, height)
        Hc, Wc = semantic_sides(width, height, compression)
        if torch.is_tensor(image):
            check_tensor("init_image", image, (None, 16, Hc, Wc))
            return image
        return self.encode_pixels(load_pixels(image, width, height, compression))

    def encode_pixels(self, pixels):
        """(1, 3, 32 * Hc, 32 * Wc) -> the semantic latent (1, 16, Hc, Wc), fp32."""
        encoder = self.network("effnet_encoder")
        latent = encoder(pixels.to(self.device, self.dtypes["effnet_encoder"]))
        return self.check_finite("effnet_encoder", latent.float())

    def _control_maps(self, control, hint, mask, width, height, compression):
        """The ControlNet's feature maps for some of Stage C's residual blocks."""
        name = f"controlnet/{control}"
        self.file(name)  # a missing file is an error now
        if torch.is_tensor(hint):
            check_tensor("hint", hint, (1, CHANNELS["hint_channels"][name], None, None))
            smallest = 1 if control == "super_resolution" else 32
            require(min(hint.shape[2:]) >= smallest, f"hint: expected sides of {smallest} or more")
        elif control == "canny":
            hint = canny_hint(load_pixels(hint, width, height, compression))
        elif control == "inpainting":
            Hc, Wc = semantic_sides(width, height, compression)
            pixels = load_pixels(hint, width, height, compression)  # (1, 3, 32 * Hc, 32 * Wc)
            white = load_mask(mask, hint, width, height)  # (1, 1, H, W)
            white = F.adaptive_max_pool2d(white, (32 * Hc, 32 * Wc))  # (1, 1, 32 * Hc, 32 * Wc)
            hint = torch.cat([pixels.maximum(white), white], dim=1)  # (1, 4, 32 * Hc, 32 * Wc)
        else:
            latent = self.encode_pixels(load_pixels(hint, width // 2, height // 2, compression))
            hint = F.interpolate(latent, scale_factor=2, mode="nearest")
        maps = self.network(name)(hint.to(self.device, self.dtypes[name]))
        for value in maps.values():
            self.check_finite(name, value)
        return maps

    def network(self, name: str) -> torch.nn.Module:
        """The network with this name in NETWORKS, ready to run."""
        check(network=name)
        network = self.kept.get(name)
        if network is None:
            if self.device.type in ("cuda", "mps"):     # the memory of the previous network
                getattr(torch, self.device.type).empty_cache()
            network = self._load(name)
            for field, channels in CHANNELS.items():
                found = getattr(network.config, field, None)
                require(found == channels.get(name), f"{self.file(name)}: expected {field} "
                        f"{channels.get(name)}, got {found}")
        if self.keep:
            self.kept[name] = network
        return network

    def _load(self, name):
        where = self.file(name), self.device, self.dtypes[name]
        if name == "text_encoder":
            words = []
            if self.tokens:
                bpe = text_encoder.read_tokenizer(self.folder / "tokenizer")
                for word in self.tokens.values():
                    words.append(bpe.encode(word, add_special_tokens=False).ids)
            return text_encoder.load(*where, name, self.loras, words)
        loras = self.loras if name in ("stage_c", "stage_b") else ()
        return model.load(*where, name.split("/")[0], NETWORKS, loras)

    def file(self, name: str) -> Path:
        return find_file(self.folder, f"{name}_lite" if name in self.lite else name, self.dtypes[name])

    def size(self, width: int | None, height: int | None, control: str | None = None,
             hint: OneImage | Tensor | None = None) -> tuple[int, int]:
        """Fills in None with the size of the hint image, for super-resolution twice that, else with the size in the Stage C
        file's metadata, which it was trained for, else with 1024."""
        if (width is None or height is None) and hint is not None and not torch.is_tensor(hint):
            factor = 2 if control == "super_resolution" else 1
            hint_width, hint_height = load_image(hint).size
            width = factor * hint_width if width is None else width
            height = factor * hint_height if height is None else height
        if width is None or height is None:
            weights = Weights(self.file("stage_c"))
            with reading(weights.path, "a valid image size in the metadata"):
                trained_width = int(weights.metadata.get("width", 1024))
                trained_height = int(weights.metadata.get("height", 1024))
                check(width=trained_width, height=trained_height)
            width = trained_width if width is None else width
            height = trained_height if height is None else height
        check(width=width, height=height)
        return int(width), int(height)

    def check_finite(self, name, tensor, when=""):
        require(tensor.isfinite().all(),
                f"{label(name)}: the output is not finite{when}; {self.file(name)} may be damaged, or its "
                f"numbers too large for {self.dtypes[name]}: try bf16 or fp32")
        return tensor


# ---------------------------------------------------------------------------------------------------- checks and sizes
LIMITS = {
    "width": (int, 64, 8192), "height": (int, 64, 8192), "images": (int, 1, 1000),
    "seed": (int, 0, 2 ** 32 - 1),                      # CPU generators use 32 bits
    "compression": (float, 4, 128),
    "steps": (int, 1, 1000), "decoder_steps": (int, 1, 1000), "prior_steps": (int, 0, 1000),
    "guidance": (float, 0, 100), "decoder_guidance": (float, 0, 100), "strength": (float, 0, 1),
    "control_strength": (float, 0, 100), "lora_strength": (float, -100, 100)}
CHOICES = {"recipe": RECIPES, "output": OUTPUTS, "lite": LITE, "network": NETWORK_NAMES,
           "control": CONTROLS}


def check(**values):
    """Raises an error that names the first value that is not valid."""
    for name, value in values.items():
        if name.endswith("interval"):
            expected = "two times from 0 to 1, the lower one first"
            valid = isinstance(value, (list, tuple)) and all(isinstance(t, numbers.Real) for t in value)
            valid = valid and len(value) == 2 and 0 <= value[0] <= value[1] <= 1
        elif name in ("steps", "decoder_steps") and isinstance(value, list):
            expected = "at least two times that fall, from 1 at most to 0 at least"
            valid = len(value) > 1 and all(isinstance(t, numbers.Real) and 0 <= t <= 1 for t in value)
            valid = valid and value == sorted(set(value), reverse=True)
        elif name in CHOICES:
            expected = f"one of {', '.join(map(str, CHOICES[name]))}"
            valid = isinstance(value, (str, bool)) and value in CHOICES[name]
        else:
            kind, low, high = LIMITS[name]
            expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
            valid = isinstance(value, numbers.Integral if kind is int else numbers.Real)
            valid = valid and not isinstance(value, bool) and low <= value <= high
        require(valid, f"{name}: expected {expected}, got {value!r:.80}")


def check_seeds(first, count):
    check(seed=first)
    last = int(first) + count - 1
    limit = LIMITS["seed"][2]
    require(last <= limit, f"seed: {count} images need seeds up to {last}, expected {limit} at most")
    return int(first)


def check_control(control, hint, mask, init_image):
    if control is not None:
        check(control=control)
    require((control is None) == (hint is None), "control, hint: expected both or neither")
    masked_hint = control == "inpainting" and not torch.is_tensor(hint)
    require(mask is not None or not masked_hint, "control inpainting: needs a mask")
    require(mask is None or masked_hint or init_image is not None,
            "mask: needs an init_image, or control inpainting with a hint image")


def check_loras(loras):
    valid = isinstance(loras, (list, tuple))
    valid = valid and all(isinstance(lora, (list, tuple)) and len(lora) == 2 for lora in loras)
    valid = valid and all(isinstance(file, (str, Path)) and str(file) for file, _ in loras)
    require(valid, f"loras: expected a list of (file, strength), got {loras!r:.80}")
    for _, strength in loras:
        check(lora_strength=strength)
    return list(loras)


def check_tokens(tokens):
    require(isinstance(tokens, dict), f"tokens: expected {{new token: word}}, got {tokens!r:.80}")
    for token, word in tokens.items():
        check_strings("tokens", [token, word])
        require(token.strip() and word.strip(), f"tokens: expected text, got {token!r:.80}: {word!r:.80}")
    return tokens


def check_folder(folder):
    try:
        os.scandir(folder).close()
        return Path(folder)
    except (OSError, TypeError, ValueError) as error:
        raise CascadeError(f"{folder}: cannot open this folder ({error})") from error


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device):
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def check_device(device):
    device = default_device() if device == "auto" else device
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except Exception as error:  # each backend raises its own
        reason = str(error).split("\n")[0]
        raise CascadeError(f"device: {device!r} is not available ({reason}); try cpu") from error


def check_dtype(name, dtype, device):
    if isinstance(dtype, str) and dtype == "auto":
        return default_dtype(device)
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    known = isinstance(found, torch.dtype) and found in DTYPES.values()
    require(known, f"{name}: expected one of auto, {', '.join(DTYPES)}, got {dtype!r:.80}")
    if found == torch.bfloat16 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        require(capability[0] >= 8, f"{name}: {device} has no bf16; use fp16 or fp32")
    return found


def check_strings(name, value):
    """A string or a list of strings -> a list of strings."""
    found = [value] if isinstance(value, str) else value
    valid = isinstance(found, (list, tuple)) and all(isinstance(text, str) for text in found)
    require(valid and found, f"{name}: expected a string or a list of strings, got {value!r:.80}")
    require(all(map(is_utf8, found)), f"{name}: expected UTF-8, got {value!r:.80}")
    return list(found)


def is_utf8(text):
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_tensor(name, tensor, shape):
    """Checks for finite floating-point values of this shape; None stands for any size."""
    kind = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
    is_float = torch.is_tensor(tensor) and tensor.is_floating_point()
    require(is_float, f"{name}: expected a floating-point tensor, got {kind}")
    fits = tensor.dim() == len(shape) and tensor.numel() > 0
    fits = fits and all(size in (None, found) for size, found in zip(shape, tensor.shape))
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{name}: expected the shape ({sizes}), got {tuple(tensor.shape)}")
    require(tensor.isfinite().all(), f"{name}: expected finite values, got NaN or infinity")


def semantic_sides(width, height, compression):
    check(compression=compression)
    return math.ceil(height / compression), math.ceil(width / compression)


def count_steps(steps, strength=1.0):
    """How many denoising steps: those of a list of times, or of a number what `strength` leaves."""
    return len(steps) - 1 if isinstance(steps, list) else int(steps * strength)


def label(name):
    return name.replace("_", " ").title()


# ---------------------------------------------------------------------------------------------------- files and images
FOLDERS = {"stage_c": "prior", "stage_c_lite": "prior_lite", "stage_a": "vqgan",
           "stage_b": "decoder", "stage_b_lite": "decoder_lite"}        # of the diffusers layout


PACKED = {"stable_cascade_stage_c": ("stage_c", "effnet_encoder", "previewer", "text_encoder", "image_encoder"),
          "stable_cascade_stage_b": ("stage_b", "stage_a", "text_encoder")}     # ComfyUI's files
ENDINGS = {torch.float32: ("", ".bf16", "_bf16", ".fp16", "_fp16"),     # of a file's name, the fitting type first
           torch.bfloat16: (".bf16", "_bf16", "", ".fp16", "_fp16"),
           torch.float16: (".fp16", "_fp16", "", ".bf16", "_bf16")}


def find_file(folder, name, dtype):
    """The file of a network: the original single file, the diffusers folder's, or ComfyUI's packed file."""
    places = [f"{name}/model"] if name in text_encoder.NETWORKS else [name]
    if name in FOLDERS:
        places.append(f"{FOLDERS[name]}/diffusion_pytorch_model")
    for packed, names in PACKED.items():
        if name in names:
            places += [packed, f"comfyui_checkpoints/{packed}"]
    for place, ending in itertools.product(places, ENDINGS[dtype]):
        path = folder / f"{place}{ending}.safetensors"
        if exists(path):
            return path
    files = " or ".join(f"{place}.safetensors" for place in places)
    raise CascadeError(f"{folder}: {name} is missing (expected {files}, or with .bf16, _bf16, .fp16 "
                       "or _fp16); see 'Official weights' in README.md")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def load_image(source: OneImage) -> Image.Image:
    """Opens an image as RGB, with its EXIF rotation applied and transparency on white."""
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except (OSError, ValueError, SyntaxError) as error:
            raise CascadeError(f"this PIL image cannot be read ({error})") from error
    is_path = isinstance(source, (str, Path))
    require(is_path, f"expected an image or a path, got {type(source).__name__}")
    kinds = ", ".join(IMAGE_FORMATS)
    with reading(source, f"an image ({kinds}) of less than 178 million pixels"):
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            return to_rgb(image)


def to_rgb(image):
    sixteen_bits = image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG"
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    require(0 < max(width, height) <= 100 * min(width, height),
            f"an image of {width} x {height} pixels: expected an aspect ratio of 100 at most")
    if sixteen_bits:                                    # greyscale
        grey = np.asarray(image)
        opaque = grey != image.info.get("transparency", -1)
        image = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
        image.putalpha(Image.fromarray(np.uint8(opaque * 255)))
    require(image.mode not in ("I", "F"), "a 32-bit image: expected 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_pixels(image, width, height, compression=COMPRESSION):
    """An image, resized and cropped to width x height, at the size that the semantic encoder takes: (1, 3, 32 * Hc, 32 * Wc)
    in [0, 1]."""
    image = ImageOps.fit(load_image(image), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    Hc, Wc = semantic_sides(width, height, compression)
    return F.interpolate(pixels, (32 * Hc, 32 * Wc), mode="bilinear", antialias=True)


def load_mask(mask, image, width, height):
    """(1, 1, H, W), 1 where the mask is white and 0 elsewhere, cropped as its image is by load_pixels."""
    size = (width, height) if torch.is_tensor(image) else load_image(image).size
    mask = load_image(mask).convert("L")
    require(mask.size == size, f"mask: expected the size of its image, {size[0]} x {size[1]}, "
            f"got {mask.width} x {mask.height}")
    mask = ImageOps.fit(mask, (width, height), Image.Resampling.BOX)
    white = torch.from_numpy(np.array(mask) > 127)[None, None].float()
    require(white.any(), "mask: expected white where to paint, got no white pixel")
    return white


def canny_hint(pixels):
    """Pixels (1, 3, H, W) in [0, 1] -> their edges (1, 1, H, W), as the original: at 224 x 224 pixels, whatever the size."""
    small = F.interpolate(pixels, (224, 224), mode="bilinear")
    small = (small[0].permute(1, 2, 0) * 255).byte().numpy()  # (224, 224, 3)
    edges = torch.from_numpy(canny(small))[None, None].float()  # (1, 1, 224, 224)
    return F.interpolate(edges, pixels.shape[2:], mode="bilinear")


def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """The edges of an image (Canny, 1986): (H, W, 3), uint8 -> (H, W), bool. The same as those of OpenCV's cv2.Canny."""
    padded = np.pad(image.astype(np.int64), ((1, 1), (1, 1), (0, 0)), "edge")
    smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]  # Sobel
    dx = smooth[:, 2:] - smooth[:, :-2]  # (H, W, 3)
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dy = smooth[2:] - smooth[:-2]  # (H, W, 3)
    strongest = (abs(dx) + abs(dy)).argmax(2, keepdims=True)  # the channel
    dx = np.take_along_axis(dx, strongest, 2)[..., 0]  # (H, W)
    dy = np.take_along_axis(dy, strongest, 2)[..., 0]  # (H, W)
    m = np.pad(abs(dx) + abs(dy), 1)  # (H + 2, W + 2)
    centre = m[1:-1, 1:-1]  # (H, W)

    # ridges: larger than both neighbours in the direction of the gradient, which is one of four
    horizontal = (centre > m[1:-1, :-2]) & (centre >= m[1:-1, 2:])
    vertical = (centre > m[:-2, 1:-1]) & (centre >= m[2:, 1:-1])
    falling = (centre > m[:-2, :-2]) & (centre > m[2:, 2:])
    rising = (centre > m[:-2, 2:]) & (centre > m[2:, :-2])
    x, y = abs(dx), abs(dy) << 15
    tangent = 13573 * x  # of 22.5 degrees, in the same fixed point
    ridge = np.where((dx < 0) == (dy < 0), falling, rising)
    ridge = np.where(y > tangent + (x << 16), vertical, ridge)
    ridge = np.where(y < tangent, horizontal, ridge) & (centre > low)  # (H, W)

    # edges: the strong ridges, and all that are connected with them
    edges, found = ridge & (centre > high), 0
    while edges.sum() > found:
        found = edges.sum()
        grown = np.pad(edges, 1)
        grown = grown[:-2] | grown[1:-1] | grown[2:]  # (H, W + 2)
        edges = (grown[:, :-2] | grown[:, 1:-1] | grown[:, 2:]) & ridge  # (H, W)
    return edges


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] -> a PIL image."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def to_output(pixels, output):
    """Pixels (N, 3, H, W) -> the type of output that was asked for."""
    if output == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    return array if output == "np" else [to_pillow(image) for image in array]


def png(image, texts):
    """The bytes of a PNG with these texts as metadata."""
    file, info = io.BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    image.save(file, "png", pnginfo=info)
    return file.getvalue()


def write_file(path: Path, data: bytes):
    """Writes all or nothing: to a new file in the same folder, which is then renamed."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError as error:
        raise CascadeError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the command
SETUP = {"output", "weights", "lite", "device", "dtype", "traceback"}
STAGE_C = {"negative", "width", "height", "compression", "images", "seed", "steps", "guidance", "recipe",
           "lite_prior", "guidance_interval", "variation_image", "init_image", "strength", "control", "hint",
           "mask", "control_strength", "lora", "token"}
STAGE_B = {"decoder_steps", "decoder_guidance", "decoder_dtype", "lite_decoder"}
MODES = {                                               # the options of each mode; it refuses the others
    "prompts": SETUP | STAGE_C | STAGE_B | {"prompts", "previews", "animate"},
    "prompt_file": SETUP | STAGE_C | STAGE_B | {"prompt_file", "overwrite"},
    "latents": SETUP | STAGE_B | {"latents", "lora", "token"},
    "reconstruct": SETUP | STAGE_B | {"reconstruct", "width", "height", "compression", "seed", "recipe"}}
DEFAULTS = {"negative": "", "images": 1, "seed": 0, "steps": 20, "guidance": 4.0, "recipe": "diffusers",
            "guidance_interval": [0.0, 1.0], "strength": 0.8, "decoder_steps": 10,
            "compression": COMPRESSION, "control_strength": 1.0}
CHUNK = 100                                             # prompts of a file that pass through each stage together


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message.removeprefix('argument ')} (--help explains the options)")


def number(name):
    """The argparse type of an option in LIMITS."""
    def convert(text):
        try:
            value = LIMITS[name][0](text)
        except ValueError:
            value = text
        try:
            check(**{name: value})
        except CascadeError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error
        return value
    return convert


def lora_and_strength(text):
    file, _, strength = text.rpartition(":")
    try:
        return (file, float(strength)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def token_and_word(text):
    token, _, word = text.rpartition("=")
    require(token and word, f"--token: expected NEW=WORD, got {text!r:.80}")
    return token, word


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options that are not given are None."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; one image for each prompt")
    add("-o", "--output", default="image.png", type=Path, metavar="FILE",
        help=".png, or .safetensors for latents")
    add("--prompt-file", metavar="FILE", help="one prompt per line; existing images are skipped")
    add("--overwrite", action="store_true", default=None, help="replace images with other settings")
    add("--latents", metavar="FILE", help="decode these saved semantic latents")
    add("--variation-image", action="append", metavar="FILE", help="reference image (repeatable)")
    add("--init-image", metavar="FILE", help="image to image: the image to start from")
    add("--strength", type=number("strength"), help="how much --init-image changes (default: 0.8)")
    add("--control", choices=CONTROLS, help="use this ControlNet; needs --hint")
    add("--hint", metavar="FILE", help="the image that the ControlNet looks at")
    add("--control-strength", type=number("control_strength"),
        help="factor of the ControlNet's output (default: 1)")
    add("--mask", metavar="FILE",
        help="image, white where to paint, for --init-image or --control inpainting")
    add("--lora", type=lora_and_strength, action="append", metavar="FILE[:STRENGTH]",
        help="merge this LoRA into the weights (repeatable; default strength: 1)")
    add("--token", type=token_and_word, action="append", metavar="NEW=WORD",
        help="a new token of the LoRA, and the word that it starts from (repeatable)")
    add("--reconstruct", metavar="FILE", help="encode this image to a semantic latent, then decode")
    add("--previews", type=Path, metavar="FOLDER", help="save Stage C's prediction at each step")
    add("--animate", type=Path, metavar="FILE",
        help=".gif or .webp: the predictions of both stages, step by step, for the first image")
    add("--negative", metavar="TEXT", help="negative prompt: what not to draw (needs guidance)")
    add("--width", type=number("width"), help="in pixels (default: the size trained for)")
    add("--height", type=number("height"), help="in pixels (default: the size trained for)")
    add("--compression", type=number("compression"),
        help="image size / semantic latent's size; up to 64 for large images (default: 42.67)")
    add("--images", type=number("images"), help="images per prompt (default: 1)")
    add("--seed", type=number("seed"), help="of the first image; image i has seed + i (default: 0)")
    add("--steps", type=number("steps"), help="denoising steps of Stage C (default: 20)")
    add("--guidance", type=number("guidance"), help="guidance scale; up to 1: none (default: 4)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="apply guidance only at times from LOW to HIGH; 1 is pure noise (default: 0 1)")
    add("--decoder-steps", type=number("decoder_steps"), help="of Stage B (default: 10)")
    add("--decoder-guidance", type=number("decoder_guidance"),
        help="guidance scale of Stage B (default: none; 1.1 for --recipe original)")
    add("--recipe", choices=RECIPES, help="sampling recipe, see sampler.py (default: diffusers)")
    add("--weights", type=Path, default=TINY, metavar="FOLDER", help="(default: weights/tiny)")
    lite = parser.add_mutually_exclusive_group().add_argument
    lite("--lite", action="store_true", help="the lite versions of Stage C and Stage B")
    lite("--lite-prior", action="store_true", default=None, help="the lite version of Stage C")
    lite("--lite-decoder", action="store_true", default=None, help="the lite version of Stage B")
    add("--device", default="auto", help="torch device (default: CUDA, else MPS, else the CPU)")
    add("--dtype", default="auto", choices=("auto", *DTYPES),
        help="of the weights (default: fp32; on CUDA bf16, or fp16 where the GPU has no bf16)")
    add("--decoder-dtype", choices=DTYPES, help="of Stage B and A (default: as --dtype)")
    add("--traceback", action="store_true", help="print the traceback of an error")
    return parser.parse_intermixed_args(arguments)


def settle(options):
    """Finds the mode, refuses options that it does not use, and fills in its defaults."""
    options.prompts = options.prompts or None
    modes = [name for name in MODES if getattr(options, name) is not None]
    if not modes and (options.variation_image or options.init_image or options.hint):
        modes, options.prompts = ["prompts"], [""]
    require(len(modes) == 1, "expected exactly one of: prompts, --prompt-file, --latents, --reconstruct"
            ", --variation-image, --init-image, --hint; got "
            f"{' and '.join(map(option, modes)) or 'none'}")
    mode, used = modes[0], MODES[modes[0]]
    require(options.init_image or options.strength is None, "--strength: needs --init-image")
    if not options.init_image:
        used = used - {"strength"}
    if mode in ("prompts", "prompt_file"):
        check_control(options.control, options.hint, options.mask, options.init_image)
    if not options.control:
        require(options.control_strength is None, "--control-strength: needs --control")
        used = used - {"control_strength"}
    latents_only = options.output.suffix == ".safetensors"
    if latents_only:
        used = used - STAGE_B - {"animate"}
    where = "when only latents are saved" if latents_only else f"with {option(mode)}"
    for name, value in vars(options).items():
        require(value is None or name in used, f"{option(name)}: not used {where}")
        empty = value in ("", [""]) and name not in ("negative", "prompts")
        require(not empty, f"{option(name)}: expected a value, got none")
        if value is None and name in used:
            setattr(options, name, DEFAULTS.get(name))
    if options.guidance_interval:
        check(**{"--guidance-interval": options.guidance_interval})
    if options.decoder_guidance is None and options.recipe and not latents_only:
        options.decoder_guidance = RECIPES[options.recipe].decoder_guidance
    guided = max(options.guidance or 0, options.decoder_guidance or 0) > 1
    require(guided or not options.negative, "--negative: needs a guidance scale above 1")
    endings = (".png",) if mode in ("latents", "prompt_file") else (".png", ".safetensors")
    require(options.output.suffix in endings,
            f"--output: expected a name that ends in {' or '.join(endings)}, got {options.output}")
    require(options.animate is None or options.animate.suffix in (".gif", ".webp"),
            f"--animate: expected a name that ends in .gif or .webp, got {options.animate}")
    return mode


def option(name):
    return name if name == "prompts" else f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Record:
    """The settings of a run, named as the options; None where unused. Saved in images and in latents, and read back from
    latents."""
    prompts: list
    negative: str | None
    width: int
    height: int
    images: int
    seed: int
    recipe: str
    steps: int | None
    guidance: float | None
    guidance_interval: list | None
    variation_image: list | None                        # file names
    init_image: str | None
    strength: float | None
    reconstruct: str | None
    decoder_steps: int | None
    decoder_guidance: float | None
    networks: dict                                      # name -> file, device, type
    compression: float = COMPRESSION
    control: str | None = None
    hint: str | None = None
    mask: str | None = None
    control_strength: float | None = None
    lora: list | None = None                            # [name of the file, strength]
    token: list | None = None                           # [new token, word]
    version: int = 2

    @staticmethod
    def read(path, text):
        with reading(path, "latents that this version of cascade.py saved"):
            values = json.loads(text)
            version = values["version"]
            require(version == 2, f"expected version 2, got {version!r:.80}")
            require(is_utf8(json.dumps(values, ensure_ascii=False)), "expected UTF-8")
            record = Record(**values)
            for name, kind in get_type_hints(Record).items():
                value = getattr(record, name)
                require(isinstance(value, kind), f"{name}: expected {kind}, got {value!r:.80}")
                if value is not None and name in (*LIMITS, *CHOICES, "guidance_interval"):
                    check(**{name: value})
            check_strings("prompts", record.prompts)
            names = [*(record.variation_image or []), *record.networks.values()]
            require(all(isinstance(name, str) for name in names), "expected the names of files")
            check_loras(record.lora or [])
            check_tokens(dict(record.token or []))
            return record

    @property
    def prior_steps(self):
        """How many steps Stage C ran; None if it did not run."""
        if self.steps is None or self.strength is None:
            return self.steps
        return int(self.steps * self.strength)

    def texts(self, i):
        """The PNG metadata of image i."""
        own = asdict(self)
        own |= {"prompts": self.prompts[i // self.images], "seed": self.seed + i, "images": None}
        return {name: str(value) for name, value in own.items() if value is not None}


@dataclass
class Job:
    """The images of one record, which are generated together, and their files."""
    record: Record
    outputs: list[Path]
    latents: Tensor | None = None                       # given with --latents


def run(options):
    mode = settle(options)
    rank, world = torchrun_rank(mode)
    lite = "prior" if options.lite_prior else "decoder" if options.lite_decoder else options.lite
    if options.device == "auto":
        options.device = default_device()
    if options.device == "cuda" and world > 1:          # each process has a GPU of its own
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    cascade = Cascade(options.weights, options.device, options.dtype, lite, options.decoder_dtype,
                      keep=mode == "prompt_file", progress=True, loras=options.lora or [],
                      tokens=dict(options.token or []))
    jobs = plan_latents(options, cascade) if mode == "latents" else plan(options, mode, cascade)
    check_outputs(options, [path for job in jobs for path in job.outputs])
    if mode == "prompt_file":
        jobs = remaining(options, jobs, rank, world)
    for i in range(0, len(jobs), CHUNK):
        draw(options, cascade, jobs[i:i + CHUNK])


def torchrun_rank(mode):
    """Under torchrun each process draws its share of a prompt file."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    valid = all(text and text.isdecimal() and len(text) < 9 for text in (rank, world))
    valid = valid and int(rank) < int(world)
    require(valid, f"RANK={rank}, WORLD_SIZE={world}: expected both or neither, the first smaller")
    require(mode == "prompt_file" or int(rank) == 0,
            f"RANK={rank}: several processes can only share a --prompt-file")
    return int(rank), int(world)


def describe(cascade, names):
    """File, device and type of each network; a missing file is an error."""
    networks = {}
    for name in names:
        file = cascade.file(name).relative_to(cascade.folder).as_posix()
        networks[name] = f"{file}, {cascade.device.type}, {cascade.dtypes[name]}"
    return networks


def plan(options, mode, cascade):
    """The jobs of a run that starts from prompts or images."""
    names = ["text_encoder", "effnet_encoder" if options.reconstruct else "stage_c"]
    if options.variation_image:
        names.append("image_encoder")
    if options.init_image or options.control == "super_resolution":
        names.append("effnet_encoder")
    if options.control:
        names.append(f"controlnet/{options.control}")
    if options.output.suffix == ".png":
        names += ["stage_b", "stage_a"]
    if options.previews or options.animate:
        cascade.file("previewer")
    names_of_fields = [field.name for field in fields(Record)]
    values = {name: value for name, value in vars(options).items() if name in names_of_fields}
    values["width"], values["height"] = cascade.size(
        options.width, options.height, options.control, options.hint)
    values["networks"] = describe(cascade, names)
    values["prompts"] = options.prompts or [""]
    values["images"] = options.images or 1
    for name in ("init_image", "reconstruct", "hint", "mask"):
        values[name] = Path(values[name]).name if values[name] else None
    if options.variation_image:
        values["variation_image"] = [Path(image).name for image in options.variation_image]
    values |= lora_settings(options)
    base = Record(**values)
    if mode != "prompt_file":
        return [Job(base, output_paths(options.output, 0, len(base.prompts) * base.images))]

    jobs = []
    for i, prompt in enumerate(read_prompts(options.prompt_file)):
        first = i * base.images
        if prompt:                                      # empty lines are skipped but keep their numbers
            record = replace(base, prompts=[prompt], seed=base.seed + first)
            paths = output_paths(options.output, first, base.images, numbered=True)
            jobs.append(Job(record, paths))
    check_seeds(jobs[-1].record.seed, base.images)
    return jobs


def lora_settings(options):
    """The LoRAs and new tokens of a run, as its record holds them."""
    loras = [[Path(file).name, strength] for file, strength in options.lora or []]
    tokens = [list(pair) for pair in options.token or []]
    return {"lora": loras or None, "token": tokens or None}


def plan_latents(options, cascade):
    """The job of a run that starts from saved latents."""
    weights = Weights(options.latents)
    record = Record.read(options.latents, weights.metadata.get("cascade", "null"))
    same = lora_settings(options) == {"lora": record.lora, "token": record.token}
    require(same, f"--lora, --token: expected those that {options.latents} was made with: "
            f"{record.lora or 'none'}, {record.token or 'none'}")
    latents = weights.tensor("latents")
    with reading(options.latents, "latents"):
        count = len(record.prompts) * record.images
        check_seeds(record.seed, count)
        shape = (count, 16, *semantic_sides(record.width, record.height, record.compression))
        check_tensor("latents", latents, shape)
    guidance = options.decoder_guidance
    record = replace(
        record, decoder_steps=options.decoder_steps,
        decoder_guidance=RECIPES[record.recipe].decoder_guidance if guidance is None else guidance,
        networks=record.networks | describe(cascade, ["text_encoder", "stage_b", "stage_a"]))
    return [Job(record, output_paths(options.output, 0, count), latents)]


def read_prompts(path):
    with reading(path, "prompts in UTF-8, one per line"):
        text = Path(path).read_text("utf-8-sig")
        require(text.strip() and "\0" not in text, "expected prompts in UTF-8, one per line")
    return [line.strip() for line in text.split("\n")]


def output_paths(path, first, count, numbered=False):
    if path.suffix == ".safetensors" or count == 1 and not numbered:
        return [path]
    return [path.with_stem(f"{path.stem}-{first + i}") for i in range(count)]


def check_outputs(options, paths):
    """Refuses, before the work, what could not be written after it or would overwrite something else."""
    inputs = [options.prompt_file, options.latents, options.init_image, options.reconstruct,
              options.hint, options.mask]
    inputs = [os.path.realpath(path) for path in inputs + (options.variation_image or []) if path]
    if options.animate:
        paths = paths + [options.animate]
    if options.previews:
        paths = paths + [preview_path(options.previews, i + 1) for i in range(options.steps)]
    require(len(set(paths)) == len(paths), f"{options.output}: is also one of the --previews")
    for path in paths:
        folder, found = os.path.dirname(os.path.abspath(path)), exists(path)
        writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
        require(writable, f"{path}: cannot be written; does its folder exist, and is it writable?")
        require(not found or os.path.isfile(path), f"{path}: cannot be written; it is not a file")
        require(os.path.realpath(path) not in inputs, f"{path}: is an input; expected another name")
        if found and path.suffix == ".safetensors":
            is_ours = "cascade" in Weights(path).metadata
            require(is_ours, f"{path}: exists and holds other tensors than latents")


def remaining(options, jobs, rank, world):
    """This process's share of a prompt file, without the jobs whose images exist already."""
    share = jobs[rank::world]
    if world > 1:
        say(f"rank {rank} of {world}: {len(share)} of {len(jobs)} prompts")
    missing = []
    for job in share:
        done = []
        for i, path in enumerate(job.outputs):
            done.append(is_done(path, job.record.texts(i), options.overwrite))
        if not all(done):
            missing.append(job)
    if share and not missing:
        say(f"all images of {options.prompt_file} exist already")
    return missing


def is_done(path, texts, overwrite):
    """Whether this image exists, complete and with the same metadata."""
    if not exists(path):
        return False
    with suppress(CascadeError), reading(path, "a PNG"):
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            if image.text == texts:
                return True
    require(overwrite, f"{path}: exists with other settings; use --overwrite to replace it")
    return False


def draw(options, cascade, jobs):
    """Runs each stage for all jobs, so that each network is loaded once."""
    texts = []
    for job in jobs:
        text = cascade.encode_prompt(job.record.prompts, job.record.negative or "")
        texts.append(text.to("cpu"))
    cascade.kept.clear()
    animation = callback = None
    if options.animate:
        record = jobs[0].record
        animation = Animation(cascade, record.prompts[0], record.width, record.height)
    if options.previews or options.animate:
        callback = show_previews(cascade, options.previews, animation)
    for job, text in zip(jobs, texts):
        if job.latents is None:
            job.latents = generate_latents(options, cascade, job.record, text, callback).cpu()
    cascade.kept.clear()
    for job, text in zip(jobs, texts):
        if options.output.suffix == ".safetensors":
            metadata = {"cascade": json.dumps(asdict(job.record))}
            write_file(job.outputs[0], save({"latents": job.latents}, metadata))
        else:
            images = decode_images(cascade, job, text, animation)
            if options.reconstruct:
                print_psnr(options.reconstruct, images[0], job.latents)
        job.latents = None
    cascade.kept.clear()
    if animation:
        animation.write(options.animate)


def generate_latents(options, cascade, record, text, callback):
    if options.reconstruct:
        return cascade.encode_semantic(
            options.reconstruct, record.width, record.height, record.compression)
    return cascade.prior(
        text, width=record.width, height=record.height, compression=record.compression,
        images=record.images, seed=record.seed, steps=record.steps, guidance=record.guidance,
        recipe=record.recipe,
        variation_images=options.variation_image, init_image=options.init_image,
        strength=record.strength or 0.0, interval=record.guidance_interval, callback=callback,
        control=record.control, hint=options.hint, mask=options.mask,
        control_strength=record.control_strength or 0.0)


def decode_images(cascade, job, text, animation):
    record = job.record
    images = cascade.decode(
        job.latents, text, width=record.width, height=record.height, compression=record.compression,
        seed=record.seed, steps=record.decoder_steps, guidance=record.decoder_guidance,
        recipe=record.recipe, prior_steps=record.prior_steps, output="np",
        callback=animation.add_image_latents if animation else None)
    for i, (image, path) in enumerate(zip(images, job.outputs)):
        write_file(path, png(to_pillow(image), record.texts(i)))
    return images


def show_previews(cascade, folder=None, animation=None):
    """A callback that shows what Stage C predicts at each step: saved to a folder, the images side by side, or added to
    an animation."""
    previewer = cascade.network("previewer")

    def callback(step, x0):
        """Latents (N, 16, Hc, Wc) -> small images."""
        pixels = previewer(x0.to(cascade.dtypes["previewer"])).float()  # (N, 3, 8 * Hc, 8 * Wc)
        pixels = cascade.check_finite("previewer", pixels).clamp(0, 1)
        if folder:
            row = torch.cat(list(pixels), dim=2)  # (3, 8 * Hc, N * 8 * Wc)
            image, = to_output(row[None], "pil")
            write_file(preview_path(folder, step), png(image, {"step": str(step)}))
        if animation:
            animation.add_preview(pixels)
    return callback


class Animation:
    """The first image of a run, step by step: on the left what Stage C predicts, as the previewer shows it; on the right
    what Stage B predicts; the prompt below."""
    def __init__(self, cascade, prompt, width, height):
        self.cascade, self.width, self.height = cascade, width, height
        scale = 256 / max(width, height)
        self.half_size = round(width * scale), round(height * scale)
        self.font = ImageFont.load_default(16)
        self.caption = " ".join(prompt.split())[:200]
        while self.font.getlength(self.caption) > 2 * self.half_size[0]:
            self.caption = self.caption[:-1]
        self.left = self.right = Image.new("RGB", self.half_size, "white")
        self.frames = []

    def add_preview(self, pixels):
        """Pixels (N, 3, H, W) of the previewer -> one more frame."""
        self.left = self.to_half(pixels)
        self.add_frame()

    def add_image_latents(self, _, x0):
        """Image latents (N, 4, Hb, Wb) -> one more frame."""
        pixels = self.cascade._decode_pixels(x0[:1])  # (1, 3, 4 * Hb, 4 * Wb)
        self.right = self.to_half(pixels[:, :, :self.height, :self.width])
        self.add_frame()

    def to_half(self, pixels):
        image, = to_output(pixels[:1], "pil")
        return image.resize(self.half_size, Image.Resampling.BICUBIC)

    def add_frame(self):
        width, height = self.half_size
        frame = Image.new("RGB", (2 * width + 8, height + 32), "gainsboro")
        frame.paste(self.left, (0, 0))
        frame.paste(self.right, (width + 8, 0))
        place = (width + 4, height + 16)
        ImageDraw.Draw(frame).text(place, self.caption, "black", self.font, anchor="mm")
        self.frames.append(frame)

    def write(self, path):
        file = io.BytesIO()
        durations = [120] * (len(self.frames) - 1) + [2500]             # milliseconds
        self.frames[0].save(file, path.suffix[1:], save_all=True, append_images=self.frames[1:],
                            duration=durations, loop=0)
        write_file(path, file.getvalue())


def preview_path(folder, step):
    return folder / f"step-{step:03}.png"


def print_psnr(path, image, latents):
    height, width = image.shape[:2]
    original = ImageOps.fit(load_image(path), (width, height), Image.Resampling.BICUBIC)
    error = ((image - np.asarray(original) / 255) ** 2).mean()
    factor = image.size / latents.numel()
    print(f"{image.size} pixel values -> {latents.numel()} latent values, {factor:.0f} times fewer "
          f"-> image, PSNR {-10 * math.log10(error + 1e-12):.1f} dB")


# ---------------------------------------------------------------------------------------------------- the process
class Unbreakable:
    """A stream whose write errors are ignored: a closed pipe must not cost an image."""
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def tune_process():
    """Keeps freed memory. glibc returns large blocks to the system and gets them back page by page, which costs 8 to 29 %
    of a stage's time on a CPU (tests/porting/PERFORMANCE.md)."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        for option in (-1, -3):                         # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2 ** 30)


def accumulate_in_fp32():
    """On CUDA, PyTorch may round fp32 to TF32 in convolutions, and sum products of bf16 or fp16 in these types."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def say(text):
    """Prints one line to stderr, with control characters escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    print(f"cascade.py: {text}", file=sys.stderr)


def terminate(*_):
    raise KeyboardInterrupt("terminated")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or after one line on stderr 2 (error), 130 (interrupted) or 143 (terminated)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stdout, stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".* is cut to")
        say_once = lru_cache(say)
        warnings.showwarning = lambda message, *_: say_once(str(message))
        try:
            require(all(map(is_utf8, arguments)), "expected arguments in UTF-8")
            accumulate_in_fp32()
            run(parse(arguments))
            return 0
        except CascadeError as error:
            if "--traceback" in arguments:
                traceback.print_exception(error)
            say(error)
            return 2
        except KeyboardInterrupt as error:
            say("terminated" if error.args else "interrupted")
            return 143 if error.args else 130
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            say("out of memory; try --lite, --dtype bf16, fewer --images or a smaller size")
            return 2


if __name__ == "__main__":
    tune_process()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
