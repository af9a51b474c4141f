"""Stable Cascade from a prompt to a picture.

    python cascade.py "a large red circle on a white background"
    python cascade.py "a small blue star" --images 4 --seed 7 -o star.png       star-0.png to star-3.png, seeds 7 to 10
    python cascade.py --prompts prompts.txt -o out/picture.png                  a prompt a line: out/picture-0.png, ...
    python cascade.py "a circle" --negative "red" --guidance 6
    python cascade.py "a green heart" -o heart.safetensors                      Stage C alone: saves semantic latents
    python cascade.py --latents heart.safetensors -o heart.png                  Stage B and A: draws them
    python cascade.py --variation-image a.png                                   something like it
    python cascade.py "a blue star" --init-image a.png --strength 0.7           starts from it
    python cascade.py --reconstruct a.png                                       through the semantic latent and back
    python cascade.py "an astronaut" --weights weights/official --lite --dtype bf16

The journey: the text tower reads the prompt; Stage C imagines a semantic latent, 42.67 times smaller than the picture
on each side; Stage B paints an image latent from it, 4 times smaller; Stage A turns that into pixels. Each network is
loaded just before its turn and released after it.
"""
# Letters: P prompts, N pictures (P times the images per prompt), H W pixels, h w the semantic latent's sides,
# y x the image latent's, L text tokens, D text width, n pictures to take after, S the side at which the image tower
# sees them, E the width of its embeddings (768).
import argparse
import ctypes
import gc
import io
import itertools
import json
import math
import numbers
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tqdm import tqdm

import model
import text_encoder
from model import CascadeError, Weights
from sampler import RECIPES, draw, generators, sample

COMPRESSION = 42.67                                     # pixels per position of the semantic latent
LIMITS = {"width": (64, 8192), "height": (64, 8192), "steps": (1, 1000), "prior_steps": (0, 1000),
          "guidance": (0.0, 100.0), "strength": (0.0, 1.0), "images": (1, 1000), "seed": (0, 2 ** 63 - 1)}
STRENGTH = 0.8                                          # of a start from a picture
OUTPUTS = ("pil", "np", "pt", "latent")
TINY = Path(__file__).resolve().parent / "weights" / "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The folders of the diffusers layout.
FOLDERS = {"stage_c": "prior", "stage_c_lite": "prior_lite", "stage_b": "decoder", "stage_b_lite": "decoder_lite",
           "stage_a": "vqgan"}
LITE = {False: (), True: ("stage_c", "stage_b"), "prior": ("stage_c",), "decoder": ("stage_b",)}
# The options that a picture says it was made with.
SAID = ("negative", "width", "height", "seed", "steps", "guidance", "recipe", "guidance_interval",
        "variation_image", "init_image", "strength", "reconstruct")
DRAWING = ("text_encoder", "stage_c", "stage_b", "stage_a")     # what every prompt needs


def find(folder, name):
    """The file of a network: the original single file or the diffusers folder's, the plain one before the bf16 one."""
    places = [f"{name}/model"] if name in text_encoder.TOWERS else [name]
    places += [f"{FOLDERS[name]}/diffusion_pytorch_model"] if name in FOLDERS else []
    for place, ending in itertools.product(places, ("", ".bf16", "_bf16")):
        path = Path(folder) / f"{place}{ending}.safetensors"
        if path.exists():
            return path
    wanted = " or ".join(f"{place}.safetensors" for place in places)
    raise CascadeError(f"{folder}: {name} is missing (wanted is {wanted}, or the same with .bf16 or _bf16); "
                       "README, 'The official weights', says how to get it")


def check(**values):
    """Numbers within their limits, or an error that says which is not."""
    for name, value in values.items():
        low, high = LIMITS[name]
        kind, what = (numbers.Real, "number") if isinstance(low, float) else (numbers.Integral, "whole number")
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise CascadeError(f"{name} is {value!r}; wanted is a {what} from {low} to {high}")


def check_choice(name, value, choices):
    if value not in choices:
        raise CascadeError(f"{name} is {value!r}; wanted is one of {', '.join(map(str, choices))}")


def strings(name, value):
    """A string or a list of them -> a list."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(string, str) for string in found):
        raise CascadeError(f"{name} is {value!r:.80}; wanted is a string or a list of strings")
    return list(found)


def open_picture(picture):
    """A file or a picture of pillow's -> RGB, upright, white where it is transparent."""
    try:
        opened = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.open(picture))
        if max(opened.size) > 100 * min(opened.size):
            raise ValueError(f"{opened.size[0]} x {opened.size[1]} is too long and thin")
        if opened.mode.startswith("I"):                 # 16 bits of grey
            opened = Image.fromarray((np.asarray(opened) / 257).clip(0, 255).astype(np.uint8))
        if opened.has_transparency_data:
            opened = opened.convert("RGBA")
            opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
        return opened.convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError, SyntaxError, Image.DecompressionBombError) as error:
        raise CascadeError(f"{picture}: not a picture that can be used ({error}); wanted is a PNG, a JPEG or alike, "
                           "of less than 178 million pixels") from None


def to_pillow(picture):
    """(H, W, 3) in [0, 1] -> a picture of pillow's."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Text:
    """What the text tower said: P rows for the prompts, then P rows for what is not wanted."""
    hidden: torch.Tensor                                # (2P, L, D)
    pooled: torch.Tensor                                # (2P, 1, D)


class Cascade:
    """The three stages and the text tower of one weights folder.

    folder          original single files, diffusers folders, or both mixed
    lite            True for the lite pair of B and C, "prior" or "decoder" for one of them
    decoder_dtype   of Stage B and A, where it is not dtype
    keep            keeps every network in memory after its turn
    """
    def __init__(self, folder=TINY, device="cpu", dtype="fp32", lite=False, decoder_dtype=None, keep=False,
                 progress=False):
        if not Path(folder).is_dir():
            raise CascadeError(f"{folder}: there is no such weights folder")
        check_choice("lite", lite, LITE)
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise CascadeError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from None
        dtypes = [DTYPES.get(name, name) for name in (dtype, decoder_dtype or dtype)]
        if not set(dtypes) <= set(DTYPES.values()):
            raise CascadeError(f"dtype {dtype!r} or decoder_dtype {decoder_dtype!r} is none of {', '.join(DTYPES)}")
        self.folder, self.device, self.keep, self.progress = Path(folder), torch.device(device), keep, progress
        if torch.bfloat16 in dtypes and self.device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
            raise CascadeError(f"device {device!r} has no bf16; use fp16 or fp32")
        self.dtypes = {name: dtypes[name in ("stage_b", "stage_a")] for name in (*model.NETWORKS, *text_encoder.TOWERS)}
        self.lite, self.kept = LITE[lite], {}

    def file(self, name):
        return find(self.folder, f"{name}_lite" if name in self.lite else name)

    def used(self, *names):
        """What a picture says of the networks: file, device and type of each."""
        return {name: f"{os.path.relpath(self.file(name))}, {self.device}, {self.dtypes[name]}" for name in names}

    def network(self, name):
        """One of text_encoder, stage_c, stage_b, stage_a, image_encoder, effnet_encoder, previewer, ready to run."""
        load = text_encoder.load if name in text_encoder.TOWERS else model.load
        network = self.kept.get(name) or load(self.file(name), self.device, self.dtypes[name], expect=name)
        if self.keep:
            self.kept[name] = network
        return network

    def size(self, width, height):
        """Fills in what is None: what the Stage C file says it was trained for, or 1024 where it does not say."""
        if width is None or height is None:
            said = Weights(self.file("stage_c")).metadata
            width = int(said.get("width", 1024)) if width is None else width
            height = int(said.get("height", 1024)) if height is None else height
        check(width=width, height=height)
        return width, height

    @torch.inference_mode()
    def read(self, prompts, negative=""):
        """Prompts, and what is not wanted for all of them or for each -> Text, for both stages."""
        prompts, negative = strings("prompts", prompts), strings("negative", negative)
        if len(negative) not in (1, len(prompts)):
            raise CascadeError(f"{len(negative)} negatives for {len(prompts)} prompts; wanted is one, or one for each")
        rows = prompts + (negative * len(prompts) if len(negative) == 1 else negative)
        unique = list(dict.fromkeys(rows))
        tower = self.network("text_encoder")
        ids, mask = text_encoder.Tokenizer(self.folder / "tokenizer", tower.config.length)(unique)      # (unique, L)
        if ids.max() >= tower.config.vocabulary:
            raise CascadeError(f"{self.folder / 'tokenizer'}: not the tokenizer of this text encoder, it has a token "
                               f"{ids.max()} and the encoder only {tower.config.vocabulary}")
        hidden, pooled = tower(ids.to(self.device), mask.to(self.device))               # (unique, L, D), (unique, 1, D)
        order = [unique.index(row) for row in rows]
        return Text(hidden[order], pooled[order])

    @torch.inference_mode()
    def look(self, pictures):
        """Pictures (files or pillow's) -> what the image tower makes of them, (n, E)."""
        pictures = [open_picture(picture) for picture in pictures]
        tower = self.network("image_encoder")
        pixels = torch.stack([text_encoder.fit(picture, tower.config.side) for picture in pictures])    # (n, 3, S, S)
        return tower(pixels.to(self.device, self.dtypes["image_encoder"]))

    @torch.inference_mode()
    def encode(self, picture, width=None, height=None):
        """A picture, scaled and cut to width x height -> its semantic latent (1, 16, h, w), fp32."""
        width, height = self.size(width, height)
        picture = ImageOps.fit(open_picture(picture), (width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255       # (1, 3, H, W)
        h, w = math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION)
        pixels = F.interpolate(pixels, (32 * h, 32 * w), mode="bilinear", antialias=True)  # (1, 3, 32h, 32w)
        return self.network("effnet_encoder")(pixels.to(self.device, self.dtypes["effnet_encoder"])).float()

    def _sample(self, name, shape, condition, steps, guidance, sources, recipe, watch=None, **start):
        """Runs a stage to its last latent, and stops at one that is not finite."""
        label, unet = name.replace("_", " ").title(), self.network(name)
        latents = sample(unet, shape, condition, steps, guidance, sources, recipe, **start)
        for i, (x, x0) in enumerate(tqdm(latents, label, steps, disable=not self.progress), 1):
            if not x.isfinite().all():
                raise CascadeError(f"{label}: the latent is not finite after step {i} of {steps}; the weights may be "
                                   f"broken, or too large for {self.dtypes[name]}: try bf16 or fp32")
            if watch:
                watch(i, x0)
        return x0 if recipe.ends_clean else x                                           # (N, *shape), fp32

    @torch.inference_mode()
    def prior(self, prompts="", negative="", width=None, height=None, steps=20, guidance=4.0, images=1, seed=0,
              variation_images=None, init_image=None, strength=STRENGTH, recipe="diffusers", interval=(0.0, 1.0),
              watch=None):
        """Stage C: prompts -> semantic latents (N, 16, h, w), fp32.

        prompts             strings, or the Text read from them
        variation_images    pictures to take after (a list of files or pillow's), or their embeddings (n, E)
        init_image          a picture, or a semantic latent (1 or N, 16, h, w), to start from: it is noised to
                            t = strength, and int(steps * strength) steps lead back
        recipe, interval    see sampler.py
        watch               called after every step with its number and what is taken for the clean latents
        """
        width, height = self.size(width, height)
        check(steps=steps, guidance=guidance, images=images, seed=seed, strength=strength)
        check_choice("recipe", recipe, RECIPES)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise CascadeError(f"interval is {interval}; wanted are two times, from 0 to 1, the lower first")
        text = prompts if isinstance(prompts, Text) else self.read(prompts, negative)
        count = images * len(text.pooled) // 2
        condition = {"clip_text": text.hidden.repeat_interleave(images, dim=0),         # (2N, L, D)
                     "clip_text_pooled": text.pooled.repeat_interleave(images, dim=0)}
        if variation_images is not None:
            seen = variation_images if torch.is_tensor(variation_images) else self.look(variation_images)
            wanted = Weights(self.file("stage_c"))["clip_img_mapper.weight"][1]
            if seen.dim() != 2 or seen.shape[1] != wanted:
                raise CascadeError(f"variation_images are {tuple(seen.shape)}; wanted is (n, {wanted})")
            rows = seen.expand(count, *seen.shape)                                      # (N, n, E)
            condition["clip_img"] = torch.cat([rows, torch.zeros_like(rows)])           # (2N, n, E)
        shape = (16, math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION))
        start = {}
        if init_image is not None:
            z = init_image if torch.is_tensor(init_image) else self.encode(init_image, width, height)
            if z.dim() != 4 or z.shape[1:] != shape or len(z) not in (1, count):
                raise CascadeError(f"init_image is a latent {tuple(z.shape)}; wanted is (1 or {count}, {shape})")
            steps, start = int(steps * strength), {"start": z, "strength": strength}
            if not steps:
                raise CascadeError(f"strength is {strength}: not one step is left; wanted is more, or more steps")
        sources, recipe = generators(seed, count), replace(RECIPES[recipe], interval=interval)
        return self._sample("stage_c", shape, condition, steps, guidance, sources, recipe, watch, **start)

    @torch.inference_mode()
    def decode(self, latents, prompts="", negative="", width=None, height=None, steps=10, guidance=None, seed=0,
               prior_steps=20, output="pil", recipe="diffusers"):
        """Stage B and A: semantic latents (N, 16, h, w) -> N pictures of exactly width x height.

        prompts         those that the latents were imagined from, in the same order, or the Text read from them
        width, height   42.67 times the latent's sides, if None
        guidance        None is what the recipe says: 1.1 in the original, else none
        prior_steps     the noise goes on where a prior of so many steps left off
        output          "pil": a list of pictures, "np": (N, H, W, 3) fp32 in [0, 1], "pt": (N, 3, H, W) fp32 in [0, 1],
                        "latent": Stage B's latents (N, 4, y, x), not scaled
        """
        if latents.dim() != 4 or latents.shape[1] != 16:
            raise CascadeError(f"latents are {tuple(latents.shape)}; wanted is (N, 16, h, w)")
        h, w = latents.shape[2:]
        width, height = self.size(int(w * COMPRESSION) if width is None else width,
                                  int(h * COMPRESSION) if height is None else height)
        check_choice("output", output, OUTPUTS), check_choice("recipe", recipe, RECIPES)
        guidance = RECIPES[recipe].decoder_guidance if guidance is None else guidance
        check(steps=steps, guidance=guidance, seed=seed, prior_steps=prior_steps)
        if (h, w) != (math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION)):
            raise CascadeError(f"latents of {h} x {w} are not those of a picture of {width} x {height}")
        text = prompts if isinstance(prompts, Text) else self.read(prompts, negative)
        images, rest = divmod(len(latents), len(text.pooled) // 2)
        if rest or not images:
            raise CascadeError(f"{len(latents)} latents for {len(text.pooled) // 2} prompts; wanted is a multiple")

        sources = generators(seed, len(latents))
        for _ in range(prior_steps + 1):                # what the prior drew: its start and once per step
            draw(sources, latents.shape[1:], "cpu")
        condition = {"clip_text_pooled": text.pooled.repeat_interleave(images, dim=0),  # (2N, 1, D)
                     "effnet": torch.cat([latents, torch.zeros_like(latents)])}         # (2N, 16, h, w)
        shape = (4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))                # even, for Stage B's patches
        recipe = replace(RECIPES[recipe], shift=RECIPES[recipe].shift and 1.0)
        z = self._sample("stage_b", shape, condition, steps, guidance, sources, recipe)  # (N, 4, y, x)
        if output == "latent":
            return z
        stage_a, dtype = self.network("stage_a"), self.dtypes["stage_a"]
        pixels = torch.cat([stage_a.decode(one[None].to(dtype)).float() for one in z])  # (N, 3, 4y, 4x)
        if not pixels.isfinite().all():
            raise CascadeError(f"Stage A: the picture is not finite in {dtype}; try bf16 or fp32")
        pixels = pixels[:, :, :height, :width].clamp(0, 1)                              # (N, 3, H, W)
        if output == "pt":
            return pixels
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()                               # (N, H, W, 3)
        return pixels if output == "np" else [to_pillow(picture) for picture in pixels]

    def __call__(self, prompts="", negative="", width=None, height=None, steps=20, guidance=4.0, decoder_steps=10,
                 decoder_guidance=None, images=1, seed=0, output="pil", recipe="diffusers", **prior):
        """Prompts -> pictures, `images` of each; picture i of all is drawn from seed + i. `prior` and `decode` tell the
        rest."""
        check_choice("output", output, OUTPUTS)                                         # now, not after the prior
        check(steps=decoder_steps, guidance=decoder_guidance or 0.0)
        for name in DRAWING:
            self.file(name)
        width, height = self.size(width, height)
        text = self.read(prompts, negative)
        latents = self.prior(text, "", width, height, steps, guidance, images, seed, recipe=recipe, **prior)
        if prior.get("init_image") is not None:
            steps = int(steps * prior.get("strength", STRENGTH))
        return self.decode(latents, text, "", width, height, decoder_steps, decoder_guidance, seed, steps, output,
                           recipe)                          # (N, H, W, 3) or (N, 3, H, W) or (N, 4, y, x), else a list


# ------------------------------------------------------------------------------------------------ the command

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message} (--help explains the options)")


def parse(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; several draw several pictures")
    add("-o", "--output", default="picture.png", type=Path, metavar="FILE", help=".png, or .safetensors for latents")
    add("--prompts", dest="lines", metavar="FILE", help="a prompt a line; what is drawn already is passed over")
    add("--latents", metavar="FILE", help="draw these semantic latents, saved before, instead of a prompt")
    add("--variation-image", nargs="+", metavar="FILE", help="pictures to take after, with or without a prompt")
    add("--init-image", metavar="FILE", help="a picture to start from")
    add("--strength", type=float, default=STRENGTH, help="how far from --init-image, 0 to 1 (default: %(default)s)")
    add("--reconstruct", metavar="FILE", help="this picture, through its semantic latent and back")
    add("--previews", type=Path, metavar="FOLDER", help="saves what Stage C has in mind after every step")
    add("--negative", default="", metavar="TEXT", help="what not to draw (needs guidance)")
    add("--width", type=int, help="pixels, exactly (default: what the weights were trained for)")
    add("--height", type=int)
    add("--images", type=int, default=1, help="pictures per prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first picture; the next has the next (default: %(default)s)")
    add("--steps", type=int, default=20, help="of Stage C (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="how strictly C obeys; up to 1 is none (default: %(default)s)")
    add("--decoder-steps", type=int, default=10, help="of Stage B (default: %(default)s)")
    add("--decoder-guidance", type=float, help="of Stage B (default: 1.1 in the original recipe, else none)")
    add("--recipe", default="diffusers", choices=RECIPES, help="how to sample (default: %(default)s)")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="the times, 1 noise and 0 none, at which there is guidance (default: all)")
    add("--weights", type=Path, default=TINY, metavar="FOLDER", help="(default: the small cascade, weights/tiny)")
    add("--lite", nargs="?", const=True, default=False, choices=["prior", "decoder"], help="the lite C and B, or one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--dtype", default="fp32", choices=DTYPES, help="of the weights (default: %(default)s)")
    add("--decoder-dtype", choices=DTYPES, help="of Stage B and A (default: as --dtype)")
    return parser.parse_args(arguments)


def write(data, path):
    """All or nothing: a failure leaves what was there before."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CascadeError(f"{path}: cannot be written ({error.strerror})") from None


def png(picture, used):
    """A picture as the bytes of a PNG that says what it was made with."""
    file, info = io.BytesIO(), PngInfo()
    for key, value in used.items():
        info.add_itxt(key, str(value))
    picture.save(file, "png", pnginfo=info)
    return file.getvalue()


def numbered(path, number):
    return path.with_stem(f"{path.stem}-{number}")


def batches(options):
    """What is drawn together: (number of the first picture, prompts). The command's own prompts are one batch. Of a
    file every line is one; a blank line draws nothing and keeps its number. Left are those that lack a picture, of this
    process's share where torchrun started several: it says RANK and WORLD_SIZE."""
    if not options.lines:
        return [(0, options.prompts or [""])]
    try:
        lines = [line.strip() for line in Path(options.lines).read_text("utf-8-sig").split("\n")]
        if not any(lines):
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise CascadeError(f"{options.lines}: not prompts, one a line ({error})") from None
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = [(i * options.images, [line]) for i, line in enumerate(lines) if line][rank::world]
    return [(first, prompts) for first, prompts in share
            if not all(numbered(options.output, first + i).is_file() for i in range(options.images))]


def previews(cascade, folder):
    """What is called after every step of Stage C, to save its latents as small pictures side by side."""
    previewer, dtype = cascade.network("previewer"), cascade.dtypes["previewer"]

    def watch(step, x0):
        row = torch.cat(list(previewer(x0.to(dtype)).float()), dim=2)                   # (3, 8h, N * 8w)
        write(png(to_pillow(row.clamp(0, 1).permute(1, 2, 0).cpu().numpy()), {"step": step}),
              folder / f"step-{step:03}.png")
    return watch


def run(options):
    output, endings = options.output, (".png",) if options.latents or options.lines else (".png", ".safetensors")
    if output.suffix not in endings:
        raise CascadeError(f"{output}: wanted is a name that ends in {' or '.join(endings)}")
    for path, folder in ((output, output.absolute().parent), (options.previews, options.previews)):
        if path and (output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
            raise CascadeError(f"{path}: cannot be written; is its folder there, and yours?")
    ways = (options.prompts or not options.lines and (options.variation_image or options.init_image), options.lines,
            options.latents, options.reconstruct)
    if sum(map(bool, ways)) != 1 or options.lines and options.previews:
        raise CascadeError("wanted is one of: a prompt or a picture to draw after; --prompts FILE, without --previews; "
                           "--latents FILE; --reconstruct FILE")
    check(images=options.images)                        # now, batches counts with it
    todo = batches(options)
    if options.device == "cuda" and "LOCAL_RANK" in os.environ:             # torchrun: each process has its own
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    cascade = Cascade(options.weights, options.device, options.dtype, options.lite, options.decoder_dtype,
                      keep=len(todo) > 1, progress=True)

    def said(names):
        return {name: getattr(options, name) for name in names if getattr(options, name) is not None}

    if options.latents:
        saved = Weights(options.latents)
        latents = [saved.tensor("latents")]
        try:
            used = json.loads(saved.metadata["cascade"])
            todo = [(0, used.pop("prompts"))]
            texts = [cascade.read(todo[0][1], used["negative"])]
        except (KeyError, ValueError):
            raise CascadeError(f"{options.latents}: not saved by this command: it names no prompts") from None
    else:
        check(steps=options.decoder_steps, guidance=options.decoder_guidance or 0.0)    # now, not after the prior
        for name in ["text_encoder", "stage_c"] if output.suffix == ".safetensors" else DRAWING:
            cascade.file(name)
        options.width, options.height = size = cascade.size(options.width, options.height)
        options.strength = options.strength if options.init_image else 1.0
        texts = [cascade.read(prompts, options.negative) for _, prompts in todo]
        cascade.kept.clear()                            # a stage does all batches, then makes room
        if options.reconstruct:
            latents = [cascade.encode(options.reconstruct, *size)]
        else:
            watch = previews(cascade, options.previews) if options.previews else None
            latents = [cascade.prior(
                text, "", *size, options.steps, options.guidance, options.images, options.seed + first,
                options.variation_image, options.init_image, options.strength, options.recipe,
                options.guidance_interval, watch) for (first, _), text in zip(todo, texts)]
        cascade.kept.clear()
        used = said(SAID) | cascade.used("text_encoder", "effnet_encoder" if options.reconstruct else "stage_c")
        if output.suffix == ".safetensors":
            metadata = {"cascade": json.dumps({"prompts": todo[0][1], **used})}
            return write(save({"latents": latents[0].cpu()}, metadata), output)

    seed, size = used["seed"], (used["width"], used["height"])
    if options.decoder_guidance is None:
        options.decoder_guidance = RECIPES[used["recipe"]].decoder_guidance
    used |= said(("decoder_steps", "decoder_guidance")) | cascade.used("stage_b", "stage_a")
    for (first, prompts), text, latent in zip(todo, texts, latents):
        pictures = cascade.decode(latent, text, "", *size, options.decoder_steps, options.decoder_guidance,
                                  seed + first, int(used["steps"] * used.get("strength", 1)), "np", used["recipe"])
        for i, picture in enumerate(pictures):
            path = numbered(output, first + i) if options.lines or len(pictures) > 1 else output
            prompt = prompts[i * len(prompts) // len(pictures)]
            write(png(to_pillow(picture), {"prompt": prompt, **used, "seed": seed + first + i}), path)
    if options.reconstruct:
        true = ImageOps.fit(open_picture(options.reconstruct), size, Image.Resampling.BICUBIC)
        error = ((pictures[0] - np.asarray(true) / 255) ** 2).mean()
        print(f"{pictures[0].size} numbers to {latent.numel()}, {pictures[0].size / latent.numel():.0f} times fewer, "
              f"and back: PSNR {-10 * math.log10(error):.1f} dB")


def quicken():
    """What suits a process that only draws. Python need not look for garbage among what the imports made. And glibc,
    which takes large pieces from the system page by page and gives them back when they are freed, keeps them for the
    next tensor: on a CPU that is a tenth to a third of a network's time (tests/bench.py --leads)."""
    gc.freeze()
    with suppress(AttributeError, OSError, TypeError):                      # another system's C library
        for option in (-1, -3):                                             # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2 ** 30)


def main(arguments=None):
    """The exit status: 0, or 2 after one line that says what the user can mend."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", "a prompt is cut")
    warnings.showwarning = lambda message, *_: print(f"cascade.py: {message}", file=sys.stderr)
    try:
        run(parse(arguments))
        return 0
    except CascadeError as error:
        print(f"cascade.py: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        print("cascade.py: out of memory; try --lite, --dtype bf16, fewer --images or a smaller size", file=sys.stderr)
    return 2


if __name__ == "__main__":
    quicken()
    sys.exit(main())
