"""Does the small cascade draw what its prompts say? Draws one image per prompt, reads it with the evaluator of
shapes.py, and prints a table.

    python weights/evaluate.py                      # 200 prompts per row
    python weights/evaluate.py --count 40           # a quick look

Seen prompts describe scenes that training can sample, held-out ones those it never samples. Every
prompt is a full caption (shapes.full_caption); images use the default options and the seeds 0, 1, ...
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

PARTS = ("count", "background", "shape", "colour", "size", "relation", "all")
PROMPT_SEED = {False: 1001, True: 1002}             # seen, held out; training uses other seeds
BATCH = 40


def sample_scenes(count, seed, two=0.5, held=False):
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, two, held) for _ in range(count)]


def true_images(scenes):
    """(N, 128, 128, 3) in [0, 1]."""
    return np.stack([shapes.render(scene) for scene in scenes]).astype(np.float32) / 255


def detect(images):
    """Images (N, 128, 128, 3) in [0, 1] -> the scenes that they show."""
    return [shapes.detect((image * 255).round().astype(np.uint8)) for image in images]


def accuracy(scenes, images):
    """The percentage of images that are right, for each of PARTS."""
    scores = [shapes.score(scene, found) for scene, found in zip(scenes, detect(images))]
    return [100 * np.mean([result[part] for result in scores]) for part in PARTS]


def draw(cascade, scenes):
    """Full captions -> images."""
    images = []
    for i in range(0, len(scenes), BATCH):
        prompts = [shapes.full_caption(scene) for scene in scenes[i:i + BATCH]]
        images.append(cascade(prompts, seed=i, output="np"))
    return np.concatenate(images)


@torch.inference_mode()
def reconstruct(cascade, scenes):
    """Image -> semantic latent -> Stage B -> Stage A -> image."""
    encoder = cascade.network("effnet_encoder")
    true = torch.from_numpy(true_images(scenes)).permute(0, 3, 1, 2)
    images = []
    for i in range(0, len(scenes), BATCH):
        small = F.interpolate(true[i:i + BATCH], (96, 96), mode="bilinear", antialias=True)
        images.append(cascade.decode(encoder(small), seed=i, output="np"))
    return np.concatenate(images)


def vary(cascade, scenes):
    """Image -> image embedding -> Stage C without a prompt -> Stage B -> Stage A -> image."""
    images = []
    for i, scene in enumerate(scenes):
        image = Image.fromarray(shapes.render(scene))
        images.append(cascade(variation_images=[image], seed=i, output="np"))
    return np.concatenate(images)


@torch.inference_mode()
def stage_a_alone(cascade, scenes):
    """Image -> image latent -> image."""
    stage_a = cascade.network("stage_a")
    images = torch.from_numpy(true_images(scenes)).permute(0, 3, 1, 2)
    return stage_a.decode(stage_a.encode(images)).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def retrieval_accuracy(cascade, groups):
    """Groups of scenes, the true one first -> the percentage of images whose embedding is closest to
    that of their own caption."""
    images = [Image.fromarray(shapes.render(group[0])) for group in groups]
    image_embeddings = cascade.encode_image(images)                                     # (N, E)
    captions = [shapes.full_caption(scene) for group in groups for scene in group]
    pooled = cascade.encode_prompt(captions).pooled[:len(captions)]                     # (N * k, 1, E)
    text_embeddings = F.normalize(pooled, dim=-1).view(len(groups), -1, pooled.shape[-1])
    similarity = text_embeddings @ image_embeddings[:, :, None]                         # (N, k, 1)
    return 100 * (similarity.argmax(dim=1) == 0).float().mean().item()


def other_shapes(scene):
    """A scene of one object, followed by the same with every other shape."""
    item, = scene.objects
    others = [shape for shape in shapes.SHAPES if shape != item.shape]
    return [scene] + [replace(scene, objects=(replace(item, shape=shape),)) for shape in others]


def swapped_positions(scene):
    """A scene of two objects, followed by the same with their positions swapped."""
    a, b = scene.objects
    return [scene, replace(scene, objects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))]


def count_red(cascade, negative):
    """How many of 48 images of 'a circle', 'a square', ... have a red object."""
    prompts = [f"a {shape}" for shape in shapes.SHAPES]
    found = detect(cascade(prompts, negative, images=8, output="np"))
    return sum(any(item.colour == "red" for item in scene.objects) for scene in found)


def print_row(name, percentages):
    print(f"| {name:34} | " + " | ".join(f"{value:10.1f}" for value in percentages) + " |", flush=True)


def evaluate_prompts(cascade, count):
    for two, what in ((0, "one object"), (1, "two objects")):
        for held, which in ((False, "seen"), (True, "held out")):
            scenes = sample_scenes(count, [PROMPT_SEED[held], two], two, held)
            print_row(f"{what}, {which}", accuracy(scenes, draw(cascade, scenes)))


def evaluate_images(cascade, count):
    for held, which in ((False, ""), (True, ", held out")):
        scenes = sample_scenes(count, PROMPT_SEED[held], held=held)
        true = true_images(scenes)
        print_row(f"variation{which}", accuracy(scenes, vary(cascade, scenes)))
        for name, function in (("reconstruction", reconstruct), ("Stage A alone", stage_a_alone)):
            images = function(cascade, scenes)
            psnr = np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(true, images)])
            print_row(f"{name}{which} ({psnr:.1f} dB)", accuracy(scenes, images))


def evaluate_encoders(cascade, count):
    for two, distractors, what in (
        (0, other_shapes, "the same object in the five other shapes"),
        (1, swapped_positions, "the same objects in swapped positions"),
    ):
        found = []
        for held in (False, True):
            scenes = sample_scenes(count, [PROMPT_SEED[held], two], two, held)
            found.append(retrieval_accuracy(cascade, [distractors(scene) for scene in scenes]))
        print(f"Text and image encoder tell an image's caption from that of {what}: "
              f"{found[0]:.1f} %, held out {found[1]:.1f} %.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=HERE / "tiny")
    parser.add_argument("--count", type=int, default=200, help="prompts per row (default: %(default)s)")
    options = parser.parse_args()
    cascade = Cascade(options.weights, keep=True)
    print(f"| {'percent right':34} | " + " | ".join(f"{part:10}" for part in PARTS) + " |")
    print("|---" * (len(PARTS) + 1) + "|")
    evaluate_prompts(cascade, options.count)
    evaluate_images(cascade, options.count)
    print()
    evaluate_encoders(cascade, options.count)
    print(f"Of 48 images of 'a circle', 'a square' ... {count_red(cascade, '')} have a red object; "
          f"with 'red' as the negative prompt {count_red(cascade, 'red')} have one.")


if __name__ == "__main__":
    main()
