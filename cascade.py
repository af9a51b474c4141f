"""Stable Cascade, from a prompt to an image.

    python cascade.py "a large red circle on a white background"
    python cascade.py "a small blue star" --images 4 --seed 7 -o star.png       star-0.png to star-3.png, seeds 7 to 10
    python cascade.py --prompt-file prompts.txt -o out/image.png                one prompt per line: out/image-0.png, …
    python cascade.py "a circle" --negative "red" --guidance 6
    python cascade.py "a green heart" -o heart.safetensors                      Stage C only: saves semantic latents
    python cascade.py --latents heart.safetensors -o heart.png                  Stage B and A: decodes them
    python cascade.py --variation-image a.png                                   a variation of an image
    python cascade.py "a blue star" --init-image a.png --strength 0.7           image to image
    python cascade.py --reconstruct a.png                                       to the semantic latent and back
    python cascade.py "an astronaut" --weights weights/official --lite --dtype bf16

The text encoder reads the prompt. Stage C generates a semantic latent from it, 42.67 times smaller than the image on
each side. Stage B generates an image latent from that, 4 times smaller. Stage A decodes it into pixels. Each network is
loaded just before its turn and released after it.
"""
# The letters in shape comments are explained in model.py; here H, W are always pixels.
import argparse
import ctypes
import io
import itertools
import json
import math
import numbers
import os
import signal
import sys
import traceback
import types
import uuid
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import model
import text_encoder
from model import CascadeError, Weights, exists, out_of_memory, reading, require
from sampler import RECIPES, Recipe, draw_noise, generators, sample

COMPRESSION = 42.67                                     # pixels per position of the semantic latent
TINY = Path(__file__).resolve().parent / "weights" / "tiny"
NETWORKS = model.NETWORKS | text_encoder.NETWORKS
CHANNELS = {"stage_c": (16, 0), "stage_b": (4, 16), "stage_a": (4, 0),  # of latents, semantic latents
            "effnet_encoder": (16, 0), "previewer": (16, 0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("pil", "np", "pt", "latent")
LITE = {False: (), True: ("stage_c", "stage_b"), "prior": ("stage_c",), "decoder": ("stage_b",)}
OneImage = str | Path | Image.Image                     # a file, or an image of pillow's
Device = str | torch.device
Dtype = str | torch.dtype


# ---------------------------------------------------------------------------------------------------- the pipeline
@dataclass(frozen=True)
class TextEmbeddings:
    """What the text encoder makes of P prompts: P conditional rows, then P unconditional rows."""
    hidden: Tensor  # (2P, L, D)
    pooled: Tensor  # (2P, 1, D)

    def to(self, device: Device) -> "TextEmbeddings":
        return TextEmbeddings(self.hidden.to(device), self.pooled.to(device))

    def check(self, D=None, where=""):
        check_tensor(f"{where}hidden text embeddings", self.hidden, (None, None, D))
        rows = len(self.hidden)
        check_tensor(f"{where}pooled text embeddings", self.pooled, (rows, 1, D))
        require(rows % 2 == 0, f"text embeddings: expected an even number of rows, got {rows}")


Prompts = str | list[str] | TextEmbeddings


def append_zeros(conditional):
    """Conditional rows, then as many unconditional rows of zeros."""
    return torch.cat([conditional, torch.zeros_like(conditional)])


def skip_noise_of_prior(noise_generators, shape, prior_steps):
    """diffusers runs both stages on one generator, so Stage B's noise begins after what Stage C drew from it: the first
    latent, then once in every step. None: there was no Stage C."""
    if prior_steps is not None:
        check(prior_steps=prior_steps)
        for _ in range(1 + prior_steps):
            draw_noise(noise_generators, shape, "cpu")


class Cascade:
    """The networks of one weights folder: original single files, diffusers folders, or both mixed.

    lite            True for the lite versions of Stage C and B, "prior" or "decoder" for one of them
    decoder_dtype   of Stage B and A, if it is not dtype
    keep            keeps every network in memory after its turn
    progress        shows progress bars
    """
    def __init__(self, folder: str | Path = TINY, device: Device = "cpu", dtype: Dtype = "fp32",
                 lite: bool | str = False, decoder_dtype: Dtype | None = None, keep: bool = False,
                 progress: bool = False):
        self.folder = check_folder(folder)
        self.device = check_device(device)
        prior_dtype = check_dtype("dtype", dtype, self.device)
        decoder_dtype = prior_dtype if decoder_dtype is None else decoder_dtype
        decoder_dtype = check_dtype("decoder_dtype", decoder_dtype, self.device)
        self.dtypes = dict.fromkeys(NETWORKS, prior_dtype)
        self.dtypes["stage_b"] = self.dtypes["stage_a"] = decoder_dtype
        check(lite=lite)
        self.lite = LITE[lite]
        self.keep, self.progress = keep, progress
        self.kept = {}

    @torch.no_grad()
    def __call__(self, prompts: Prompts = "", negative: str | list[str] = "", *,
                 width: int | None = None, height: int | None = None, images: int = 1, seed: int = 0,
                 steps: int = 20, guidance: float = 4.0, decoder_steps: int = 10,
                 decoder_guidance: float | None = None, recipe: str = "diffusers", output: str = "pil",
                 variation_images: list | OneImage | Tensor | None = None,
                 init_image: OneImage | Tensor | None = None, strength: float = 0.8,
                 interval: tuple[float, float] = (0.0, 1.0), callback: Callable | None = None):
        """Prompts -> images, `images` for each prompt; image i of all is drawn from the seed `seed + i`.
        `prior` and `decode` explain the arguments."""
        check(decoder_steps=decoder_steps, output=output)
        if decoder_guidance is not None:
            check(decoder_guidance=decoder_guidance)
        for name in ("text_encoder", "stage_c", "stage_b", "stage_a"):
            self.file(name)
        width, height = self.size(width, height)
        text = self.encode_prompt(prompts, negative)
        latents = self.prior(
            text, width=width, height=height, images=images, seed=seed, steps=steps,
            guidance=guidance, recipe=recipe, variation_images=variation_images,
            init_image=init_image, strength=strength, interval=interval, callback=callback)
        prior_steps = steps if init_image is None else int(steps * strength)
        return self.decode(
            latents, text, width=width, height=height, seed=seed, steps=decoder_steps,
            guidance=decoder_guidance, recipe=recipe, prior_steps=prior_steps, output=output)

    @torch.no_grad()
    def prior(self, prompts: Prompts = "", negative: str | list[str] = "", *,
              width: int | None = None, height: int | None = None, images: int = 1, seed: int = 0,
              steps: int = 20, guidance: float = 4.0, recipe: str = "diffusers",
              variation_images: list | OneImage | Tensor | None = None,
              init_image: OneImage | Tensor | None = None, strength: float = 0.8,
              interval: tuple[float, float] = (0.0, 1.0), callback: Callable | None = None) -> Tensor:
        """Stage C: prompts -> semantic latents (N, 16, Hc, Wc), fp32.

        prompts             strings, or the TextEmbeddings made from them and their negative prompts
        variation_images    reference images, or their embeddings (R, E)
        init_image          image to image: start from this image, or from a semantic latent (1 or N, 16, Hc, Wc), noised
                            to t = strength; int(steps * strength) steps remain
        recipe, interval    see sampler.py
        callback            called after every step with its number, from 1, and the predicted clean latents
        """
        check(steps=steps, guidance=guidance, images=images, strength=strength)
        check(recipe=recipe, interval=interval)
        width, height = self.size(width, height)
        text = self.encode_prompt(prompts, negative)
        N = images * len(text.pooled) // 2
        seed = check_seeds(seed, N)
        shape = (16, *semantic_sides(width, height))
        condition = {"clip_text": text.hidden.repeat_interleave(images, dim=0),  # (2 * N, L, D)
                     "clip_text_pooled": text.pooled.repeat_interleave(images, dim=0)}
        if variation_images is not None:
            embeddings = self.encode_image(variation_images)  # (R, E)
            E = Weights(self.file("stage_c"))["clip_img_mapper.weight"][1]
            check_tensor("variation_images: the embeddings", embeddings, (None, E))
            condition["clip_img"] = append_zeros(embeddings.expand(N, -1, -1))  # (2 * N, R, E)
        start = {}
        if init_image is not None:
            init_latent = self.encode_semantic(init_image, width, height)  # (1 or N, 16, Hc, Wc)
            count = N if init_latent.shape[:1] == (N,) else 1
            check_tensor("init_image: the latents", init_latent, (count, *shape))
            start = {"init_latent": init_latent, "strength": strength}
            steps = int(steps * strength)
            require(steps > 0, f"strength: {strength} leaves no step; expected more of either")
        recipe = replace(RECIPES[recipe], interval=tuple(interval))
        unet, noise_generators = self.network("stage_c"), generators(seed, N)
        text.check(unet.config.text_dim, f"{self.file('stage_c')}: ")
        latents = sample(unet, shape, condition, steps, guidance, noise_generators, recipe, **start)
        return self._last(latents, "stage_c", steps, recipe, callback)

    @torch.no_grad()
    def decode(self, latents: Tensor, prompts: Prompts = "", negative: str | list[str] = "", *,
               width: int | None = None, height: int | None = None, seed: int = 0, steps: int = 10,
               guidance: float | None = None, recipe: str = "diffusers", prior_steps: int | None = 20,
               output: str = "pil"):
        """Stage B and A: semantic latents (N, 16, Hc, Wc) -> N images of exactly width x height pixels.

        prompts         the prompts of the latents, in the same order, or the TextEmbeddings made from them
        width, height   42.67 times the latents' sides if None
        guidance        the recipe's if None: 1.1 in the original one, else none
        prior_steps     the noise continues where a prior of so many steps stopped; None: it starts afresh
        output          "pil": a list of images; "np": (N, H, W, 3), "pt": (N, 3, H, W), fp32 in [0, 1]; "latent": Stage B's
                        latents (N, 4, Hb, Wb)
        """
        width, height = self._decoded_size(latents, width, height)
        check(steps=steps, output=output, recipe=recipe)
        text = self.encode_prompt(prompts, negative)
        N, images = len(latents), images_per_prompt(latents, len(text.pooled) // 2)
        recipe = replace(RECIPES[recipe], shift=RECIPES[recipe].decoder_shift)
        guidance = recipe.decoder_guidance if guidance is None else guidance
        check(guidance=guidance)
        noise_generators = generators(check_seeds(seed, N), N)
        skip_noise_of_prior(noise_generators, latents.shape[1:], prior_steps)
        condition = {"clip_text_pooled": text.pooled.repeat_interleave(images, dim=0),  # (2 * N, 1, D)
                     "effnet": append_zeros(latents)}  # (2 * N, 16, Hc, Wc)
        shape = (4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))  # even, for Stage B's patches
        unet = self.network("stage_b")
        text.check(unet.config.text_dim, f"{self.file('stage_b')}: ")
        latents = sample(unet, shape, condition, steps, guidance, noise_generators, recipe)
        z = self._last(latents, "stage_b", steps, recipe)  # (N, 4, Hb, Wb)
        del unet  # releases it before Stage A is loaded
        if output == "latent":
            return z
        return to_output(self._decode_pixels(z)[:, :, :height, :width], output)

    def _decoded_size(self, latents, width, height):
        check_tensor("latents", latents, (None, 16, None, None))
        Hc, Wc = latents.shape[2:]
        width = int(Wc * COMPRESSION) if width is None else width
        height = int(Hc * COMPRESSION) if height is None else height
        check(width=width, height=height)
        check_tensor("latents", latents, (None, 16, *semantic_sides(width, height)))
        return width, height

    def _last(self, latents, name, steps, recipe, callback=None):
        """Runs a sampler to its end -> the last latents."""
        progress = tqdm(latents, label(name), steps, disable=not self.progress)
        for i, (x, x0) in enumerate(progress, start=1):
            self.check_finite(name, x, f" after step {i} of {steps}")
            if callback:
                callback(i, x0)
        return x0 if recipe.return_x0 else x

    def _decode_pixels(self, z):
        """Stage A, one image at a time: (N, 4, Hb, Wb) -> (N, 3, 4 * Hb, 4 * Wb) in [0, 1], fp32."""
        stage_a = self.network("stage_a")
        pixels = [stage_a.decode(latent[None].to(self.dtypes["stage_a"])).float() for latent in z]
        return self.check_finite("stage_a", torch.cat(pixels)).clamp(0, 1)

    @torch.no_grad()
    def encode_prompt(self, prompts: Prompts, negative: str | list[str] = "") -> TextEmbeddings:
        """P prompts and their negative prompts, one for all or one for each. TextEmbeddings are returned
        as they are."""
        if isinstance(prompts, TextEmbeddings):
            require(negative == "", "negative: expected none beside TextEmbeddings, which hold it")
            prompts.check()
            return prompts.to(self.device)
        prompts = check_strings("prompts", prompts)
        negative = check_strings("negative", negative)
        if len(negative) == 1:
            negative = negative * len(prompts)
        require(len(negative) == len(prompts),
                f"negative: expected 1 or {len(prompts)} prompts, got {len(negative)}")
        rows = list(dict.fromkeys(prompts + negative))  # without repetitions
        encoder = self.network("text_encoder")
        tokenizer = text_encoder.Tokenizer(self.folder / "tokenizer", encoder.config.length)
        end = encoder.config.end
        require(tokenizer.end == end, f"{self.folder / 'tokenizer'}: expected {end} as the end token, "
                f"as in the text encoder, got {tokenizer.end}; is it another model's tokenizer?")
        ids, mask = tokenizer(rows)
        require(ids.max() < encoder.config.vocabulary, f"{self.folder / 'tokenizer'}: expected "
                f"ids below {encoder.config.vocabulary}, got {ids.max()}")
        hidden, pooled = encoder(ids.to(self.device), mask.to(self.device))
        self.check_finite("text_encoder", hidden)
        self.check_finite("text_encoder", pooled)
        order = [rows.index(text) for text in prompts + negative]
        return TextEmbeddings(hidden[order], pooled[order])

    @torch.no_grad()
    def encode_image(self, images: list | OneImage | Tensor) -> Tensor:
        """CLIP embeddings (R, E) of reference images. Embeddings are returned as they are."""
        if torch.is_tensor(images):
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
                        height: int | None = None) -> Tensor:
        """The semantic latent (1, 16, Hc, Wc), fp32, of an image that is resized and cropped to width x height. Latents
        are returned as they are."""
        if torch.is_tensor(image):
            return image
        width, height = self.size(width, height)
        image = ImageOps.fit(load_image(image), (width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        Hc, Wc = semantic_sides(width, height)
        pixels = F.interpolate(pixels, (32 * Hc, 32 * Wc), mode="bilinear", antialias=True)
        encoder = self.network("effnet_encoder")
        latent = encoder(pixels.to(self.device, self.dtypes["effnet_encoder"]))
        return self.check_finite("effnet_encoder", latent.float())

    def network(self, name: str) -> torch.nn.Module:
        """A network by its name in NETWORKS, ready to run."""
        check(network=name)
        network = self.kept.get(name)
        if network is None:
            network = model.load(self.file(name), self.device, self.dtypes[name], name, NETWORKS)
            config = network.config
            found = getattr(config, "latent_channels", 0), getattr(config, "semantic_channels", 0)
            fits = found == CHANNELS.get(name, (0, 0))
            require(fits, f"{self.file(name)}: expected (latent, semantic) channels "
                    f"{CHANNELS.get(name)}, got {found}")
        if self.keep:
            self.kept[name] = network
        return network

    def file(self, name: str) -> Path:
        return find_file(self.folder, f"{name}_lite" if name in self.lite else name)

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Replaces None by the size that the Stage C file was trained for, if it says so, or by 1024."""
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
                f"{label(name)}: the output is not finite{when}; {self.file(name)} may be broken, "
                f"or its numbers too large for {self.dtypes[name]}: try bf16 or fp32")
        return tensor


# ---------------------------------------------------------------------------------------------------- checks and sizes
LIMITS = {
    "width": (64, 8192), "height": (64, 8192), "images": (1, 1000),
    "seed": (0, 2 ** 32 - 1),                           # CPU generators use 32 bits
    "steps": (1, 1000), "decoder_steps": (1, 1000), "prior_steps": (0, 1000),
    "guidance": (0.0, 100.0), "decoder_guidance": (0.0, 100.0), "strength": (0.0, 1.0)}
CHOICES = {"recipe": RECIPES, "output": OUTPUTS, "lite": LITE, "network": NETWORKS}


def check(**values):
    """Raises an error that names the first value that is not valid."""
    for name, value in values.items():
        if name.endswith("interval"):
            valid = isinstance(value, (list, tuple)) and all(map(is_number, value))
            valid = valid and len(value) == 2 and 0 <= value[0] <= value[1] <= 1
        elif name in CHOICES:
            valid = isinstance(value, (str, bool)) and value in CHOICES[name]
        else:
            low, high = LIMITS[name]
            kind = numbers.Real if isinstance(low, float) else numbers.Integral
            valid = is_number(value, kind) and low <= value <= high
        require(valid, f"{name}: expected {expected(name)}, got {value!r:.80}")


def is_number(value, kind=numbers.Real):
    return isinstance(value, kind) and not isinstance(value, bool)


def expected(name):
    if name.endswith("interval"):
        return "two times from 0 to 1, the lower one first"
    if name in CHOICES:
        return f"one of {', '.join(map(str, CHOICES[name]))}"
    low, high = LIMITS[name]
    return f"{'a number' if isinstance(low, float) else 'an integer'} from {low} to {high}"


def check_seeds(first, count):
    check(seed=first)
    last = int(first) + count - 1
    require(last <= LIMITS["seed"][1], f"seed: {count} images from {first} on need seeds up to "
            f"{last}: expected {expected('seed')}")
    return int(first)


def check_folder(folder):
    try:
        os.scandir(folder).close()
        return Path(folder)
    except (OSError, TypeError, ValueError) as error:
        raise CascadeError(f"{folder}: this folder cannot be opened ({error})") from error


def check_device(device):
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except Exception as error:  # each backend raises its own
        reason = str(error).split("\n")[0]
        raise CascadeError(f"device: {device!r} cannot be used ({reason}); try cpu") from error


def check_dtype(name, dtype, device):
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    known = isinstance(found, torch.dtype) and found in DTYPES.values()
    require(known, f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r:.80}")
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
    """Finite floating-point numbers in this shape; None stands for any size."""
    kind = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
    is_float = torch.is_tensor(tensor) and tensor.is_floating_point()
    require(is_float, f"{name}: expected a floating-point tensor, got {kind}")
    fits = tensor.dim() == len(shape) and tensor.numel() > 0
    fits = fits and all(size in (None, found) for size, found in zip(shape, tensor.shape))
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{name}: expected the shape ({sizes}), got {tuple(tensor.shape)}")
    require(tensor.isfinite().all(), f"{name}: expected finite numbers, got infinite ones or NaN")


def images_per_prompt(latents, prompts):
    images, rest = divmod(len(latents), prompts)
    require(images > 0 and rest == 0, f"{len(latents)} latents for {prompts} prompts: expected a "
            "multiple of the number of prompts")
    return images


def semantic_sides(width, height):
    return math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION)


def label(name):
    return name.replace("_", " ").title()


# ---------------------------------------------------------------------------------------------------- files and images
FOLDERS = {"stage_c": "prior", "stage_c_lite": "prior_lite", "stage_a": "vqgan",
           "stage_b": "decoder", "stage_b_lite": "decoder_lite"}        # of the diffusers layout


def find_file(folder, name):
    """The file of a network: the original single file or the diffusers folder's, the plain one before the bf16 one."""
    places = [f"{name}/model"] if name in text_encoder.NETWORKS else [name]
    if name in FOLDERS:
        places.append(f"{FOLDERS[name]}/diffusion_pytorch_model")
    for place, ending in itertools.product(places, ("", ".bf16", "_bf16")):
        path = folder / f"{place}{ending}.safetensors"
        if exists(path):
            return path
    files = " or ".join(f"{place}.safetensors" for place in places)
    raise CascadeError(f"{folder}: {name} is missing (expected {files}, or one with .bf16 or _bf16);"
                       " README, 'Official weights', says how to get it")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def load_image(source: OneImage) -> Image.Image:
    """A file in one of the IMAGE_FORMATS, or an image of pillow's -> RGB, upright, white where transparent."""
    if isinstance(source, Image.Image):
        return to_rgb(source)
    is_path = isinstance(source, (str, Path))
    require(is_path, f"expected an image or the name of its file, got {type(source).__name__}")
    kinds = ", ".join(IMAGE_FORMATS)
    with reading(source, f"an image ({kinds}) of less than 178 million pixels"):
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            return to_rgb(image)


def to_rgb(image):
    sixteen_bits = image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG"
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    require(max(width, height) <= 100 * min(width, height),
            f"an image of {width} x {height} pixels: expected a ratio of 100 at most")
    if sixteen_bits:                                    # per pixel, grey
        grey = np.asarray(image)
        opaque = grey != image.info.get("transparency", -1)
        image = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
        image.putalpha(Image.fromarray(np.uint8(opaque * 255)))
    require(image.mode not in ("I", "F"), "an image of 32-bit numbers: expected 8 or 16 bits each")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] -> an image of pillow's."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def to_output(pixels, output):
    """Pixels (N, 3, H, W) in the form that `Cascade.decode` was asked for."""
    if output == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    return array if output == "np" else [to_pillow(image) for image in array]


def png(image, texts):
    """An image as the bytes of a PNG that says what it was made with."""
    file, info = io.BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    image.save(file, "png", pnginfo=info)
    return file.getvalue()


def write_file(path: Path, data: bytes):
    """All or nothing: written to a new file in the same folder, which then takes the name."""
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
STAGE_C = {"negative", "width", "height", "images", "seed", "steps", "guidance", "recipe", "lite_prior",
           "guidance_interval", "variation_image", "init_image", "strength"}
STAGE_B = {"decoder_steps", "decoder_guidance", "decoder_dtype", "lite_decoder"}
MODES = {                                               # the options that each mode uses; it refuses the others
    "prompts": SETUP | STAGE_C | STAGE_B | {"prompts", "previews"},
    "prompt_file": SETUP | STAGE_C | STAGE_B | {"prompt_file", "overwrite"},
    "latents": SETUP | STAGE_B | {"latents"},
    "reconstruct": SETUP | STAGE_B | {"reconstruct", "width", "height", "seed", "recipe"}}
DEFAULTS = {"negative": "", "images": 1, "seed": 0, "steps": 20, "guidance": 4.0, "recipe": "diffusers",
            "guidance_interval": [0.0, 1.0], "strength": 0.8, "decoder_steps": 10}
CHUNK = 100                                             # prompts of a file that go from text to image together


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message.removeprefix('argument ')} (--help explains the options)")


def number(name):
    """The type of an option with a limit."""
    def convert(text):
        try:
            value = type(LIMITS[name][0])(text)
            check(**{name: value})
        except (ValueError, CascadeError) as error:
            raise argparse.ArgumentTypeError(f"expected {expected(name)}, got {text}") from error
        return value
    return convert


def parse(arguments: list[str]) -> argparse.Namespace:
    """An option that was not given is None."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; one image for each")
    add("-o", "--output", default="image.png", type=Path, metavar="FILE",
        help=".png, or .safetensors for latents")
    add("--prompt-file", metavar="FILE", help="one prompt per line; existing images are skipped")
    add("--overwrite", action="store_true", default=None, help="replace images of other prompts")
    add("--latents", metavar="FILE", help="decode these saved semantic latents")
    add("--variation-image", action="append", metavar="FILE", help="a reference image (repeat)")
    add("--init-image", metavar="FILE", help="image to image: the image to start from")
    add("--strength", type=number("strength"), help="how much --init-image changes (default: 0.8)")
    add("--reconstruct", metavar="FILE", help="an image to encode to a semantic latent and back")
    add("--previews", type=Path, metavar="FOLDER", help="save what Stage C predicts, every step")
    add("--negative", metavar="TEXT", help="the negative prompt: what not to draw (needs guidance)")
    add("--width", type=number("width"), help="in pixels (default: as the weights were trained)")
    add("--height", type=number("height"), help="in pixels (default: as the weights were trained)")
    add("--images", type=number("images"), help="images per prompt (default: 1)")
    add("--seed", type=number("seed"), help="of the first image; then 1 more each (default: 0)")
    add("--steps", type=number("steps"), help="of Stage C (default: 20)")
    add("--guidance", type=number("guidance"), help="scale for Stage C; up to 1: none (default: 4)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the times, 1 noise and 0 image, at which guidance is applied (default: 0 1)")
    add("--decoder-steps", type=number("decoder_steps"), help="of Stage B (default: 10)")
    add("--decoder-guidance", type=number("decoder_guidance"),
        help="scale for Stage B (default: none; in the original recipe 1.1)")
    add("--recipe", choices=RECIPES, help="how to sample, see sampler.py (default: diffusers)")
    add("--weights", type=Path, default=TINY, metavar="FOLDER", help="(default: weights/tiny)")
    lite = parser.add_mutually_exclusive_group().add_argument
    lite("--lite", action="store_true", help="the lite versions of Stage C and Stage B")
    lite("--lite-prior", action="store_true", default=None, help="the lite version of Stage C")
    lite("--lite-decoder", action="store_true", default=None, help="the lite version of Stage B")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="(default: %(default)s)")
    add("--dtype", default="fp32", choices=DTYPES, help="of the weights (default: %(default)s)")
    add("--decoder-dtype", choices=DTYPES, help="of Stage B and A (default: as --dtype)")
    add("--traceback", action="store_true", help="show where an error comes from")
    return parser.parse_intermixed_args(arguments)


def settle(options):
    """Finds the mode, refuses the options that it does not use and fills in the defaults of those that it does."""
    options.prompts = options.prompts or None
    modes = [name for name in MODES if getattr(options, name) is not None]
    if not modes and (options.variation_image or options.init_image):
        modes, options.prompts = ["prompts"], [""]
    require(len(modes) == 1, "expected one of: prompts, --prompt-file, --latents, --reconstruct, "
            f"--variation-image, --init-image; got {' and '.join(map(option, modes)) or 'none'}")
    mode, used = modes[0], MODES[modes[0]]
    require(options.init_image or options.strength is None, "--strength: needs --init-image")
    if not options.init_image:
        used = used - {"strength"}
    latents_only = options.output.suffix == ".safetensors"
    if latents_only:
        used = used - STAGE_B
    where = "if only latents are saved" if latents_only else f"with {option(mode)}"
    for name, value in vars(options).items():
        require(value is None or name in used, f"{option(name)}: not used {where}")
        require(value != "" or name == "negative", f"{option(name)}: expected a value, got none")
        if value is None and name in used:
            setattr(options, name, DEFAULTS.get(name))
    if options.guidance_interval:
        check(**{"--guidance-interval": options.guidance_interval})
    if options.decoder_guidance is None and options.recipe and not latents_only:
        options.decoder_guidance = RECIPES[options.recipe].decoder_guidance
    endings = (".png",) if mode in ("latents", "prompt_file") else (".png", ".safetensors")
    require(options.output.suffix in endings,
            f"--output: expected a name that ends in {' or '.join(endings)}, got {options.output}")
    return mode


def option(name):
    return name if name == "prompts" else f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Record:
    """What a run was made with, by the names of the options; None is what it did not use. It is written into images and
    latents, and read back from latents."""
    prompts: list[str]
    negative: str | None
    width: int
    height: int
    images: int | None
    seed: int
    recipe: str
    steps: int | None
    guidance: float | None
    guidance_interval: list[float] | None
    variation_image: list[str] | None                   # names of files
    init_image: str | None
    strength: float | None
    reconstruct: str | None
    decoder_steps: int | None
    decoder_guidance: float | None
    networks: dict[str, str]                            # name -> file, device and type
    version: int = 2

    @staticmethod
    def read(path, text):
        with reading(path, "latents that this version of cascade.py saved"):
            values = json.loads(text)
            found = values.get("version") if isinstance(values, dict) else None
            require(found == Record.version, f"expected version {Record.version}, got {found!r:.80}")
            record = Record(**values)
            for field in fields(Record):
                value = getattr(record, field.name)
                require(has_type(value, field.type),
                        f"{field.name}: expected {field.type}, got {value!r:.80}")
                if value is not None and field.name in (*LIMITS, *CHOICES, "guidance_interval"):
                    check(**{field.name: value})
            check_strings("prompts", record.prompts)
            check(images=record.images)
            return record

    @property
    def prior_steps(self):
        """How many steps Stage C ran; None if it did not run."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    def texts(self, i):
        """What image i says of itself."""
        own = replace(self, prompts=self.prompts[i // self.images], seed=self.seed + i, images=None)
        return {name: str(value) for name, value in asdict(own).items() if value is not None}


def has_type(value, kind):
    """Whether a value read from JSON has a type like `list[str] | None`."""
    if isinstance(kind, types.UnionType):
        return any(has_type(value, one) for one in kind.__args__)
    if isinstance(kind, types.GenericAlias):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        is_outer = isinstance(value, kind.__origin__)
        return is_outer and all(has_type(part, kind.__args__[-1]) for part in parts)
    if kind is str:
        return isinstance(value, str) and is_utf8(value)
    return type(value) is kind or kind is float and type(value) is int


@dataclass
class Job:
    """The images of one record, which are drawn together, and their files."""
    record: Record
    outputs: list[Path]
    latents: Tensor | None = None                       # if they need not be generated


def run(options):
    mode = settle(options)
    rank, world = torchrun_rank(mode)
    lite = "prior" if options.lite_prior else "decoder" if options.lite_decoder else options.lite
    if options.device == "cuda" and world > 1:          # each process has a GPU of its own
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    cascade = Cascade(options.weights, options.device, options.dtype, lite, options.decoder_dtype,
                      keep=mode == "prompt_file", progress=True)
    jobs = plan_latents(options, cascade) if mode == "latents" else plan(options, mode, cascade)
    check_outputs(options, [path for job in jobs for path in job.outputs])
    if mode == "prompt_file":
        jobs = remaining(options, jobs, rank, world)
    for i in range(0, len(jobs), CHUNK):
        draw(options, cascade, jobs[i:i + CHUNK])


def torchrun_rank(mode):
    """torchrun starts several processes and numbers them; each draws its share of a prompt file."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    valid = all(text and text.isdecimal() and len(text) < 9 for text in (rank, world))
    valid = valid and int(rank) < int(world)
    require(valid, f"expected RANK and WORLD_SIZE, or neither, with 0 <= {rank} < {world}")
    require(mode == "prompt_file" or int(rank) == 0,
            f"RANK={rank}: several processes can only share a --prompt-file")
    return int(rank), int(world)


def describe(cascade, names):
    """File, device and type of networks; a missing file is an error."""
    networks = {}
    for name in names:
        file = cascade.file(name).relative_to(cascade.folder).as_posix()
        networks[name] = f"{file}, {cascade.device.type}, {cascade.dtypes[name]}"
    return networks


def plan(options, mode, cascade):
    names = ["text_encoder"]
    names += [] if options.reconstruct else ["stage_c"]
    names += ["image_encoder"] if options.variation_image else []
    names += ["effnet_encoder"] if options.init_image or options.reconstruct else []
    names += ["stage_b", "stage_a"] if options.output.suffix == ".png" else []
    names_of_fields = [field.name for field in fields(Record)]
    values = {name: value for name, value in vars(options).items() if name in names_of_fields}
    values["width"], values["height"] = cascade.size(options.width, options.height)
    values["networks"] = describe(cascade, names)
    values["prompts"] = options.prompts or [""]
    values["images"] = options.images or 1
    for name in ("init_image", "reconstruct"):
        values[name] = Path(values[name]).name if values[name] else None
    if options.variation_image:
        values["variation_image"] = [Path(image).name for image in options.variation_image]
    base = Record(**values)
    if mode != "prompt_file":
        return [Job(base, output_paths(options.output, 0, len(base.prompts) * base.images))]

    jobs = []
    for i, prompt in enumerate(read_prompts(options.prompt_file)):
        first = i * base.images
        if prompt:                                      # an empty line draws nothing and keeps its numbers
            record = replace(base, prompts=[prompt], seed=base.seed + first)
            paths = output_paths(options.output, first, base.images, numbered=True)
            jobs.append(Job(record, paths))
    check_seeds(jobs[-1].record.seed, base.images)
    return jobs


def plan_latents(options, cascade):
    weights = Weights(options.latents)
    record = Record.read(options.latents, weights.metadata.get("cascade", "null"))
    latents = weights.tensor("latents")
    with reading(options.latents, "latents"):
        count = len(record.prompts) * record.images
        check_seeds(record.seed, count)
        shape = (count, 16, *semantic_sides(record.width, record.height))
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
    """Refuses, before the work, what could not be written after it, and what would be lost."""
    inputs = [options.prompt_file, options.latents, options.init_image, options.reconstruct]
    inputs = [Path(path).resolve() for path in inputs + (options.variation_image or []) if path]
    if options.previews:
        paths = paths + [preview_path(options.previews, i + 1) for i in range(options.steps)]
    require(len(set(paths)) == len(paths), f"{options.output}: is also one of the --previews")
    for path in paths:
        folder = path.absolute().parent
        require(folder.is_dir() and os.access(folder, os.W_OK),
                f"{path}: cannot be written; is its folder there, and yours to write to?")
        found = exists(path)
        require(not found or path.is_file(), f"{path}: cannot be written; it is a folder or alike")
        require(path.resolve() not in inputs, f"{path}: is an input; expected another output")
        if found and path.suffix == ".safetensors":
            is_ours = "cascade" in Weights(path).metadata
            require(is_ours, f"{path}: holds no latents but other tensors; expected another output")


def remaining(options, jobs, rank, world):
    """This process's share of a prompt file, without the jobs whose images exist."""
    share = jobs[rank::world]
    if world > 1:
        say(f"rank {rank} of {world}: {len(share)} of {len(jobs)} prompts")
    missing = []
    for job in share:
        texts = map(job.record.texts, range(len(job.outputs)))
        done = [is_done(*image, options.overwrite) for image in zip(job.outputs, texts)]
        if not all(done):
            missing.append(job)
    if share and not missing:
        say(f"every image of {options.prompt_file} exists already")
    return missing


def is_done(path, texts, overwrite):
    """Whether this image exists, complete and with the same record."""
    if not exists(path):
        return False
    with suppress(CascadeError), reading(path, "a PNG"):
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            if image.text == texts:
                return True
    require(overwrite, f"{path}: exists, but is not this run's image; --overwrite replaces it")
    return False


def draw(options, cascade, jobs):
    """From text to images; with `keep`, each network is loaded once for all jobs."""
    texts = []
    for job in jobs:
        text = cascade.encode_prompt(job.record.prompts, job.record.negative or "")
        texts.append(text.to("cpu"))
    cascade.kept.clear()
    callback = save_previews(options.previews, cascade) if options.previews else None
    for job, text in zip(jobs, texts):
        if job.latents is None:
            job.latents = generate_latents(options, cascade, job.record, text, callback).cpu()
    cascade.kept.clear()
    for job, text in zip(jobs, texts):
        if options.output.suffix == ".safetensors":
            metadata = {"cascade": json.dumps(asdict(job.record))}
            write_file(job.outputs[0], save({"latents": job.latents}, metadata))
        else:
            images = decode_images(cascade, job, text)
            if options.reconstruct:
                print_psnr(options.reconstruct, images[0], job.latents)
        job.latents = None
    cascade.kept.clear()


def generate_latents(options, cascade, record, text, callback):
    if options.reconstruct:
        return cascade.encode_semantic(options.reconstruct, record.width, record.height)
    return cascade.prior(
        text, width=record.width, height=record.height, images=record.images, seed=record.seed,
        steps=record.steps, guidance=record.guidance, recipe=record.recipe,
        variation_images=options.variation_image, init_image=options.init_image,
        strength=options.strength or 0.0, interval=record.guidance_interval, callback=callback)


def decode_images(cascade, job, text):
    record = job.record
    images = cascade.decode(
        job.latents, text, width=record.width, height=record.height, seed=record.seed,
        steps=record.decoder_steps, guidance=record.decoder_guidance, recipe=record.recipe,
        prior_steps=record.prior_steps, output="np")
    for i, (image, path) in enumerate(zip(images, job.outputs)):
        write_file(path, png(to_pillow(image), record.texts(i)))
    return images


def save_previews(folder, cascade):
    """The callback that saves the predicted clean latents of every step as small images side by side."""
    previewer = cascade.network("previewer")

    def callback(step, x0):
        """Latents (N, 16, Hc, Wc) -> an image of them side by side."""
        pixels = previewer(x0.to(cascade.dtypes["previewer"])).float()  # (N, 3, 8 * Hc, 8 * Wc)
        row = torch.cat(list(cascade.check_finite("previewer", pixels)), dim=2)  # (3, 8 * Hc, N * 8 * Wc)
        image = to_pillow(row.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        write_file(preview_path(folder, step), png(image, {"step": str(step)}))
    return callback


def preview_path(folder, step):
    return folder / f"step-{step:03}.png"


def print_psnr(path, image, latents):
    height, width = image.shape[:2]
    original = ImageOps.fit(load_image(path), (width, height), Image.Resampling.BICUBIC)
    error = ((image - np.asarray(original) / 255) ** 2).mean()
    factor = image.size / latents.numel()
    print(f"{image.size} numbers -> {latents.numel()}, {factor:.0f} times fewer -> image; "
          f"PSNR {-10 * math.log10(error + 1e-12):.1f} dB")


# ---------------------------------------------------------------------------------------------------- the process
class Unbreakable:
    """A stream whose failure, or absence, costs no image."""
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
    """glibc returns large blocks to the system when they are freed, and gets them back page by page. A process that only
    draws is faster if it keeps them: by a tenth to a third on a CPU (tests/porting/PERFORMANCE.md)."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        for option in (-1, -3):                         # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2 ** 30)


def say(text):
    """One line on stderr, without control characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    print(f"cascade.py: {text}", file=sys.stderr)


def terminate(*_):
    raise KeyboardInterrupt("terminated")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2, 130 or 143 after one line that says what happened."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stdout, stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".* is cut to")
        say_once = lru_cache(say)
        warnings.showwarning = lambda message, *_: say_once(str(message))
        try:
            require(all(map(is_utf8, arguments)), "expected arguments in UTF-8")
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
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
