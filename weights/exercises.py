"""Does the exercises of LESSON.md on a copy of the project: changes a line, draws, and prints the difference from the
unchanged image (mean over its values, 0 to 255) and what the evaluator of shapes.py detects in it.

    python weights/exercises.py FOLDER              the images and the copy stay in FOLDER
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import shapes                                                                           # noqa: E402
from cascade import Cascade                                                             # noqa: E402

MODULES = ("cascade.py", "model.py", "sampler.py", "text_encoder.py")
PROMPT, SEED = "a small yellow star above a large blue circle", 20
OPEN_PROMPT = "a circle"                                        # exercise 5: it leaves nearly everything open
EXERCISES = {                                                   # number: file, code, changed code; 5 changes none
    1: ("sampler.py", "eps = uncond + guidance * (cond - uncond)", "eps = cond"),
    2: ("sampler.py", "return mean + variance.sqrt() * noise", "return mean"),
    3: ("text_encoder.py", "return x, pooled.unsqueeze(1)", "return x * mask[..., None], pooled.unsqueeze(1)"),
    4: ("model.py", "return self.clip_norm(torch.cat(tokens, dim=1))",
        "return self.clip_norm(torch.cat(tokens, dim=1)) * 0"),
    6: ("model.py", "skips.append(x)", "skips.append(x * 0)"),
    7: ("model.py", "return x * (1 + scale) + shift", "return x"),
    8: ("cascade.py", "stage_a.decode(latent[None].to(self.dtypes[\"stage_a\"]))",
        "stage_a.decode(stage_a.quantise(latent[None].to(self.dtypes[\"stage_a\"]))[0])"),
    9: ("sampler.py", "return mean + variance.sqrt() * noise",
        "x0 = predict_x0(x, eps, a)\n    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps"),
    10: ("model.py", "self.strength * scale", "-self.strength * scale"),
    11: ("model.py", "return x + feature_map", "return x - feature_map")}
OTHER_COMMANDS = {                                              # number: prompt, options
    10: ("[sunset] a large star", "--lora", HERE / "tiny/extensions/sunset.safetensors",
         "--token", "[sunset]=orange", "--guidance", "2"),
    11: ("a small red star above a large green circle", "--control", "canny", "--hint", "before.png",
         "--guidance", "2")}


def change(source, old, new, file):
    """Source code with one place changed, which must be there exactly once."""
    if source.count(old) != 1:
        sys.exit(f"{file}: expected {old!r} once, found it {source.count(old)} times")
    return source.replace(old, new)


def draw(folder, name, *options, prompt=PROMPT):
    """Runs the command in a folder -> the image, (128, 128, 3) from 0 to 255."""
    command = [sys.executable, "cascade.py", prompt, "--seed", str(SEED), "--weights", str(HERE / "tiny")]
    command += ["--device", "cpu", "-o", f"{name}.png", *map(str, options)]
    subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    return np.asarray(Image.open(folder / f"{name}.png")).astype(float)


def describe(image):
    scene = shapes.detect(image.astype(np.uint8))
    found = [f"{item.size} {item.colour} {item.shape} at ({item.x:.0f}, {item.y:.0f})" for item in scene.objects]
    return f"{', '.join(found) or 'nothing'} on {scene.background}"


def difference(image, other):
    return f"difference {abs(image - other).mean():.1f}, at most {abs(image - other).max():.0f}"


def two_seeds():
    """Exercise 5: another seed for Stage B only, then another seed for Stage C only; the mean difference of eight."""
    cascade = Cascade(HERE / "tiny", "cpu", keep=True)
    latents = cascade.prior(OPEN_PROMPT, images=9)              # seeds 0 to 8
    pairs = [(0, i) for i in range(9)] + [(i, 0) for i in range(1, 9)]
    images = []
    for prior_seed, decoder_seed in pairs:
        latent = latents[prior_seed:prior_seed + 1]
        images.append(255 * cascade.decode(latent, OPEN_PROMPT, seed=decoder_seed, output="np")[0])
    differences = [abs(image - images[0]).mean() for image in images]
    print(f"5: '{OPEN_PROMPT}', another seed for Stage B: difference {np.mean(differences[1:9]):.1f}")
    print(f"   another seed for Stage C: difference {np.mean(differences[9:]):.1f}", flush=True)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    sources = {file: (HERE.parent / file).read_text("utf-8") for file in MODULES}
    for file, source in sources.items():
        (folder / file).write_text(source, "utf-8")
    before = draw(folder, "before")
    fifty = draw(folder, "before-50-steps", "--steps", "50")
    print(f"before: {describe(before)}\n   with 50 steps: {difference(before, fifty)}", flush=True)
    for number in range(1, 12):
        if number == 5:
            two_seeds()
            continue
        prompt, *options = OTHER_COMMANDS.get(number, (PROMPT,))
        unchanged = before
        if number in OTHER_COMMANDS:
            unchanged = draw(folder, f"{number}-before", *options, prompt=prompt)
            print(f"{number}, before: {describe(unchanged)}")
        file, old, new = EXERCISES[number]
        (folder / file).write_text(change(sources[file], old, new, file), "utf-8")
        after = draw(folder, str(number), *options, prompt=prompt)
        print(f"{number}: {difference(after, unchanged)}: {describe(after)}", flush=True)
        if number == 4:
            heart = draw(folder, "4-heart", prompt="a green heart")
            print(f"   'a green heart': {difference(after, heart)}")
        if number == 9:
            fifty = draw(folder, "9-50-steps", "--steps", "50")
            print(f"   with 50 steps: {difference(after, fifty)}: {describe(fifty)}")
        (folder / file).write_text(sources[file], "utf-8")
        if number == 1:
            option = draw(folder, "1-guidance", "--guidance", "1")
            print(f"   --guidance 1: {difference(after, option)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python weights/exercises.py FOLDER")
    main(Path(sys.argv[1]))
