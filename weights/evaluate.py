"""Does the small cascade draw what its prompts say? Draws one picture per prompt, lets the judge of shapes.py read
them, and prints a table.

    python weights/evaluate.py                      # 200 prompts of each kind
    python weights/evaluate.py --count 40           # a quick look

Seen prompts describe scenes that training could have drawn, held-out ones those it never does. Every prompt names
everything (shapes.full_caption), pictures use the default options and the seeds 0, 1, 2, ...
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
from cascade import Cascade                                                             # noqa: E402
from model import load                                                                  # noqa: E402

PARTS = ("count", "ground", "shape", "colour", "size", "relation", "all")
SEED = {False: 1001, True: 1002}                    # of the prompts; training counts its scenes from other seeds


def judged(wanted, pictures):
    """Scenes and pictures (N, 128, 128, 3) in [0, 1] -> the share, in percent, of each part that is right."""
    seen = [shapes.judge((picture * 255).round().astype(np.uint8)) for picture in pictures]
    rights = [shapes.right(scene, found) for scene, found in zip(wanted, seen)]
    return [100 * np.mean([right[part] for right in rights]) for part in PARTS]


def draw(cascade, scenes, batch=40):
    parts = [cascade([shapes.full_caption(scene) for scene in scenes[i:i + batch]], seed=i, output="np")
             for i in range(0, len(scenes), batch)]
    return np.concatenate(parts)


def true_pictures(scenes):
    """(N, 128, 128, 3) in [0, 1]."""
    return np.stack([shapes.render(scene) for scene in scenes]).astype(np.float32) / 255


@torch.inference_mode()
def reconstruct(cascade, scenes, batch=40):
    """Picture -> semantic latent -> Stage B -> Stage A -> picture."""
    encoder = load(cascade.folder / "effnet_encoder.safetensors", dtype=torch.float32)
    images, parts = torch.from_numpy(true_pictures(scenes)).permute(0, 3, 1, 2), []
    for i in range(0, len(scenes), batch):
        small = torch.nn.functional.interpolate(images[i:i + batch], (96, 96), mode="bilinear", antialias=True)
        parts.append(cascade.decode(encoder(small), seed=i, output="np"))
    return np.concatenate(parts)


def vary(cascade, scenes):
    """Picture -> its embedding -> Stage C, with no prompt -> Stage B -> Stage A -> picture."""
    given = [Image.fromarray(shapes.render(scene)) for scene in scenes]
    return np.concatenate([cascade(variation_images=[picture], seed=i, output="np") for i, picture in enumerate(given)])


@torch.inference_mode()
def stage_a_alone(cascade, scenes):
    """Picture -> image latent -> picture."""
    stage_a = cascade.network("stage_a")
    images = torch.from_numpy(true_pictures(scenes)).permute(0, 3, 1, 2)
    return stage_a.decode(stage_a.encode(images)).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def chosen(cascade, choices):
    """Lists of scenes, the true one first -> the share, in percent, of those whose picture is nearest to its own
    caption in what the two towers make of them."""
    seen = cascade.look([Image.fromarray(shapes.render(scenes[0])) for scenes in choices])                  # (n, E)
    said = cascade.read([shapes.full_caption(scene) for scenes in choices for scene in scenes]).pooled      # (2P, 1, E)
    said = F.normalize(said[:len(said) // 2], dim=-1).view(len(choices), -1, seen.shape[1])                 # (n, k, E)
    return 100 * ((said @ seen[:, :, None]).argmax(dim=1) == 0).float().mean().item()


def with_shapes(scene):
    """One thing, then the same with every other shape."""
    thing, = scene.things
    return [scene] + [replace(scene, things=(replace(thing, shape=shape),)) for shape in shapes.SHAPES
                      if shape != thing.shape]


def exchanged(scene):
    """Two things, then the same with their places exchanged."""
    a, b = scene.things
    return [scene, replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=HERE / "tiny")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind (default: %(default)s)")
    options = parser.parse_args()
    cascade = Cascade(options.weights, keep=True)
    print(f"| {'percent right':32} | " + " | ".join(f"{part:8}" for part in PARTS) + " |")
    print("|---" * (len(PARTS) + 1) + "|")

    def row(name, shares):
        print(f"| {name:32} | " + " | ".join(f"{share:8.1f}" for share in shares) + " |", flush=True)

    for two, what in ((0.0, "one object"), (1.0, "two objects")):
        for held in (False, True):
            rng = np.random.default_rng([SEED[held], int(two)])
            scenes = [shapes.sample_scene(rng, two, held) for _ in range(options.count)]
            row(f"{what}, {'held out' if held else 'seen'}", judged(scenes, draw(cascade, scenes)))
    for held in (False, True):
        rng, what = np.random.default_rng(SEED[held]), ", held out" if held else ""
        scenes = [shapes.sample_scene(rng, held=held) for _ in range(options.count)]
        row(f"variation{what}", judged(scenes, vary(cascade, scenes)))
        for name, way in (("reconstruction", reconstruct), ("Stage A alone", stage_a_alone)):
            pictures = way(cascade, scenes)
            psnr = np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(true_pictures(scenes), pictures)])
            row(f"{name}{what} ({psnr:.1f} dB)", judged(scenes, pictures))

    print()
    for two, others, what in ((0.0, with_shapes, "the same thing in the five other shapes"),
                              (1.0, exchanged, "its two things in each other's place")):
        found = []
        for held in (False, True):
            rng = np.random.default_rng([SEED[held], int(two)])
            scenes = [shapes.sample_scene(rng, two, held) for _ in range(options.count)]
            found.append(chosen(cascade, [others(scene) for scene in scenes]))
        print(f"The towers tell a picture's caption from that of {what}: {found[0]:.1f} %, held out {found[1]:.1f} %.")
    red = [sum(any(thing.colour == "red" for thing in shapes.judge((picture * 255).round().astype(np.uint8)).things)
               for picture in cascade([f"a {shape}" for shape in shapes.SHAPES], unwanted, images=8, output="np"))
           for unwanted in ("", "red")]
    print(f"Of 48 pictures of 'a circle', 'a square' ... {red[0]} have a red thing; "
          f"with 'red' as the negative prompt {red[1]} have one.")


if __name__ == "__main__":
    main()
