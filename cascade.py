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
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
CONTROLS = {"canny": 1, "inpainting": 4, "super_resolution": 16}        # kinds of ControlNet: channels of the hint
NETWORK_NAMES = (*NETWORKS, *(f"controlnet/{control}" for control in CONTROLS))
CHANNELS = {                                            # of the latents that the networks exchange, and of hints
    "latent_channels": {
        "stage_c": 16, "stage_b": 4, "stage_a": 4, "effnet_encoder": 16, "previewer": 16},
    "semantic_channels": {"stage_b": 16, "stage_c": 0},
    "hint_channels": {f"controlnet/{control}": channels for control, channels in CONTROLS.items()}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("pil", "np", "pt", "latent")
LITE = {False: (), True: ("stage_c", "stage_b"), "prior": ("stage_c",), "decoder": ("stage_b",)}


# ---------------------------------------------------------------------------------------------------- the pipeline
@dataclass(frozen=True)
class TextEmbeddings:
    """The text embeddings of P prompts: P conditional rows, then P unconditional rows."""
    hidden: Tensor  # (2P, L, D)
    pooled: Tensor  # (2P, 1, D)

    def to(self, device) -> "TextEmbeddings":
        return TextEmbeddings(self.hidden.to(device), self.pooled.to(device))


class Cascade:
    """The networks of one weights folder: original single files, diffusers folders, ComfyUI's files, or a mixture.

    device          a torch device, or "auto": CUDA if it is available, else MPS, else the CPU
    dtype           "fp32", "bf16", "fp16", or "auto": fp32 on a CPU and on MPS; on CUDA bf16 if the GPU has it, else fp16
    lite            True: the lite Stage C and Stage B; "prior" or "decoder": only one of them
    decoder_dtype   dtype of Stage B and A (default: dtype)
    keep            keep networks in memory; otherwise every call loads each of them again
    progress        show progress bars
    loras           LoRA files for the text encoder, Stage C and Stage B, [(file, strength), ...]
    tokens          {new token: the word that it starts from}, for LoRAs with new tokens, in the order they were trained

    On CUDA, PyTorch computes fp32 convolutions in TF32 and may sum products of bf16 or fp16 in these types, unless a
    script calls `accumulate_in_fp32`, as the command does.
    """
    def __init__(self, folder=TINY, device="auto", dtype="auto", lite=False, decoder_dtype=None,
                 keep=False, progress=False, loras=(), tokens=None):
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
    def __call__(self, prompts="", negative="", *, width=None, height=None, compression=COMPRESSION,
                 seed=0, recipe="diffusers", steps=20, decoder_steps=10, decoder_guidance=None,
                 output="pil", init_image=None, strength=0.8, control=None, hint=None, mask=None,
                 **others):
        """Text to image: `images` for each prompt; image i of the batch has the seed `seed + i`. decoder_steps,
        decoder_guidance and output are those of `decode`; all other arguments, `others` included, those of `prior`."""
        check(decoder_steps=decoder_steps, output=output, steps=steps, strength=strength)
        if decoder_guidance is not None:
            check(decoder_guidance=decoder_guidance)
        check_control(control, hint, mask, init_image)
        names = ["text_encoder", "stage_c", "stage_b", "stage_a"]
        if control is not None:
            names.append(f"controlnet/{control}")
        self.check_networks(*names)
        width, height = self.size(width, height, control, hint)
        size = {"width": width, "height": height, "compression": compression}
        text = self.encode_prompt(prompts, negative)
        latents = self.prior(
            text, **size, seed=seed, recipe=recipe, steps=steps, init_image=init_image,
            strength=strength, control=control, hint=hint, mask=mask, **others)
        prior_steps = count_steps(steps, None if init_image is None else strength)
        return self.decode(
            latents, text, **size, seed=seed, recipe=recipe, steps=decoder_steps,
            guidance=decoder_guidance, prior_steps=prior_steps, output=output)

    @torch.no_grad()
    def prior(self, prompts="", negative="", *, width=None, height=None, compression=COMPRESSION,
              images=1, seed=0, recipe="diffusers", steps=20, guidance=4.0, interval=(0.0, 1.0),
              callback=None, variation_images=None, init_image=None, strength=0.8,
              control=None, hint=None, mask=None, control_strength=1.0) -> Tensor:
        """Stage C: prompts -> semantic latents (N, 16, Hc, Wc), fp32.

        prompts             strings, or TextEmbeddings, which include the negative prompts
        compression         pixels per position of the semantic latent; up to 64 for large images
        steps               a number, or a list of decreasing times, such as [1, 0.8, 0.5, 0]; then strength is not used
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
        if control is not None:
            self.config(f"controlnet/{control}")        # an error unless it is for this Stage C
        width, height = self.size(width, height, control, hint)
        text = self.encode_prompt(prompts, negative)
        P = len(text.pooled) // 2
        N = images * P
        noise_generators = generators(check_seeds(seed, N), N)
        shape = (16, *semantic_sides(width, height, compression))
        condition = {"clip_text": text.hidden.repeat_interleave(images, dim=0),  # (2 * N, L, D)
                     "clip_text_pooled": text.pooled.repeat_interleave(images, dim=0)}
        if variation_images is not None:
            cond = self.encode_image(variation_images).expand(N, -1, -1)  # (N, R, E)
            condition["clip_img"] = torch.cat([cond, torch.zeros_like(cond)])  # (2 * N, R, E)
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
                require(int(steps * strength), f"strength: {strength} leaves none of {steps} steps")
                steps = int(steps * strength)
        recipe = replace(RECIPES[recipe], interval=tuple(interval))
        return self._denoise("stage_c", shape, condition, steps, guidance, noise_generators, recipe,
                             callback, **extras)

    @torch.no_grad()
    def decode(self, latents, prompts="", negative="", *, width=None, height=None,
               compression=COMPRESSION, seed=0, recipe="diffusers", steps=10, guidance=None,
               prior_steps=20, output="pil", callback=None):
        """Stage B and A: semantic latents (N, 16, Hc, Wc) -> N images of exactly width x height pixels.

        prompts         the prompts of the latents, in the same order, or their TextEmbeddings
        width, height   default: the latents' sides, times the compression
        guidance        default: the recipe's, 1.1 for "original", else none
        prior_steps     Stage C's number of steps: the noise that they drew is skipped, as in diffusers; None: skip nothing
        output          "pil": a list of images; "np": (N, H, W, 3), "pt": (N, 3, H, W), fp32 in [0, 1]; "latent": the image
                        latents (N, 4, Hb, Wb)
        callback        as for `prior`; x0 is an image latent
        """
        check(steps=steps, output=output, recipe=recipe, compression=compression)
        check_tensor("latents", latents, (None, 16, None, None))
        Hc, Wc = latents.shape[2:]
        width = int(Wc * compression) if width is None else width
        height = int(Hc * compression) if height is None else height
        check(width=width, height=height)
        check_tensor("latents", latents, (None, 16, *semantic_sides(width, height, compression)))
        text = self.encode_prompt(prompts, negative)
        N, P = len(latents), len(text.pooled) // 2
        require(N % P == 0, f"{N} latents for {P} prompts: expected as many for each prompt")
        recipe = replace(RECIPES[recipe], shift=RECIPES[recipe].decoder_shift)
        guidance = recipe.decoder_guidance if guidance is None else guidance
        check(guidance=guidance)
        noise_generators = generators(check_seeds(seed, N), N)
        if prior_steps is not None:                     # in diffusers both stages draw from the same generator
            check(prior_steps=prior_steps)
            for _ in range(1 + prior_steps):            # the initial noise, then once per step
                draw_noise(noise_generators, latents.shape[1:], "cpu")
        condition = {"clip_text_pooled": text.pooled.repeat_interleave(N // P, dim=0),  # (2 * N, 1, D)
                     "effnet": torch.cat([latents, torch.zeros_like(latents)])}  # (2 * N, 16, Hc, Wc)
        shape = (4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))  # even, for Stage B's patches
        z = self._denoise("stage_b", shape, condition, steps, guidance, noise_generators, recipe,
                          callback)
        if output == "latent":
            return z
        return to_output(self._decode_pixels(z)[:, :, :height, :width], output)

    def _denoise(self, name, shape, condition, steps, guidance, noise_generators, recipe,
                 callback=None, **extras):
        """Stage B or C: noise -> the last latents (N, *shape), fp32."""
        require(callback is None or callable(callback), "callback: expected a function")
        unet = self.network(name)
        for key, value in condition.items():
            if key != "effnet":                         # an embedding, of the width that this network takes
                width = unet.config.image_dim if key == "clip_img" else unet.config.text_dim
                check_tensor(f"{self.file(name)}: {key}", value, (None, None, width))
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

    def _decode_pixels(self, z):
        """Stage A, one image at a time: (N, 4, Hb, Wb) -> (N, 3, 4 * Hb, 4 * Wb) in [0, 1], fp32."""
        stage_a = self.network("stage_a")
        pixels = [stage_a.decode(latent[None].to(self.dtypes["stage_a"])).float() for latent in z]
        return self.check_finite("stage_a", torch.cat(pixels)).clamp(0, 1)

    @torch.no_grad()
    def encode_prompt(self, prompts, negative="") -> TextEmbeddings:
        """Embeds P prompts and their negative prompts, one for all or one for each. TextEmbeddings are returned
        as they are."""
        if isinstance(prompts, TextEmbeddings):
            require(negative == "", "negative: expected none, as TextEmbeddings include it")
            check_tensor("text embeddings: hidden", prompts.hidden, (None, None, None))
            rows = len(prompts.hidden)
            check_tensor("text embeddings: pooled", prompts.pooled, (rows, 1, None))
            require(rows % 2 == 0, "text embeddings: expected an even number of rows")
            return prompts.to(self.device)
        prompts = check_strings("prompts", prompts)
        negative = check_strings("negative", negative)
        if len(negative) == 1:
            negative = negative * len(prompts)
        require(len(negative) == len(prompts),
                f"negative: expected 1 or {len(prompts)} prompts, got {len(negative)}")
        encoder = self.network("text_encoder")
        tokenizer = self._tokenizer(encoder.config)
        ids, mask = tokenizer(prompts + negative)
        require(ids.max() < encoder.config.vocabulary, f"{self.folder / 'tokenizer'}: expected "
                f"ids below {encoder.config.vocabulary}, got {ids.max()}")
        hidden, pooled = encoder(ids.to(self.device), mask.to(self.device))
        self.check_finite("text_encoder", hidden)
        self.check_finite("text_encoder", pooled)
        return TextEmbeddings(hidden, pooled)

    def _tokenizer(self, config):
        if "tokenizer" in self.kept:
            return self.kept["tokenizer"]
        folder = self.folder / "tokenizer"
        tokenizer = text_encoder.Tokenizer(folder, config.length, self.tokens)
        require(tokenizer.end == config.end,
                f"{folder}: expected the text encoder's end token, {config.end}, got {tokenizer.end}")
        if self.keep:
            self.kept["tokenizer"] = tokenizer
        return tokenizer

    @torch.no_grad()
    def encode_image(self, images) -> Tensor:
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
    def encode_semantic(self, image, width=None, height=None, compression=COMPRESSION) -> Tensor:
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
        if torch.is_tensor(hint):
            check_tensor("hint", hint, (1, CONTROLS[control], None, None))
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

    def check_networks(self, *names) -> dict[str, str]:
        """Refuses files that are missing or hold other networks; it reads only their headers. Returns the file, device and
        type of each network."""
        networks = {}
        for name in names:
            file = self.file(name).relative_to(self.folder).as_posix()
            networks[name] = f"{file}, {self.device.type}, {self.dtypes[name]}"
        for name in names:
            if name not in self.kept:
                self.config(name)
        return networks

    def config(self, name: str):
        """The config of a network, from the header of its file."""
        check(network=name)
        _, _, config = model.identify(self.file(name), name.split("/")[0], NETWORKS)
        for field, channels in CHANNELS.items():
            found = getattr(config, field, None)
            require(found == channels.get(name),
                    f"{self.file(name)}: expected {field} {channels.get(name)}, got {found}")
        if name.startswith("controlnet/"):
            widths = dict(enumerate(self.config("stage_c").residual_widths))
            for block in config.blocks:
                expected = widths.get(block, 0)
                require(config.unet_width == expected, f"{name}: is for another Stage C: it has "
                        f"{config.unet_width} channels for residual block {block}, expected {expected}")
        return config

    def network(self, name: str) -> torch.nn.Module:
        """The network with this name in NETWORKS, ready to run."""
        if name in self.kept:
            return self.kept[name]
        self.config(name)                               # refuses a file that does not fit
        if self.device.type in ("cuda", "mps"):         # the memory of the previous network
            getattr(torch, self.device.type).empty_cache()
        where = self.file(name), self.device, self.dtypes[name]
        if name == "text_encoder":
            network = text_encoder.load(*where, name, self.loras, self._token_words())
        else:
            loras = self.loras if name in ("stage_c", "stage_b") else ()
            network = model.load(*where, name.split("/")[0], NETWORKS, loras)
        if self.keep:
            self.kept[name] = network
        return network

    def _token_words(self):
        """For each new token, the ids of the word that it starts from."""
        if not self.tokens:
            return []
        bpe = text_encoder.read_tokenizer(self.folder / "tokenizer")
        return [bpe.encode(word, add_special_tokens=False).ids for word in self.tokens.values()]

    def file(self, name: str) -> Path:
        version = f"{name}_lite" if name in self.lite else name
        return find_file(self.folder, version, self.dtypes[name])

    def size(self, width, height, control=None, hint=None) -> tuple[int, int]:
        """Fills in None with the size of the hint image, for super-resolution twice that, else with the size in the Stage C
        file's metadata, which it was trained for, else with 1024."""
        if width is None or height is None:
            if hint is None or torch.is_tensor(hint):
                weights = Weights(self.file("stage_c"))
                with reading(weights.path, "a valid image size in the metadata"):
                    sides = [int(weights.metadata.get(side, 1024)) for side in ("width", "height")]
                    check(width=sides[0], height=sides[1])
            else:
                factor = 2 if control == "super_resolution" else 1
                sides = [factor * side for side in load_image(hint).size]
            width = sides[0] if width is None else width
            height = sides[1] if height is None else height
        check(width=width, height=height)
        return int(width), int(height)

    def check_finite(self, name, tensor, when=""):
        require(tensor.isfinite().all(),
                f"{label(name)}: the output is not finite{when}; {self.file(name)} may be damaged, "
                f"or its values too large for {self.dtypes[name]}: try bf16 or fp32")
        return tensor


# ---------------------------------------------------------------------------------------------------- checks and sizes
CHOICES = {"recipe": RECIPES, "output": OUTPUTS, "lite": LITE, "network": NETWORK_NAMES,
           "control": CONTROLS}


def is_number(value, low, high, kind=numbers.Real):
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def check(**values):
    """Raises an error that names the first invalid value, by its keyword or by its option."""
    for argument, value in values.items():
        name = argument.removeprefix("--").replace("-", "_")
        is_times = isinstance(value, (list, tuple)) and all(is_number(time, 0, 1) for time in value)
        if name.endswith("interval"):
            expected = "two times from 0 to 1, the lower one first"
            valid = is_times and len(value) == 2 and value[0] <= value[1]
        elif name in ("steps", "decoder_steps") and isinstance(value, list):
            expected = "at least two decreasing times between 1 and 0"
            valid = is_times and len(value) > 1 and value == sorted(set(value), reverse=True)
        elif name in CHOICES:
            expected = f"one of {', '.join(map(str, CHOICES[name]))}"
            valid = isinstance(value, (str, bool)) and value in CHOICES[name]
        else:
            kind, low, high = LIMITS[name]
            expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
            valid = is_number(value, low, high, numbers.Integral if kind is int else numbers.Real)
        require(valid, f"{argument}: expected {expected}, got {value!r:.80}")


def check_seeds(first, count):
    check(seed=first)
    last = int(first) + count - 1
    limit = LIMITS["seed"][2]
    require(last <= limit, f"seed: {count} images need up to {last}, expected at most {limit}")
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
    valid = False
    with suppress(TypeError, ValueError):
        valid = all(os.fspath(file) for file, _ in loras)
    require(valid, f"loras: expected a list of (file, strength), got {loras!r:.80}")
    for _, strength in loras:
        check(lora_strength=strength)
    return list(loras)


def check_tokens(tokens):
    require(isinstance(tokens, dict), f"tokens: expected {{new token: word}}, got {tokens!r:.80}")
    for pair in tokens.items():
        texts = check_strings("tokens", pair)
        require(all(map(str.strip, texts)), f"tokens: expected two texts, got {pair!r:.80}")
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
    try:
        found = torch.device(default_device() if device == "auto" else device)
        torch.zeros(1, device=found).item()
        return found
    except Exception as error:  # each backend raises its own
        reason = str(error).split("\n")[0]
        raise CascadeError(f"device: {device!r} is not available ({reason}); try cpu") from error


def check_dtype(name, dtype, device):
    if dtype == "auto":
        return default_dtype(device)
    known = isinstance(dtype, str) and dtype in DTYPES or dtype in DTYPES.values()
    require(known, f"{name}: expected one of auto, {', '.join(DTYPES)}, got {dtype!r:.80}")
    found = DTYPES.get(dtype, dtype)
    if found == torch.bfloat16:
        lacks_bf16 = default_dtype(device) == torch.float16
        require(not lacks_bf16, f"{name}: {device} has no bf16; use fp16 or fp32")
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


def count_steps(steps, strength=None):
    """The number of denoising steps in a list of times, or what `strength` leaves of a number of steps."""
    if isinstance(steps, list):
        return len(steps) - 1
    return steps if strength is None else int(steps * strength)


def label(name):
    return name.replace("_", " ").title()


# ---------------------------------------------------------------------------------------------------- files and images
FOLDERS = {"stage_c": "prior", "stage_c_lite": "prior_lite", "stage_a": "vqgan",
           "stage_b": "decoder", "stage_b_lite": "decoder_lite"}        # of the diffusers layout
PACKED = {                                              # ComfyUI's files
    "stable_cascade_stage_c": (
        "stage_c", "effnet_encoder", "previewer", "text_encoder", "image_encoder"),
    "stable_cascade_stage_b": ("stage_b", "stage_a", "text_encoder")}
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
    raise CascadeError(f"{folder}: {name} is missing (expected {files}; also with .bf16, _bf16, "
                       ".fp16 or _fp16); see 'Official weights' in README.md")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Opens an image as RGB, with its EXIF rotation applied and transparency on white."""
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except (OSError, ValueError, SyntaxError) as error:     # its file is damaged: PIL reads it only now
            raise CascadeError(f"this PIL image cannot be read ({error})") from error
    with reading(source, f"an image ({', '.join(IMAGE_FORMATS)}) of less than 178 million pixels"):
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
    """Pixels (1, 3, H, W) in [0, 1] -> their edges (1, 1, H, W), found at 224 x 224 pixels, as in the original code."""
    small = F.interpolate(pixels, (224, 224), mode="bilinear")
    small = (small[0].permute(1, 2, 0) * 255).byte()  # (224, 224, 3)
    edges = canny(small)[None, None].float()  # (1, 1, 224, 224)
    return F.interpolate(edges, pixels.shape[2:], mode="bilinear")


def canny(image: Tensor | np.ndarray, low: int = 100, high: int = 200) -> Tensor:
    """The edges of an image (Canny, 1986): (H, W, 3), uint8 -> (H, W), bool. Identical to OpenCV's cv2.Canny."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    image = torch.as_tensor(image).permute(2, 0, 1).float()  # (3, H, W)
    padded = F.pad(image, (1, 1, 1, 1), "replicate")[:, None]  # (3, 1, H + 2, W + 2)
    dx = F.conv2d(padded, sobel[None, None])[:, 0]  # (3, H, W)
    dy = F.conv2d(padded, sobel.T[None, None])[:, 0]  # (3, H, W)
    strongest = (dx.abs() + dy.abs()).argmax(0, keepdim=True)  # the channel
    dx = dx.gather(0, strongest)[0].long()  # (H, W)
    dy = dy.gather(0, strongest)[0].long()  # (H, W)
    magnitude = F.pad(dx.abs() + dy.abs(), (1, 1, 1, 1))  # (H + 2, W + 2)
    centre = magnitude[1:-1, 1:-1]  # (H, W)

    # non-maximum suppression: keep what is larger than both neighbours along its gradient, one of four directions
    horizontal = (centre > magnitude[1:-1, :-2]) & (centre >= magnitude[1:-1, 2:])
    vertical = (centre > magnitude[:-2, 1:-1]) & (centre >= magnitude[2:, 1:-1])
    falling = (centre > magnitude[:-2, :-2]) & (centre > magnitude[2:, 2:])
    rising = (centre > magnitude[:-2, 2:]) & (centre > magnitude[2:, :-2])
    x = dx.abs()
    y = dy.abs() << 15  # fixed point with 15 fractional bits, as in OpenCV
    tangent = 13573 * x  # tan(22.5 degrees) * x, in the same fixed point
    ridge = torch.where((dx < 0) == (dy < 0), falling, rising)
    ridge = torch.where(y > tangent + (x << 16), vertical, ridge)
    ridge = torch.where(y < tangent, horizontal, ridge) & (centre > low)  # (H, W)

    # hysteresis: keep strong edges, above `high`, and the weak ones that are connected to them
    edges = ridge & (centre > high)
    found = 0
    while edges.sum() > found:
        found = edges.sum()
        grown = F.max_pool2d(edges[None].float(), 3, stride=1, padding=1)[0].bool()
        edges = grown & ridge  # (H, W)
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
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise CascadeError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the command
MODES = {"prompts": "p", "prompt_file": "f", "latents": "l", "reconstruct": "r"}
CHUNK = 100                                             # prompts of a file that pass through each stage together


def option(name):
    return name if name == "prompts" else f"--{name.replace('_', '-')}"


def number(name):
    """The argparse type of an option in LIMITS."""
    def convert(text):
        value = text
        with suppress(ValueError):
            value = LIMITS[name][0](text)
        check(**{option(name): value})
        return value
    return convert


def lora_and_strength(text):
    file, _, strength = text.rpartition(":")
    with suppress(ValueError):
        if file:
            return file, float(strength)
    return text, 1.0


def token_and_word(text):
    token, _, word = text.rpartition("=")
    require(token and word, f"--token: expected NEW=WORD, got {text!r:.80}")
    return token, word


TEXT = {"metavar": "TEXT"}
FOLDER = {"metavar": "FOLDER", "type": Path}
FILE = {"metavar": "FILE"}
NEW_FILE = {"metavar": "FILE", "type": Path}
FILES = {"metavar": "FILE", "action": "append"}
LORA = {"metavar": "FILE[:STRENGTH]", "action": "append", "type": lora_and_strength}
TOKEN = {"metavar": "NEW=WORD", "action": "append", "type": token_and_word}
TIMES = {"metavar": ("LOW", "HIGH"), "nargs": 2, "type": float}
FLAG = {"action": "store_const", "const": True}
PRIOR = {"action": "store_const", "const": "prior"}
DECODER = {"action": "store_const", "const": "decoder"}
STAGE_C = "pPf"                                         # the modes that run it
STAGE_B = "pflr"
NEW_LATENTS = "pPfrR"
# name: (the modes that use it, its default, a number's limits or argparse's settings, help). The modes are the letters in
# MODES; P and R stand for p and r when only latents are saved.
OPTIONS = {
    "prompt_file": ("f", None, FILE, "one prompt per line; existing images are skipped"),
    "overwrite": ("f", None, FLAG, "replace images with other settings"),
    "latents": ("l", None, FILE, "decode these saved semantic latents"),
    "variation_image": (STAGE_C, None, FILES, "reference image (repeatable)"),
    "init_image": (STAGE_C, None, FILE, "image to image: the image to start from"),
    "strength": (STAGE_C, 0.8, (float, 0, 1), "how much --init-image changes"),
    "control": (STAGE_C, None, {"choices": CONTROLS}, "use this ControlNet; needs --hint"),
    "hint": (STAGE_C, None, FILE, "the ControlNet's hint image"),
    "control_strength": (STAGE_C, 1.0, (float, 0, 100), "factor of the ControlNet's output"),
    "mask": (STAGE_C, None, FILE, "white where to paint; for --init-image, --control inpainting"),
    "lora": ("pPfl", None, LORA, "merge this LoRA into the weights (repeatable; strength: 1)"),
    "token": ("pPfl", None, TOKEN, "a LoRA's new token, and its initial word (repeatable)"),
    "reconstruct": ("rR", None, FILE, "encode this image to a semantic latent, then decode"),
    "previews": ("pP", None, FOLDER, "save Stage C's prediction at each step"),
    "animate": ("p", None, NEW_FILE, ".gif or .webp: the first image, step by step in both stages"),
    "negative": (STAGE_C, "", TEXT, "negative prompt: what not to draw (needs guidance)"),
    "width": (NEW_LATENTS, None, (int, 64, 8192), "in pixels (default: the size trained for)"),
    "height": (NEW_LATENTS, None, (int, 64, 8192), "in pixels (default: the size trained for)"),
    "compression": (NEW_LATENTS, COMPRESSION, (float, 4, 128), "image size / semantic latent's size"),
    "images": (STAGE_C, 1, (int, 1, 1000), "images per prompt"),
    "seed": (NEW_LATENTS, 0, (int, 0, 2 ** 32 - 1), "of the first image; image i has seed + i"),
    "steps": (STAGE_C, 20, (int, 1, 1000), "denoising steps of Stage C"),
    "guidance": (STAGE_C, 4.0, (float, 0, 100), "guidance scale; up to 1: none"),
    "guidance_interval": (STAGE_C, [0.0, 1.0], TIMES, "apply guidance at these times; 1 is noise"),
    "decoder_steps": (STAGE_B, 10, (int, 1, 1000), "denoising steps of Stage B"),
    "decoder_guidance": (STAGE_B, None, (float, 0, 100), "that of Stage B (default: the recipe's)"),
    "recipe": (NEW_LATENTS, "diffusers", {"choices": RECIPES}, "sampling recipe, see sampler.py"),
    "lite_prior": (STAGE_C, None, PRIOR, "the lite Stage C"),
    "lite_decoder": (STAGE_B, None, DECODER, "the lite Stage B"),
    "decoder_dtype": (STAGE_B, None, {"choices": DTYPES}, "of Stage B and A (default: as --dtype)")}
LIMITS = {name: takes for name, (_, _, takes, _) in OPTIONS.items() if isinstance(takes, tuple)}
LIMITS |= {"prior_steps": (int, 0, 1000), "lora_strength": (float, -100, 100)}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message.removeprefix('argument ')} (--help explains the options)")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options that are not given are None."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; one image for each prompt")
    add("-o", "--output", default=Path("image.png"), type=Path, metavar="FILE",
        help=".png, or .safetensors for latents")
    lite = parser.add_mutually_exclusive_group()
    lite.add_argument("--lite", action="store_true", help="the lite Stage C and Stage B")
    for name, (_, default, takes, text) in OPTIONS.items():
        settings = {"type": number(name)} if name in LIMITS else takes
        if default not in (None, ""):
            text += f" (default: {default})"
        group = lite if name.startswith("lite") else parser
        group.add_argument(option(name), **settings, help=text)
    add("--weights", default=TINY, metavar="FOLDER", help="(default: weights/tiny)")
    add("--device", default="auto", help="torch device (default: CUDA, else MPS, else the CPU)")
    add("--dtype", default="auto", choices=("auto", *DTYPES),
        help="of the weights (default: fp32; on CUDA bf16, or fp16 where the GPU has no bf16)")
    add("--traceback", action="store_true", help="print the traceback of an error")
    return parser.parse_intermixed_args(arguments)


def resolve_options(options):
    """Returns the mode. Refuses options that it does not use, and fills in its defaults."""
    options.prompts = options.prompts or None
    modes = [name for name in MODES if getattr(options, name) is not None]
    if not modes and (options.variation_image or options.init_image or options.hint):
        modes = ["prompts"]
        options.prompts = [""]
    found = " and ".join(map(option, modes)) or "none"
    require(len(modes) == 1, "expected exactly one of: prompts, --prompt-file, --latents, --reconstruct; "
            f"or --variation-image, --init-image or --hint alone; got {found}")
    mode = modes[0]
    if mode in ("prompts", "prompt_file"):
        check_control(options.control, options.hint, options.mask, options.init_image)
    unused = set()
    for name, other in (("strength", "init_image"), ("control_strength", "control")):
        if getattr(options, other) is None:
            require(getattr(options, name) is None, f"{option(name)}: needs {option(other)}")
            unused.add(name)
    latents_only = options.output.suffix == ".safetensors"
    where = "when only latents are saved" if latents_only else f"with {option(mode)}"
    letter = MODES[mode].upper() if latents_only else MODES[mode]
    for name, (letters, default, _, _) in OPTIONS.items():
        value = getattr(options, name)
        is_used = letter in letters and name not in unused
        require(value is None or is_used, f"{option(name)}: not used {where}")
        is_empty = value in ("", [""]) and name != "negative"
        require(not is_empty, f"{option(name)}: expected a value, got none")
        if value is None and is_used:
            setattr(options, name, default)
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
            require(values["version"] == 2, f"expected version 2, got {values['version']!r:.80}")
            json.dumps(values, ensure_ascii=False).encode()         # an error unless it is UTF-8
            record = Record(**values)
            for name, kind in Record.__annotations__.items():
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
    mode = resolve_options(options)
    rank, world = torchrun_rank(mode)
    device = default_device() if options.device == "auto" else options.device
    if device == "cuda" and world > 1:                  # each process has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    lite = options.lite_prior or options.lite_decoder or options.lite
    cascade = Cascade(options.weights, device, options.dtype, lite, options.decoder_dtype,
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
    require(valid and int(rank) < int(world),
            f"RANK={rank}, WORLD_SIZE={world}: expected both or neither, the first smaller")
    require(mode == "prompt_file" or int(rank) == 0,
            f"RANK={rank}: several processes can only share a --prompt-file")
    return int(rank), int(world)


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
        cascade.check_networks("previewer")
    values = {name: value for name, value in vars(options).items() if name in Record.__annotations__}
    values["networks"] = cascade.check_networks(*names)
    values["width"], values["height"] = cascade.size(
        options.width, options.height, options.control, options.hint)
    values["prompts"] = options.prompts or [""]
    values["images"] = options.images or 1
    for name in ("init_image", "reconstruct", "hint", "mask"):
        values[name] = Path(values[name]).name if values[name] else None
    if options.variation_image:
        values["variation_image"] = [Path(image).name for image in options.variation_image]
    base = Record(**values | lora_settings(options))
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
    if guidance is None:
        guidance = RECIPES[record.recipe].decoder_guidance
    networks = record.networks | cascade.check_networks("text_encoder", "stage_b", "stage_a")
    record = replace(record, decoder_steps=options.decoder_steps, decoder_guidance=guidance, networks=networks)
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
    """Refuses, before any work, outputs that could not be written or would overwrite something else."""
    inputs = [options.prompt_file, options.latents, options.init_image, options.reconstruct,
              options.hint, options.mask, *(options.variation_image or [])]
    inputs = [os.path.realpath(path) for path in inputs if path]
    if options.animate:
        paths = paths + [options.animate]
    if options.previews:
        paths = paths + [preview_path(options.previews, i + 1) for i in range(options.steps)]
    require(len(set(paths)) == len(paths), f"{options.output}: is also one of the --previews")
    for path in paths:
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"{path}: cannot be written; does its folder exist, and is it writable?")
        if exists(path):
            require(path.is_file(), f"{path}: cannot be written; it is not a file")
            require(os.path.realpath(path) not in inputs, f"{path}: is an input; expected another name")
            is_ours = path.suffix != ".safetensors" or "cascade" in Weights(path).metadata
            require(is_ours, f"{path}: exists and holds tensors other than latents")


def remaining(options, jobs, rank, world):
    """This process's share of a prompt file, without the jobs whose images exist already."""
    share = jobs[rank::world]
    if world > 1:
        say(f"rank {rank} of {world}: {len(share)} of {len(jobs)} prompts")
    missing = []
    for job in share:
        done = [is_done(path, job.record.texts(i), options.overwrite)
                for i, path in enumerate(job.outputs)]
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
    """Runs each stage for all jobs, so that each network is loaded once and released before the next."""
    texts = []
    for job in jobs:
        text = cascade.encode_prompt(job.record.prompts, job.record.negative or "")
        texts.append(text.to("cpu"))
    cascade.kept.clear()
    record = jobs[0].record
    animation = callback = None
    if options.animate:
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
    size = {"width": record.width, "height": record.height, "compression": record.compression}
    if options.reconstruct:
        return cascade.encode_semantic(options.reconstruct, **size)
    return cascade.prior(
        text, images=record.images, seed=record.seed, steps=record.steps, guidance=record.guidance,
        recipe=record.recipe, interval=record.guidance_interval, callback=callback,
        variation_images=options.variation_image, init_image=options.init_image,
        strength=record.strength or 0.0, control=record.control, hint=options.hint,
        mask=options.mask, control_strength=record.control_strength or 0.0, **size)


def decode_images(cascade, job, text, animation):
    record = job.record
    images = cascade.decode(
        job.latents, text, width=record.width, height=record.height, compression=record.compression,
        seed=record.seed, steps=record.decoder_steps, guidance=record.decoder_guidance,
        recipe=record.recipe, prior_steps=count_steps(record.steps, record.strength), output="np",
        callback=animation.add_image_latents if animation else None)
    for i, (image, path) in enumerate(zip(images, job.outputs)):
        write_file(path, png(to_pillow(image), record.texts(i)))
    return images


def show_previews(cascade, folder=None, animation=None):
    """A callback that shows Stage C's prediction at each step: it saves the images side by side in a folder, adds the first
    to an animation, or both."""
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
            animation.add_frame(0, pixels)
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
        self.halves = [Image.new("RGB", self.half_size, "white")] * 2
        self.frames = []

    def add_frame(self, side, pixels):
        """Pixels (N, 3, H, W) -> one more frame, with the first image on side 0, the left, or 1."""
        image, = to_output(pixels[:1], "pil")
        self.halves[side] = image.resize(self.half_size, Image.Resampling.BICUBIC)
        width, height = self.half_size
        frame = Image.new("RGB", (2 * width + 8, height + 32), "gainsboro")
        frame.paste(self.halves[0], (0, 0))
        frame.paste(self.halves[1], (width + 8, 0))
        place = (width + 4, height + 16)
        ImageDraw.Draw(frame).text(place, self.caption, "black", self.font, anchor="mm")
        self.frames.append(frame)

    def add_image_latents(self, _, x0):
        """Image latents (N, 4, Hb, Wb) -> one more frame."""
        pixels = self.cascade._decode_pixels(x0[:1])  # (1, 3, 4 * Hb, 4 * Wb)
        self.add_frame(1, pixels[:, :, :self.height, :self.width])

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
        warnings.filterwarnings("default", ".* is cut to")              # each once
        warnings.showwarning = lambda message, *_: say(message)
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
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell may start jobs that ignore it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
