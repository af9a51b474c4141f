"""Draws the pictures that README shows, with the small cascade, into weights/gallery/. Nothing is chosen by its result:
prompts and seeds stand here.

    python weights/make_gallery.py
"""
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
from cascade import Cascade                                                             # noqa: E402
from evaluate import reconstruct, true_pictures                                         # noqa: E402

GALLERY = HERE / "gallery"
CELL, GAP, LINE = 128, 8, 14

PROMPTS = ["a large red circle on a white background", "a small blue star above a large yellow square",
           "There is a heart.", "a black ring on an orange field", "a green triangle left of a white circle",
           "something purple below a star", "a tiny yellow square on a red backdrop", "an image of a hoop and a disc"]
HELD_OUT = ["a large purple circle on a white background", "an orange square",
            "a small green star on a black background", "a blue ring on a yellow background",
            "a yellow heart left of a blue square", "a white triangle below a red star",
            "a red circle above a blue star", "a black star right of a yellow square"]


def grid(rows):
    """rows of (picture, words): a picture is (H, W, 3) in [0, 1], the words stand below it."""
    font, lines = ImageFont.load_default(11), []
    for row in rows:
        lines.append([textwrap.wrap(words, 23) for _, words in row])
    heights = [CELL + GAP + LINE * max(map(len, row)) for row in lines]
    canvas = Image.new("RGB", (GAP + max(map(len, rows)) * (CELL + GAP), GAP + sum(heights)), "white")
    draw, y = ImageDraw.Draw(canvas), GAP
    for row, texts, height in zip(rows, lines, heights):
        for i, ((picture, _), text) in enumerate(zip(row, texts)):
            x, image = GAP + i * (CELL + GAP), Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
            canvas.paste(image.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline="#cccccc")
            for n, words in enumerate(text):
                draw.text((x, y + CELL + 2 + n * LINE), words, "#333333", font)
        y += height
    return canvas


def sheet(name, rows):
    grid(rows).save(GALLERY / f"{name}.png")
    print(GALLERY / f"{name}.png", flush=True)


def prompts(cascade):
    rows = []
    for group, mark in ((PROMPTS, ""), (HELD_OUT, "held out: ")):
        drawn = cascade(group, seed=0, output="np")
        cells = [(picture, f"{mark}{prompt}") for picture, prompt in zip(drawn, group)]
        rows += [cells[:4], cells[4:]]
    sheet("prompts", rows)


def seeds(cascade):
    drawn = cascade("a star", images=8, seed=0, output="np")
    sheet("seeds", [[(picture, f"a star, seed {i}") for i, picture in enumerate(drawn)]])


def guidance(cascade):
    rows = []
    for prompt in ("a red heart on a green background", "a small white ring left of a large blue triangle"):
        rows.append([(cascade(prompt, guidance=weight, seed=1, output="np")[0], f"{prompt}, guidance {weight}")
                     for weight in (0, 1.5, 2, 3, 4, 6, 8)])
    sheet("guidance", rows)


def negative(cascade):
    rows = []
    for unwanted in ("", "red"):
        drawn, words = cascade("a circle", unwanted, images=8, seed=0, output="np"), unwanted and f", not {unwanted}"
        rows.append([(picture, f"a circle{words}, seed {i}") for i, picture in enumerate(drawn)])
    sheet("negative", rows)


def reconstruction(cascade):
    rng = np.random.default_rng(5)
    scenes = [shapes.sample_scene(rng) for _ in range(8)]
    sheet("reconstruction", [[(picture, words) for picture in drawn] for drawn, words in (
        (true_pictures(scenes), "true"), (reconstruct(cascade, scenes), "from 144 numbers"))])


def variations(cascade):
    rng = np.random.default_rng(6)
    scenes = [shapes.sample_scene(rng, 0.25) for _ in range(8)]
    given = [Image.fromarray(shapes.render(scene)) for scene in scenes]
    rows = [[(np.asarray(picture) / 255, "given") for picture in given]]
    for prompt in ("", "on a black background"):
        rows.append([(cascade(prompt, variation_images=[picture], output="np")[0], prompt or "no prompt")
                     for picture in given])
    sheet("variations", rows)


def starts(cascade):
    scene = shapes.Scene((shapes.Thing("circle", "red", "large", 46, 80),), "white")
    given, prompt = Image.fromarray(shapes.render(scene)), "a large blue star on a white background"
    rows = [(np.asarray(given) / 255, "given")]
    rows += [(cascade(prompt, init_image=given, strength=strength, output="np")[0], f"{prompt}, strength {strength}")
             for strength in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)]
    sheet("starts", [rows])


def recipes(cascade):
    """The ways to sample, then what --previews saves of the first."""
    prompt, cells, seen = "a small blue star left of a large yellow ring", [], {}
    for words, how in (("the default", {}), ("--recipe original", {"recipe": "original"}),
                       ("--recipe lcm", {"recipe": "lcm"}), ("--guidance-interval 0.2 0.8", {"interval": (0.2, 0.8)})):
        drawn = cascade(prompt, images=2, seed=0, output="np", **how)
        cells += [(picture, f"{words}, seed {i}") for i, picture in enumerate(drawn)]
    cascade.prior(prompt, seed=0, watch=seen.__setitem__)
    with torch.inference_mode():
        shown = {i: cascade.network("previewer")(seen[i])[0].clamp(0, 1).permute(1, 2, 0).numpy() for i in seen}
    sheet("recipes", [cells, [(shown[i], f"--previews, step {i}") for i in (1, 3, 6, 9, 12, 15, 18, 20)]])


if __name__ == "__main__":
    GALLERY.mkdir(exist_ok=True)
    small = Cascade(keep=True)
    small("a large red circle on a white background")[0].save(GALLERY / "picture.png")
    for draw_sheet in (prompts, seeds, guidance, negative, reconstruction, variations, starts, recipes):
        draw_sheet(small)
