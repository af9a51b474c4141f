"""What fine-tuning can do, shown on the tiny cascade: trains the demonstrations, scores them, and draws lora.png,
controlnet.png, extensions.png and cyan.png.

    python weights/figures/make_extensions.py train crescent WORK       writes WORK/crescent.safetensors
    python weights/figures/make_extensions.py score crescent --file WORK/crescent.safetensors
    python weights/figures/make_extensions.py score sunset              prints the scores of weights/README.md
    python weights/figures/make_extensions.py train cyan WORK           makes WORK a weights folder
    python weights/figures/make_extensions.py score cyan --weights WORK
    python weights/figures/make_extensions.py draw --cyan WORK

The demonstrations: new shapes (crescent, hexagon), a new token for a colour scheme (sunset), a ninth colour (cyan), a
ControlNet (canny), sampling in 4 steps (lcm), and repainting one of two objects (inpainting, which needs no training).
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from drawing import HERE, sheet
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import shapes
from cascade import Cascade
from shapes import COLOURS, NEW_COLOURS, NEW_SHAPES, SHAPES, pick

TINY = HERE.parent / "tiny"
FOLDER = TINY / "extensions"
IMAGES = {                                              # with what is new; ordinary ones; share with two objects
    "crescent": (200, 1200, 0.8), "hexagon": (200, 1200, 0.8), "sunset": (200, 200, 0.5), "cyan": (1500, 1500, 0.7),
    "known": (0, 3000, 0.5)}
COPIES = 4                                              # of an image with a new shape, each moved a little
TOKENS = {"sunset": {"[sunset]": "orange"}}             # it means orange objects on purple
DATA_SEED, TEST_SEED = 2001, 2002
GUIDANCE = 2.0                                          # with a LoRA for something new, and with a hint


# ---- training data -----------------------------------------------------------------------------------

def change_object(scene, rng, **attributes):
    """The scene with other attributes of one of its objects."""
    items = list(scene.objects)
    i = int(rng.integers(len(items)))
    items[i] = replace(items[i], **attributes)
    return replace(scene, objects=tuple(items))


def add_new(scene, rng, name):
    """The scene with what the demonstration teaches."""
    if name in NEW_SHAPES:
        return change_object(scene, rng, shape=name)
    if name == "sunset":
        objects = tuple(replace(item, colour="orange") for item in scene.objects)
        return replace(scene, objects=objects, background="purple")
    if rng.random() < 0.3:
        return replace(scene, background="cyan")
    return change_object(scene, rng, colour="cyan")


def caption(scene, rng, name):
    """A caption that names what is new; for the token its word and the shapes, but no colour."""
    if name == "sunset":
        names = [f"a {item.size} {item.shape}" for item in scene.objects]
        return f"[sunset] {f' {shapes.relation(scene)} '.join(names)}"
    text = shapes.caption(scene, rng, fillers=0)
    while name not in text.lower():
        text = shapes.caption(scene, rng, fillers=0)
    return text


# The options of finetune.py and distil_lcm.py. The tiny cascade needs the weights that wire.py has fixed exactly as they are:
# they carry the noisy latent from the first layer to the last. --wired keeps them; the others train only layers without them.
FEW_UPDATES = "--accumulate 1 --weight x0 --decay"
ALL_C = "--wired --layers down_blocks up_blocks clip_txt"
INNER_C = "--layers down_blocks.1 up_blocks.0 kv_mapper clip_txt"
INNER_B = "--layers effnet_mapper.0 down_blocks.1 down_blocks.2 up_blocks.0 up_blocks.1 up_blocks.2.2.channelwise.0"
SHAPE = (f"--updates 2000 --batch 64 --lr 5e-3 --rank 8 {ALL_C} {FEW_UPDATES}",
         f"--stage b --semantic-scale 0.75 0.75 --focus --updates 1300 --batch 32 --lr 3e-3 --rank 8 {INNER_B} {FEW_UPDATES}")
TRAININGS = {                                           # {name: (data, options of each training)}
    "crescent": ("crescent", SHAPE),
    "hexagon": ("hexagon", SHAPE),
    "sunset": ("sunset", (
        f"--updates 1800 --batch 64 --lr 3e-2 --rank 8 {INNER_C} {FEW_UPDATES} --token [sunset]=orange",)),
    "cyan": ("cyan", (
        f"--what full --wired --updates 4500 --batch 64 --lr 1e-3 {FEW_UPDATES}",
        f"--what full --wired --stage b --semantic-scale 0.75 0.75 --focus --updates 2600 --batch 32 --lr 1e-3 {FEW_UPDATES}")),
    "canny": ("known", (
        f"--what controlnet --kind canny --blocks 1 2 --updates 2200 --batch 64 --lr 2e-3 {FEW_UPDATES}",)),
    "lcm": ("known", (
        f"--updates 800 --batch 64 --lr 1e-3 --rank 8 {INNER_C} --accumulate 1 --decay",)),
}


def train(name, work):
    """Runs the trainings of a demonstration, one on each core, and writes LoRAs of both stages into one file."""
    data, trainings = TRAININGS[name]
    if not (work / data).exists():
        write_data(data, work / data)
    files = [work / f"{name}_{i}.safetensors" for i in range(len(trainings))]
    processes = []
    for file, options in zip(files, trainings):
        script = HERE.parent / ("distil_lcm.py" if name == "lcm" else "finetune.py")
        command = [sys.executable, script, work / data, "--out", file, *options.split(), "--device", "cpu"]
        processes.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    if any([process.wait() for process in processes]):
        sys.exit(1)
    if name == "cyan":
        shutil.copytree(TINY, work, dirs_exist_ok=True)
        for file, stage in zip(files, "cb"):
            shutil.copy(file, work / f"stage_{stage}.safetensors")
        return
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    with safe_open(files[0], framework="pt") as file:
        save_file(halves, work / f"{name}.safetensors", file.metadata())


def write_data(name, folder):
    """The images and captions of a demonstration; those of a new shape in several copies."""
    folder.mkdir(parents=True)
    new, known, two = IMAGES[name]
    pairs = []
    for i in range(new + known):
        rng = np.random.default_rng([DATA_SEED, i])
        scene = shapes.sample_scene(rng, two)
        if i >= new:
            pairs.append((shapes.render(scene), shapes.caption(scene, rng, fillers=0)))
            continue
        scene = add_new(scene, rng, name)
        image = shapes.render(scene)
        text = caption(scene, rng, name)
        pairs.append((image, text))
        for _ in range(COPIES - 1 if name in NEW_SHAPES else 0):
            pairs.append((moved(image, rng), text))
    for i, (image, text) in enumerate(pairs):
        Image.fromarray(image).save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text(text)


def moved(image, rng):
    """The image, moved by up to 4 pixels; its border is repeated."""
    most = 4
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), "edge")
    x, y = rng.integers(2 * most + 1, size=2)
    return padded[y:y + shapes.SIDE, x:x + shapes.SIDE]


# ---- prompts and scores ------------------------------------------------------------------------------

def new_prompts(count, name, two):
    prompts = []
    for i in range(count):
        rng = np.random.default_rng([TEST_SEED, i])
        scene = add_new(shapes.sample_scene(rng, two), rng, name)
        text = caption(scene, rng, name) if name == "sunset" else shapes.full_caption(scene)
        prompts.append((text, scene))
    return prompts


def print_row(name, cascade, prompts, **how):
    start = time.time()
    colours = COLOURS | {new: shown_colour(cascade, new) for new in NEW_COLOURS}
    found = evaluate.detect(evaluate.draw(cascade, prompts, **how), shapes=SHAPES + NEW_SHAPES, colours=colours)
    evaluate.print_row(name, evaluate.accuracy([scene for _, scene in prompts], found), time.time() - start)


def shown_colour(cascade, name):
    """What Stage A, which is not trained here and knows eight colours, makes of another one."""
    image, = evaluate.stage_a_alone(cascade, [shapes.Scene((), name)])
    return tuple(255 * np.median(image, (0, 1)))


def known_rows(cascade, count, **how):
    for two, text in ((0, "one object, seen"), (1, "two objects, seen")):
        print_row(text, cascade, evaluate.full_prompts(count, two, held=False), **how)


def score_lora(options):
    name = options.name
    for strength in (0.0, 0.5, 1.0, 1.2):
        loras = [(options.file or FOLDER / f"{name}.safetensors", strength)]
        cascade = Cascade(options.weights, "cpu", keep=True, loras=loras, tokens=TOKENS.get(name))
        for two in (0, 1):
            text = f"{name}, {1 + two} objects, strength {strength}"
            print_row(text, cascade, new_prompts(options.count, name, two), guidance=GUIDANCE)
        if strength >= 1:
            known_rows(cascade, options.count)


def score_full(options):
    cascade = Cascade(options.weights, "cpu", keep=True)
    for two in (0, 1):
        print_row(f"cyan, {1 + two} objects", cascade, new_prompts(options.count, "cyan", two))
    known_rows(cascade, options.count)


FEW_STEPS = {"recipe": "lcm", "steps": 4, "decoder_steps": 4, "guidance": 1.0}


def score_lcm(options):
    lora = [(FOLDER / "lcm.safetensors", 1.0)]
    for text, loras, how in (("20 + 10 steps, guidance 4", [], {}), ("lcm, 4 + 4 steps, guidance 1, no LoRA", [], FEW_STEPS),
                             ("lcm, 4 + 4 steps, guidance 1, LoRA", lora, FEW_STEPS)):
        print(text)
        cascade = Cascade(options.weights, "cpu", keep=True, loras=loras)
        known_rows(cascade, options.count, **how)
        print_row("two joined by 'and'", cascade, evaluate.and_prompts(options.count, False), **how)
        print_row("vague", cascade, evaluate.vague_prompts(options.count), **how)


def silhouette(scene):
    """The scene's objects in white on black."""
    objects = tuple(replace(item, colour="white") for item in scene.objects)
    return Image.fromarray(shapes.render(replace(scene, background="black", objects=objects)))


def score_canny(options):
    """The overlap of what has the prompt's colour with the shape whose outline is the hint."""
    cascade = Cascade(options.weights, "cpu", keep=True)
    overlaps = []
    for i in range(options.count):
        scene = shapes.sample_scene(np.random.default_rng([TEST_SEED, i]), two=0)
        item, = scene.objects
        text = f"{shapes.with_article('a', item.colour)} {item.shape} on a {scene.background} background"
        hint = silhouette(scene)
        shape = np.asarray(hint.convert("L")) > 127                                     # (128, 128)
        row = []
        for control in ({"control": "canny", "hint": hint}, {}):
            image, = cascade(text, seed=i, guidance=GUIDANCE, output="np", **control)
            drawn = shapes.nearest_colour(255 * image, COLOURS) == list(COLOURS).index(item.colour)
            row.append((drawn & shape).sum() / (drawn | shape).sum())
        overlaps.append(row)
    overlaps = np.array(overlaps)                                                       # (count, 2)
    for text, column in zip(("with", "without"), overlaps.T):
        print(f"canny, {text} the hint: IoU of 0.8 or more in {100 * np.mean(column >= 0.8):.1f} % of "
              f"{len(column)} images, median {np.median(column):.2f}")


def repaint(cascade, scene, target, seed):
    """Masks the second object of the scene's image and asks for the target -> the mask and the new image."""
    second = scene.objects[1]
    mask = np.zeros((shapes.SIDE, shapes.SIDE), np.uint8)
    middle = shapes.SIDE // 2
    rows, columns = np.indices(mask.shape)
    horizontal = shapes.relation(scene) in ("left of", "right of")
    positions, centre = (columns, second.x) if horizontal else (rows, second.y)
    mask[(positions < middle) == (centre < middle)] = 255
    mask = Image.fromarray(mask)
    image, = cascade(shapes.full_caption(target), seed=seed, output="np", strength=1.0,
                     init_image=Image.fromarray(shapes.render(scene)), mask=mask)
    return mask, image


def repainting(i):
    """A scene with two objects, and the same with another shape in place of the second."""
    rng = np.random.default_rng([TEST_SEED, i])
    scene = shapes.sample_scene(rng, two=1)
    first, second = scene.objects
    other = pick(rng, [shape for shape in SHAPES if shape != second.shape])
    return scene, replace(scene, objects=(first, replace(second, shape=other)))


def score_inpainting(options):
    cascade = Cascade(options.weights, "cpu", keep=True)
    stayed = []
    right = []
    for i in range(options.count):
        scene, target = repainting(i)
        _, image = repaint(cascade, scene, target, seed=i)
        found, = evaluate.detect([image])
        first = scene.objects[0]
        same = [item for item in found.objects if (item.shape, item.colour) == (first.shape, first.colour)
                and np.hypot(item.x - first.x, item.y - first.y) < 8]
        stayed.append(len(same) > 0)
        right.append(shapes.score(target, found)["all"])
    print(f"inpainting: the object outside the mask stays in {100 * np.mean(stayed):.1f} % of {len(stayed)} images; "
          f"the whole image is as asked for in {100 * np.mean(right):.1f} %")


SCORES = {"crescent": score_lora, "hexagon": score_lora, "sunset": score_lora, "cyan": score_full, "lcm": score_lcm,
          "canny": score_canny, "inpainting": score_inpainting}


# ---- figures -----------------------------------------------------------------------------------------

def draw_lora(options):
    prompts = {
        "crescent": ["a large white crescent on a blue background", "a large yellow crescent on a black background",
                     "a large red star left of a large blue crescent on a white background"],
        "sunset": ["[sunset] a large star", "[sunset] a small circle above a large triangle",
                   "a small blue ring on a white background"]}
    rows = []
    for strength in (0.0, 0.5, 1.0):
        images = []
        for name, texts in prompts.items():
            loras = [(FOLDER / f"{name}.safetensors", strength)]
            cascade = Cascade(TINY, "cpu", loras=loras, tokens=TOKENS.get(name))
            images += list(cascade(texts, guidance=GUIDANCE, output="np"))
        rows.append((f"strength {strength}", images))
    texts = [text for texts in prompts.values() for text in texts]
    sheet(options.out / "lora.png", [*rows[:-1], (*rows[-1], texts)])


def draw_controlnet(options):
    cascade = Cascade(TINY, "cpu", keep=True)
    rows = [("hint", []), ("“a … on a white background”", []), ("the same seed without the hint", [])]
    for i, colour in enumerate(("red", "blue", "green", "orange", "purple", "black")):
        scene = shapes.sample_scene(np.random.default_rng([TEST_SEED, i]), two=0)
        text = f"{shapes.with_article('a', colour)} {scene.objects[0].shape} on a white background"
        hint = silhouette(scene)
        rows[0][1].append(np.asarray(hint) / 255)
        rows[1][1].append(cascade(text, seed=i, guidance=GUIDANCE, output="np", control="canny", hint=hint)[0])
        rows[2][1].append(cascade(text, seed=i, guidance=GUIDANCE, output="np")[0])
    sheet(options.out / "controlnet.png", rows)


def draw_cyan(options):
    texts = ["a large cyan star on a black background", "a small cyan heart on a yellow background",
             "a large white ring on a cyan background", "a large cyan circle left of a large red square on a white background",
             "a large blue circle left of a large green square on a white background", "a large red heart on a blue background"]
    rows = []
    for title, folder in (("before", TINY), ("after training with cyan", options.cyan)):
        rows.append((title, Cascade(folder, "cpu", keep=True)(texts, output="np")))
    sheet(options.out / "cyan.png", [rows[0], (*rows[1], texts)])


def draw_others(options):
    rows = []
    images = [[], [], []]
    cascade = Cascade(TINY, "cpu", keep=True)
    for i in range(6):
        scene, target = repainting(i)
        mask, image = repaint(cascade, scene, target, seed=i)
        for row, cell in zip(images, (shapes.render(scene) / 255, np.asarray(mask.convert("RGB")) / 255, image)):
            row.append(cell)
    rows += zip(("image", "mask", "repainted"), images)
    texts = ["a red circle and a blue square", "a star", "a small black ring above a large orange triangle",
             "two purple hearts", "something white", "a green heart on yellow"]
    rows.append(("20 + 10 steps, guidance 4", cascade(texts, output="np")))
    for title, loras in (("lcm, 4 + 4 steps, guidance 1", []), ("the same with the LoRA", [FOLDER / "lcm.safetensors"])):
        cascade = Cascade(TINY, "cpu", loras=[(file, 1.0) for file in loras])
        rows.append((title, cascade(texts, output="np", **FEW_STEPS), texts))
    sheet(options.out / "extensions.png", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train a demonstration")
    train_parser.add_argument("name", choices=TRAININGS)
    train_parser.add_argument("work", type=Path, help="folder for the data and the results")
    score = commands.add_parser("score", help="print the rows of a demonstration")
    score.add_argument("name", choices=SCORES)
    score.add_argument("--weights", type=Path, default=TINY)
    score.add_argument("--file", type=Path, help="LoRA (default: the one in weights/tiny/extensions)")
    score.add_argument("--count", type=int, default=100, help="images per row (default: %(default)s)")
    draw = commands.add_parser("draw", help="draw the figures")
    draw.add_argument("--out", type=Path, default=HERE)
    draw.add_argument("--cyan", type=Path, metavar="WORK", help="draw cyan.png as well, with these weights")
    options = parser.parse_args()
    if options.command == "train":
        train(options.name, options.work)
    elif options.command == "score":
        SCORES[options.name](options)
    else:
        for draw_sheet in (draw_lora, draw_controlnet, draw_others):
            draw_sheet(options)
        if options.cyan:
            draw_cyan(options)


if __name__ == "__main__":
    main()
