"""Stable Cascade from a prompt to a picture.

    python cascade.py "a large red circle on a white background" -o picture.png

    cascade = Cascade("weights/tiny")
    picture, = cascade("a large red circle on a white background")

The journey: the text tower reads the prompt; Stage C imagines a semantic latent, 42.67 times smaller than the picture on
each side; Stage B paints an image latent from it, 4 times smaller; Stage A turns that into pixels. Each network is loaded
just before its turn and released after it.

Letters: P prompts, N pictures (P times the images per prompt), H W pixels, h w the semantic latent's sides,
y x the image latent's, L text tokens, D text width.
"""
import argparse
import io
import json
import math
import numbers
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tqdm import tqdm

import model
import text_encoder
from model import CascadeError, Weights
from sampler import draw, generators, sample

COMPRESSION = 42.67                                     # pixels per position of the semantic latent
SMALLEST, LARGEST = 64, 8192                            # sides of a picture
TINY = Path(__file__).resolve().parent / "weights" / "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("pil", "np", "pt", "latent")

# Where a network's file may lie in a weights folder: the original single file or the diffusers folder.
PLACES = {"stage_c": ("stage_c", "prior/diffusion_pytorch_model"),
          "stage_c_lite": ("stage_c_lite", "prior_lite/diffusion_pytorch_model"),
          "stage_b": ("stage_b", "decoder/diffusion_pytorch_model"),
          "stage_b_lite": ("stage_b_lite", "decoder_lite/diffusion_pytorch_model"),
          "stage_a": ("stage_a", "vqgan/diffusion_pytorch_model"),
          "text_encoder": ("text_encoder/model",)}


def find(folder, name):
    """The file of a network: the plain one or, where there is none, the bf16 one."""
    for place in PLACES[name]:
        for ending in ("", ".bf16", "_bf16"):
            path = Path(folder) / f"{place}{ending}.safetensors"
            if path.exists():
                return path
    wanted = " or ".join(f"{place}.safetensors" for place in PLACES[name])
    raise CascadeError(f"{folder}: {name} is missing (wanted is {wanted}, or the same with .bf16 or _bf16); "
                       "README, 'The official weights', says how to get it")


def check(name, value, low, high, kind=numbers.Integral):
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        number = "whole number" if kind is numbers.Integral else "number"
        raise CascadeError(f"{name} is {value!r}; wanted is a {number} from {low} to {high}")


def check_strings(name, value):
    """A string or a list of them -> a list."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not strings or not all(isinstance(string, str) for string in strings):
        raise CascadeError(f"{name} is {value!r:.80}; wanted is a string or a list of strings")
    return list(strings)


@dataclass(frozen=True)
class Text:
    """What the text tower said: P rows for the prompts, then P rows for what is not wanted."""
    hidden: torch.Tensor                                # (2P, L, D)
    pooled: torch.Tensor                                # (2P, 1, D)

    def rows(self, tensor, images, guided):
        """The rows of `hidden` or `pooled`, each `images` times in a row: all of them (2N) or the prompts' (N)."""
        tensor = tensor.repeat_interleave(images, dim=0)
        return tensor if guided else tensor[:len(tensor) // 2]


class Cascade:
    """The three stages and the text tower of one weights folder.

    folder          original single files, diffusers folders, or both mixed
    lite            True for the lite pair of B and C, "prior" or "decoder" for one of them
    decoder_dtype   of Stage B and A, where it is not dtype
    keep            keeps every network in memory after its turn
    """

    def __init__(self, folder=TINY, device="cpu", dtype="fp32", lite=False, decoder_dtype=None, keep=False, progress=False):
        if not Path(folder).is_dir():
            raise CascadeError(f"{folder}: there is no such weights folder")
        if lite not in (False, True, "prior", "decoder"):
            raise CascadeError(f"lite is {lite!r}; wanted is True, False, 'prior' or 'decoder'")
        self.folder, self.keep, self.progress, self.kept = Path(folder), keep, progress, {}
        self.names = {"text_encoder": "text_encoder", "stage_a": "stage_a",
                      "stage_c": "stage_c_lite" if lite in (True, "prior") else "stage_c",
                      "stage_b": "stage_b_lite" if lite in (True, "decoder") else "stage_b"}
        self.device = self._device(device)
        self.dtype = self._dtype(dtype)
        self.decoder_dtype = self._dtype(dtype if decoder_dtype is None else decoder_dtype)

    @staticmethod
    def _device(device):
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise CascadeError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from None
        return torch.device(device)

    def _dtype(self, dtype):
        dtype = DTYPES.get(dtype, dtype)
        if dtype not in DTYPES.values():
            raise CascadeError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
        if dtype == torch.bfloat16 and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise CascadeError("this GPU has no bf16; use fp16 or fp32")
        return dtype

    def file(self, name):
        return find(self.folder, self.names[name])

    def used(self, *names):
        """What a PNG says of the networks: file, device and type of each."""
        return {name: f"{os.path.relpath(self.file(name))}, {self.device}, {self._dtype_of(name)}" for name in names}

    def _dtype_of(self, name):
        return self.decoder_dtype if name in ("stage_b", "stage_a") else self.dtype

    def network(self, name):
        """text_encoder, stage_c, stage_b or stage_a, ready to run."""
        if name in self.kept:
            return self.kept[name]
        if name == "text_encoder":
            network = text_encoder.load(self.file(name), self.device, self._dtype_of(name))
        else:
            network = model.load(self.file(name), self.device, self._dtype_of(name), expect=name)
        if self.keep:
            self.kept[name] = network
        return network

    def size(self, width, height):
        """Fills in what is None: the size that the Stage C file says it was trained for, or 1024 where it does not say."""
        if width is None or height is None:
            said = Weights(self.file("stage_c")).metadata
            width = int(said.get("width", 1024)) if width is None else width
            height = int(said.get("height", 1024)) if height is None else height
        check("width", width, SMALLEST, LARGEST), check("height", height, SMALLEST, LARGEST)
        return width, height

    @torch.inference_mode()
    def read(self, prompts, negative=""):
        """Prompts, and what is not wanted for all of them or for each -> Text, for both stages."""
        prompts, negative = check_strings("prompts", prompts), check_strings("negative", negative)
        if len(negative) not in (1, len(prompts)):
            raise CascadeError(f"{len(negative)} negative prompts for {len(prompts)} prompts; wanted is one, or one for each")
        rows = prompts + (negative * len(prompts) if len(negative) == 1 else negative)
        unique = list(dict.fromkeys(rows))
        ids, mask = text_encoder.Tokenizer(self.folder / "tokenizer")(unique)           # each (unique, L)
        hidden, pooled = self.network("text_encoder")(ids.to(self.device), mask.to(self.device))
        order = [unique.index(row) for row in rows]
        return Text(hidden[order], pooled[order])

    def _sample(self, name, shape, condition, steps, guidance, sources):
        """Runs a stage to its last latent, and stops at one that is not finite."""
        label, unet = name.replace("_", " ").title(), self.network(name)
        latents = sample(unet, shape, condition, steps, guidance, sources)
        for i, x in enumerate(tqdm(latents, label, steps, disable=not self.progress), 1):
            if not x.isfinite().all():
                raise CascadeError(f"{label}: the latent is not finite after step {i} of {steps}; {unet.clf[1].weight.dtype} "
                                   "may be too narrow for these weights: try bf16 or fp32")
        return x                                                                        # (N, *shape), fp32

    @torch.inference_mode()
    def prior(self, prompts, negative="", width=None, height=None, steps=20, guidance=4.0, images=1, seed=0):
        """Stage C: prompts -> semantic latents (N, 16, h, w), fp32. prompts may be a Text that was read before."""
        width, height = self.size(width, height)
        check("steps", steps, 1, 1000), check("guidance", guidance, 0, 100, numbers.Real)
        check("images", images, 1, 1000), check("seed", seed, 0, 2 ** 63 - 1)
        text = prompts if isinstance(prompts, Text) else self.read(prompts, negative)
        condition = {"clip_text": text.rows(text.hidden, images, guidance > 1),
                     "clip_text_pooled": text.rows(text.pooled, images, guidance > 1)}
        shape = (16, math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION))
        sources = generators(seed, images * len(text.pooled) // 2)
        return self._sample("stage_c", shape, condition, steps, guidance, sources)      # (N, 16, h, w)

    @torch.inference_mode()
    def decode(self, latents, prompts="", negative="", width=None, height=None, steps=10, guidance=0.0, seed=0,
               prior_steps=20, output="pil"):
        """Stage B and A: semantic latents (N, 16, h, w) -> N pictures of exactly width x height.

        prompts         those that the latents were imagined from, in the same order, or the Text read from them
        width, height   42.67 times the latent's sides, if None
        prior_steps     the noise goes on where a prior of so many steps left off
        output          "pil": a list of pictures, "np": (N, H, W, 3) fp32 in [0, 1], "pt": (N, 3, H, W) fp32 in [0, 1],
                        "latent": Stage B's latents (N, 4, y, x), not scaled
        """
        if latents.dim() != 4:
            raise CascadeError(f"latents are {tuple(latents.shape)}; wanted is (N, 16, h, w)")
        h, w = latents.shape[2:]
        width, height = self.size(int(w * COMPRESSION) if width is None else width,
                                  int(h * COMPRESSION) if height is None else height)
        check("steps", steps, 1, 1000), check("guidance", guidance, 0, 100, numbers.Real)
        check("seed", seed, 0, 2 ** 63 - 1), check("prior_steps", prior_steps, 0, 1000)
        if output not in OUTPUTS:
            raise CascadeError(f"output is {output!r}; wanted is one of {', '.join(OUTPUTS)}")
        if (h, w) != (math.ceil(height / COMPRESSION), math.ceil(width / COMPRESSION)):
            raise CascadeError(f"latents of {h} x {w} are not those of a picture of {width} x {height}")
        text = prompts if isinstance(prompts, Text) else self.read(prompts, negative)
        images, rest = divmod(len(latents), len(text.pooled) // 2)
        if rest or not images:
            raise CascadeError(f"{len(latents)} latents for {len(text.pooled) // 2} prompts; wanted is a multiple")

        sources = generators(seed, len(latents))
        for _ in range(prior_steps + 1):                # what the prior drew: its start and once per step
            draw(sources, latents.shape[1:], "cpu")
        unwanted = [torch.zeros_like(latents)] if guidance > 1 else []
        condition = {"clip_text_pooled": text.rows(text.pooled, images, guidance > 1),
                     "effnet": torch.cat([latents, *unwanted])}                         # (N or 2N, 16, h, w)
        shape = (4, 2 * math.ceil(height / 8), 2 * math.ceil(width / 8))                # even, for Stage B's patches
        z = self._sample("stage_b", shape, condition, steps, guidance, sources)         # (N, 4, y, x)
        if output == "latent":
            return z
        stage_a = self.network("stage_a")
        pictures = torch.cat([stage_a.decode(one[None].to(self.decoder_dtype)).float() for one in z])
        pictures = pictures[:, :, :height, :width]                                      # (N, 3, H, W)
        if not pictures.isfinite().all():
            raise CascadeError(f"Stage A: the picture is not finite in {self.decoder_dtype}; try bf16 or fp32")
        pictures = pictures.clamp(0, 1)
        if output == "pt":
            return pictures
        pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()                           # (N, H, W, 3)
        return pictures if output == "np" else [Image.fromarray((one * 255).round().astype(np.uint8)) for one in pictures]

    def __call__(self, prompts, negative="", width=None, height=None, steps=20, guidance=4.0, decoder_steps=10,
                 decoder_guidance=0.0, images=1, seed=0, output="pil"):
        """Prompts -> pictures, `images` of each; picture i of all is drawn from seed + i. See `prior` and `decode`."""
        for name in self.names:
            self.file(name)                             # whatever is missing is missing now, not in ten minutes
        width, height = self.size(width, height)
        text = self.read(prompts, negative)
        latents = self.prior(text, "", width, height, steps, guidance, images, seed)    # (N, 16, h, w)
        return self.decode(latents, text, "", width, height, decoder_steps, decoder_guidance, seed, steps, output)


# ------------------------------------------------------------------------------------------------ the command

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CascadeError(f"{message} (--help explains the options)")


def parse(arguments):
    parser = Parser(formatter_class=argparse.RawDescriptionHelpFormatter, description="Draws what a prompt says.", epilog="""
examples:
  python cascade.py "a large red circle on a white background"
  python cascade.py "a small blue star" --images 4 --seed 7 -o star.png          # star-0.png ... star-3.png, seeds 7 ... 10
  python cascade.py "a circle" --negative "red" --guidance 6
  python cascade.py "a green heart" -o heart.safetensors                         # Stage C alone: saves the semantic latents
  python cascade.py --latents heart.safetensors -o heart.png                     # Stage B and A: draws them
  python cascade.py "an astronaut in a garden" --weights weights/official --lite --dtype bf16""")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; several draw several pictures")
    parser.add_argument("-o", "--output", default="picture.png", metavar="FILE",
                        help="a .png, numbered where there are several; or a .safetensors, for the semantic latents alone")
    parser.add_argument("--latents", metavar="FILE", help="draw these semantic latents, saved before, instead of a prompt")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what not to draw (needs guidance)")
    parser.add_argument("--width", type=int, help="pixels, exactly (default: what the weights were trained for)")
    parser.add_argument("--height", type=int)
    parser.add_argument("--images", type=int, default=1, help="pictures per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of Stage C (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0,
                        help="how strictly Stage C follows the prompt; none up to 1 (default: %(default)s)")
    parser.add_argument("--decoder-steps", type=int, default=10, help="of Stage B (default: %(default)s)")
    parser.add_argument("--decoder-guidance", type=float, default=0.0, help="of Stage B (default: none)")
    parser.add_argument("--weights", type=Path, default=TINY, metavar="FOLDER", help="(default: the small cascade, weights/tiny)")
    parser.add_argument("--lite", nargs="?", const=True, default=False, choices=["prior", "decoder"],
                        help="the lite Stage C and B; or one of them alone: --lite prior, --lite decoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--decoder-dtype", choices=DTYPES, help="of Stage B and A (default: as --dtype)")
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


def run(options):
    output = Path(options.output)
    if output.suffix not in (".png", ".safetensors"):
        raise CascadeError(f"{output}: wanted is a name that ends in .png or .safetensors")
    if output.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise CascadeError(f"{output}: cannot be written; is its folder there, and yours?")
    if bool(options.prompts) == bool(options.latents):
        raise CascadeError("wanted is a prompt, or --latents FILE, and not both")
    cascade = Cascade(options.weights, options.device, options.dtype, options.lite, options.decoder_dtype, progress=True)

    if options.latents:
        if output.suffix != ".png":
            raise CascadeError(f"{output}: latents are drawn into a .png")
        saved = Weights(options.latents)
        latents = saved.tensor("latents")
        try:
            used = json.loads(saved.metadata["cascade"])
            prompts, seed, width, height, steps = (used[key] for key in ("prompts", "seed", "width", "height", "steps"))
        except (KeyError, ValueError):
            raise CascadeError(f"{options.latents}: this command did not save it, the metadata of its latents is not there") from None
        text = cascade.read(prompts, used["negative"])
    else:
        prompts, seed, steps = options.prompts, options.seed, options.steps
        for name in ["text_encoder", "stage_c"] if output.suffix == ".safetensors" else cascade.names:
            cascade.file(name)                          # whatever is missing is missing now, not in ten minutes
        width, height = cascade.size(options.width, options.height)
        text = cascade.read(prompts, options.negative)
        latents = cascade.prior(text, "", width, height, steps, options.guidance, options.images, seed)
        used = {"prompts": prompts, "negative": options.negative, "seed": seed, "width": width, "height": height,
                "steps": steps, "guidance": options.guidance, **cascade.used("text_encoder", "stage_c")}
        if output.suffix == ".safetensors":
            return write(save({"latents": latents.cpu()}, {"cascade": json.dumps(used)}), output)

    pictures = cascade.decode(latents, text, "", width, height, options.decoder_steps,
                              options.decoder_guidance, seed, steps)
    used |= {"decoder_steps": options.decoder_steps, "decoder_guidance": options.decoder_guidance,
             **cascade.used("stage_b", "stage_a")}
    del used["prompts"]
    for i, picture in enumerate(pictures):
        path = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{i}")
        prompt = prompts[i * len(prompts) // len(pictures)]
        write(png(picture, {"prompt": prompt, **used, "seed": seed + i}), path)


def main(arguments=None):
    """The exit status: 0, or 2 after one line that says what the user can mend."""
    warnings.showwarning = lambda message, *_: print(f"cascade.py: {message}", file=sys.stderr)
    try:
        run(parse(arguments))
    except CascadeError as error:
        print(f"cascade.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
