"""Does the eight exercises of README's lesson on a copy of the project: changes a line, draws, and says how far the
picture is from the unchanged one (the mean over its values, 0 to 255) and what the judge of shapes.py reads in it.

    python weights/exercises.py FOLDER              the pictures and the copy stay in FOLDER
"""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import shapes                                                                           # noqa: E402

MODULES = ("cascade.py", "model.py", "sampler.py", "text_encoder.py")
PROMPT = "a small yellow star above a large blue circle"
EXERCISES = (("sampler.py", "epsilon = unwanted + guidance * (wanted - unwanted)", "epsilon = wanted"),
             ("sampler.py", "return mean + variance.sqrt() * noise", "return mean"),
             ("text_encoder.py", "return x, self.text_projection", "return x * mask[..., None], self.text_projection"),
             ("model.py", "return self.clip_norm(torch.cat(tokens, dim=1))",
              "return self.clip_norm(torch.cat(tokens, dim=1)) * 0"),
             ("cascade.py", "torch.cat([latents, ", "torch.cat([latents.transpose(2, 3), "),
             ("model.py", "skips.append(x)", "skips.append(x * 0)"),
             ("model.py", "return x * (1 + scale) + shift", "return x"),
             ("cascade.py", "stage_a.decode(one[None].to(dtype))",
              "stage_a.decode(stage_a.quantise(one[None].to(dtype))[0])"))


def draw(folder, name, prompt=PROMPT, *options):
    """-> the picture (128, 128, 3), 0 to 255, and what it shows."""
    command = [sys.executable, "cascade.py", prompt, "--seed", "3", "--weights", HERE / "tiny", "-o", f"{name}.png"]
    subprocess.run([*command, *options], cwd=folder, check=True, capture_output=True)
    picture = np.asarray(Image.open(folder / f"{name}.png"))
    seen = shapes.judge(picture)
    things = [f"{thing.size} {thing.colour} {thing.shape} at ({thing.x:.0f}, {thing.y:.0f})" for thing in seen.things]
    return picture.astype(float), f"{', '.join(things) or 'nothing'} on {seen.ground}"


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODULES:
        shutil.copy(HERE.parent / file, folder)
    before, seen = draw(folder, "before")
    print(f"before: {seen}")
    for number, (file, old, new) in enumerate(EXERCISES, 1):
        source = (HERE.parent / file).read_text("utf-8")
        (folder / file).write_text(source.replace(old, new), "utf-8")
        after, seen = draw(folder, str(number))
        other = draw(folder, f"{number}-heart", "a green heart")[0] if number == 4 else None
        (folder / file).write_text(source, "utf-8")
        print(f"{number}: {abs(after - before).mean():.1f}: {seen}", flush=True)
        if number == 1:
            other = draw(folder, "1-guidance", PROMPT, "--guidance", "1")[0]
        if other is not None:
            print(f"   {abs(after - other).max():.0f} at most from the picture of "
                  f"{'--guidance 1' if number == 1 else 'another prompt'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python weights/exercises.py FOLDER")
    main(Path(sys.argv[1]))
