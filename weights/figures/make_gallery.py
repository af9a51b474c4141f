"""Draws the animation and the sheets that README.md and weights/README.md show, with the tiny cascade, into weights/figures/. No image is
chosen by its result: prompts and seeds are fixed here.

    python weights/figures/make_gallery.py                  all of them
    python weights/figures/make_gallery.py --out FOLDER     into another folder
"""
import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from drawing import HERE, as_image, sheet
from PIL import Image

import shapes
from cascade import Cascade
from cascade import main as command
from exercises import PROMPT, SEED

TYPED = ["a red circle and a blue square", "Two small purple stars!", "draw a green heart, please",
         "something yellow", "a star", "black ring next to an orange triangle, white background"]
SEEN = ["a large red circle on a white background", "a small blue star above a large yellow square",
        "a black ring on an orange field", "a green triangle left of a white circle",
        "a tiny yellow square on a red backdrop", "an image of a hoop and a disc"]
NEW_OBJECTS = ["a large purple circle on a white background", "an orange square",
               "a small green star on a black background", "a blue ring on a yellow background",
               "a yellow heart left of a blue square", "a white triangle below a red star"]
NEW_PAIRS = ["a red circle above a blue star", "a black star right of a yellow square",
             "a red ring left of a purple star", "a white star below a green heart",
             "a purple square above a red triangle", "a blue square right of an orange heart"]
SEEDS = [f"seed {i}" for i in range(6)]


def draw(cascade, prompts, negative="", **options):
    """Prompts -> their images, each an array (128, 128, 3) in [0, 1]."""
    return list(cascade(prompts, negative, output="np", **options))


def sample_images(seed, two):
    """Six true images of the synthetic dataset."""
    rng = np.random.default_rng(seed)
    return [shapes.render(shapes.sample_scene(rng, two)) for _ in range(6)]


def animation(path):
    """The run of the lesson."""
    with TemporaryDirectory() as place:
        command([PROMPT, "--seed", str(SEED), "--device", "cpu", "-o", f"{place}/image.png", "--animate", str(path)])


def prompts(cascade, path):
    rows = []
    for title, group in (("as people type them", TYPED),
                         ("objects and pairs from training", SEEN),
                         ("held out: objects never seen in training", NEW_OBJECTS),
                         ("held out: pairs never seen in training", NEW_PAIRS)):
        rows.append((title, draw(cascade, group), group))
    sheet(path, rows)


def seeds(cascade, path):
    rows = [("“a star”", draw(cascade, "a star", images=6)), ("“a circle”", draw(cascade, "a circle", images=6)),
            ("“a circle”, negative prompt “red”", draw(cascade, "a circle", "red", images=6))]
    sheet(path, rows, SEEDS)


def guidance(cascade, path):
    scales, rows = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), []
    for prompt in ("a red heart on a green background", "a small white ring left of a large blue triangle"):
        rows.append((f"“{prompt}”", [draw(cascade, prompt, guidance=scale, seed=1)[0] for scale in scales]))
    sheet(path, rows, ["no guidance", *(f"guidance {scale:g}" for scale in scales[1:])])


def reconstruction(cascade, path):
    rows = [("original", []), ("Stage A alone: 4,096 numbers", []), ("semantic latent, Stage B and A: 144 numbers", [])]
    stage_a = cascade.network("stage_a")
    for image in sample_images(5, two=0.5):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255                   # (1, 3, 128, 128)
        decoded = cascade.decode(cascade.encode_semantic(Image.fromarray(image)), output="np")[0]
        for (_, cells), cell in zip(rows, (image / 255, as_image(stage_a.decode(stage_a.encode(pixels))), decoded)):
            cells.append(cell)
    sheet(path, rows)


def variations(cascade, path):
    originals = [Image.fromarray(image) for image in sample_images(6, two=0.25)]
    rows = [("reference image", [np.asarray(image) / 255 for image in originals])]
    for title, prompt in (("variation without a prompt", ""), ("with the prompt “on a black background”",
                                                              "on a black background")):
        rows.append((title, [draw(cascade, prompt, variation_images=[image])[0] for image in originals]))
    sheet(path, rows)


def image_to_image(cascade, path):
    scene = shapes.Scene((shapes.Object("circle", "red", "large", 46, 80),), "white")
    prompt, image, strengths = "a large blue star on a white background", shapes.render(scene), (0.2, 0.4, 0.6, 0.8, 1.0)
    cells = [draw(cascade, prompt, init_image=Image.fromarray(image), strength=strength)[0] for strength in strengths]
    header = ["initial image", *(f"strength {strength}" for strength in strengths)]
    sheet(path, [(f"“{prompt}”", [image / 255, *cells])], header)


def recipes(cascade, path):
    prompt, rows = "a small blue star left of a large yellow ring", []
    for title, options in (("diffusers (default)", {}), ("original", {"recipe": "original"}),
                           ("lcm, for which this cascade was not trained", {"recipe": "lcm"}),
                           ("default with guidance interval 0.2 to 0.8", {"interval": (0.2, 0.8)})):
        rows.append((title, draw(cascade, prompt, images=6, **options)))
    sheet(path, rows, SEEDS)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder (default: weights/figures)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    cascade = Cascade(device="cpu", keep=True)
    animation(folder / "animation.webp")
    for draw_sheet in (prompts, seeds, guidance, reconstruction, variations, image_to_image, recipes):
        draw_sheet(cascade, folder / f"{draw_sheet.__name__}.png")


if __name__ == "__main__":
    main()
