"""Does the small cascade draw what its prompts say? Draws one image per prompt, reads it with the evaluator of
shapes.py, and prints a table.

    python weights/evaluate.py                              # every row, 400 prompts each
    python weights/evaluate.py --count 40 --rows and alike  # a quick look at the rows so named

Seen prompts describe scenes that training can sample, held-out ones those it never samples; the prompts
of both are full captions (shapes.full_caption). Free wording comes from the templates below, which
training never uses. Images use the seeds 0, 1, ... and the default options unless a row says otherwise.

The columns are percentages; "all" is everything but size and intact, "right" is all and intact: one
plain background, complete shapes, one colour each. The last two are the overlap (IoU, in percent) of
each drawn object with the ideal shape of its own centre and area, its median and 5th percentile.
"""
import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
from cascade import Cascade                                                             # noqa: E402
from shapes import Object, Scene, pick, with_article                                    # noqa: E402

PARTS = ("count", "background", "shape", "colour", "size", "relation", "all", "intact", "right")
PROMPT_SEED = {False: 1001, True: 1002}             # seen, held out; training uses other seeds
BATCH = 40

# Free wording: training has none of these templates, but knows some of their words, as words without a
# meaning (shapes.FILLERS).
FREE_WHERE = {
    "left of": ["just left of", "immediately to the left of"],
    "right of": ["just right of", "immediately to the right of"],
    "above": ["higher than", "floating above", "on top, above"],
    "below": ["lower than", "right below", "further down than"],
}
FREE_ONE = [
    "could you paint {a} for me?", "I would love to see {a}", "generate {a}", "a sketch of {a}",
    "{a} please", "an illustration showing {a}", "just {a}, nothing else", "give me {a}!",
    "one picture containing {a}", "a poster that shows {a}", "my kids want {a}",
]
FREE_TWO = [
    "could you paint {a} {where} {b}?", "{a} can be seen {where} {b}", "generate {a} {where} {b}",
    "in this image {a} is located {where} {b}", "a sketch: {a} {where} {b}",
]
FREE_LIST = [
    "could you paint {a} and {b}?", "{a} together with {b}", "generate {a} and {b}",
    "I would like {a} and then {b}", "{a} plus {b}", "an illustration showing {a} and {b}",
]
FREE_ALIKE = [
    "could you paint two {c}?", "generate 2 {c}", "exactly two {c}", "an illustration showing two {c}",
    "I would love to see two {c}",
]
FREE_BACKGROUND = [
    "{text} on a completely {g} background", "{text}, all on {g}", "{text}, the backdrop is {g}",
    "{text} (on {g})", "use a {g} background: {text}", "{text} - background: {g}",
]


# ---- prompts: (prompt, Scene with None for what it leaves open) -------------------------------------

def sample_scenes(count, seed, two=0.5, held=False, alike=0.0):
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, two, held, alike) for _ in range(count)]


def full_prompts(count, two, held):
    scenes = sample_scenes(count, [PROMPT_SEED[held], two], two, held)
    return [(shapes.full_caption(scene), scene) for scene in scenes]


def mixed_prompts(count):
    return full_prompts(count // 2, 0, False) + full_prompts(count - count // 2, 1, False)


def leave_open(scene, background=False):
    """The scene without sizes and positions and, unless asked for, without its background."""
    objects = tuple(Object(item.shape, item.colour) for item in scene.objects)
    return Scene(objects, scene.background if background else None)


def and_prompts(count, background):
    """'a red circle and a blue square', with or without ' on a white background'."""
    prompts = []
    for scene in sample_scenes(count, 1003, two=1):
        names = [with_article("a", f"{item.colour} {item.shape}") for item in scene.objects]
        text = " and ".join(names)
        if background:
            text += f" on {with_article('a', scene.background)} background"
        prompts.append((text, leave_open(scene, background)))
    return prompts


def alike_prompts(count):
    """'two red circles'."""
    prompts = []
    for scene in sample_scenes(count, 1004, two=1, alike=1):
        item = scene.objects[0]
        prompts.append((f"two {item.colour} {item.shape}s", leave_open(scene)))
    return prompts


def vague_prompts(count):
    """'a star', 'There is a star.', 'something red', 'a red thing', 'a circle and a square'."""
    rng = np.random.default_rng(1005)
    prompts = []
    for i in range(count):
        a = pick(rng, shapes.SHAPES)
        b = pick(rng, shapes.SHAPES)
        colour = pick(rng, list(shapes.COLOURS))
        prompts.append([
            (f"a {a}", Scene((Object(a),))), (f"There is a {a}.", Scene((Object(a),))),
            (f"something {colour}", Scene((Object(None, colour),))),
            (f"{with_article('a', colour)} thing", Scene((Object(None, colour),))),
            (f"a {a} and a {b}", Scene((Object(a), Object(b)))),
        ][i % 5])
    return prompts


def free_prompts(count):
    """Prompts in other words than those of training: one object, two with a relation, two in a list, two
    alike; half of them with a background."""
    rng = np.random.default_rng(1006)
    prompts = []
    for i in range(count):
        kind = i % 4
        scene = shapes.sample_scene(rng, two=float(kind > 0), alike=float(kind == 3))
        background = rng.random() < 0.5
        names = [with_article("a", f"{item.colour} {item.shape}") for item in scene.objects]
        target = leave_open(scene, background)
        if kind == 0:
            text = pick(rng, FREE_ONE).format(a=names[0])
        elif kind == 1:
            where = pick(rng, FREE_WHERE[shapes.relation(scene)])
            text = pick(rng, FREE_TWO).format(a=names[0], b=names[1], where=where)
            objects = tuple(replace(item, size=None) for item in scene.objects)
            target = replace(target, objects=objects)           # with positions
        elif kind == 2:
            text = pick(rng, FREE_LIST).format(a=names[0], b=names[1])
        else:
            item = scene.objects[0]
            text = pick(rng, FREE_ALIKE).format(c=f"{item.colour} {item.shape}s")
        if background:
            text = pick(rng, FREE_BACKGROUND).format(text=text.rstrip("?!"), g=scene.background)
        prompts.append((text, target))
    return prompts


# ---- images (N, 128, 128, 3) in [0, 1] -------------------------------------------------------------

def draw(cascade, prompts, **how):
    images = []
    for i in range(0, len(prompts), BATCH):
        texts = [text for text, _ in prompts[i:i + BATCH]]
        images.append(cascade(texts, seed=i, output="np", **how))
    return np.concatenate(images)


def true_images(scenes):
    return np.stack([shapes.render(scene) for scene in scenes]).astype(np.float32) / 255


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


# ---- scores ----------------------------------------------------------------------------------------

def detect(images, **lists):
    """Images (N, 128, 128, 3) in [0, 1] -> the scenes that they show."""
    return [shapes.detect((image * 255).round().astype(np.uint8), **lists) for image in images]


def accuracy(scenes, detected):
    """The percentage of images that are right, for each of PARTS, and two of the overlap."""
    scores = [shapes.score(scene, found) for scene, found in zip(scenes, detected)]
    for result in scores:
        result["right"] = result["all"] and result["intact"]
    overlaps = [item.overlap for found in detected for item in found.objects]
    shares = [np.mean([result[part] for result in scores]) for part in PARTS]
    return [100 * value for value in (*shares, *np.quantile(overlaps or [0], (0.5, 0.05)))]


def print_row(name, values, seconds):
    cells = " | ".join(f"{value:6.1f}" for value in values)
    print(f"| {name:36} | {cells} | {seconds:4.0f} s |", flush=True)


def prompt_row(prompts, how, cascade, count, name):
    start = time.time()
    prompts = prompts(count)
    detected = detect(draw(cascade, prompts, **how))
    print_row(name, accuracy([scene for _, scene in prompts], detected), time.time() - start)


def image_row(function, held, cascade, count, name):
    start = time.time()
    scenes = sample_scenes(count, PROMPT_SEED[held], held=held)
    images = function(cascade, scenes)
    if function is not vary:
        errors = [np.mean((a - b) ** 2) for a, b in zip(true_images(scenes), images)]
        psnr = np.mean([-10 * np.log10(max(error, 1e-9)) for error in errors])
        name += f" ({psnr:.1f} dB)"
    print_row(name, accuracy(scenes, detect(images)), time.time() - start)


def rows():
    """{name: a function of (cascade, count, name) that prints the row}."""
    table = {}
    for two, objects in ((0, "one object"), (1, "two objects")):
        for held, which in ((False, "seen"), (True, "held out")):
            prompts = partial(full_prompts, two=two, held=held)
            table[f"{objects}, {which}"] = partial(prompt_row, prompts, {})
    for background, which in ((False, "without"), (True, "with")):
        prompts = partial(and_prompts, background=background)
        table[f"two joined by 'and', {which} background"] = partial(prompt_row, prompts, {})
    table["two alike"] = partial(prompt_row, alike_prompts, {})
    table["vague"] = partial(prompt_row, vague_prompts, {})
    table["free wording"] = partial(prompt_row, free_prompts, {})
    table["mixed, default"] = partial(prompt_row, mixed_prompts, {})
    table["mixed, recipe original"] = partial(prompt_row, mixed_prompts, {"recipe": "original"})
    few_steps = {"steps": 8, "decoder_steps": 4}
    table["mixed, 8 + 4 steps"] = partial(prompt_row, mixed_prompts, few_steps)
    functions = {
        "true images": lambda cascade, scenes: true_images(scenes), "Stage A": stage_a_alone,
        "reconstruction": reconstruct, "variation": vary,
    }
    for name, function in functions.items():
        for held, which in ((False, ""), (True, ", held out")):
            table[f"{name}{which}"] = partial(image_row, function, held)
    return table


# ---- text and image encoder ------------------------------------------------------------------------

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


def count_red(cascade, negative):
    """How many of 48 images of 'a circle', 'a square', ... have a red object."""
    prompts = [f"a {shape}" for shape in shapes.SHAPES]
    found = detect(cascade(prompts, negative, images=8, output="np"))
    return sum(any(item.colour == "red" for item in scene.objects) for scene in found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=HERE / "tiny")
    parser.add_argument("--count", type=int, default=400, help="prompts per row (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD",
                        help="only the rows whose name contains one of these words")
    options = parser.parse_args()
    cascade = Cascade(options.weights, "cpu", keep=True)
    header = [f"{part:6.6}" for part in (*PARTS, "IoU 50", "IoU 5")]
    print(f"| {'percent right':36} | " + " | ".join(header) + " | time   |")
    print("|---" * (len(header) + 2) + "|")
    for name, row in rows().items():
        if any(word in name for word in options.rows):
            row(cascade, options.count, name)
    if options.rows == [""]:
        print()
        evaluate_encoders(cascade, options.count)
        print(f"Of 48 images of 'a circle', 'a square' ... {count_red(cascade, '')} have a red object; "
              f"with 'red' as the negative prompt {count_red(cascade, 'red')} have one.")


if __name__ == "__main__":
    main()
