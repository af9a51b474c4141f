"""README's figures: the script draws them all, and the run that they show is the one that a user gets."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from exercises import EXERCISES
from make_lesson import PROMPT, SEED, groups, journey
from PIL import Image, ImageFont
from test_official import UNETS

from cascade import Cascade

ROOT = Path(__file__).resolve().parent.parent
DRAWINGS, PICTURES = ("architecture", "why_cascade", "unet"), ("schedule", "read", "imagine", "paint")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    command = [sys.executable, ROOT / "weights" / "make_lesson.py", "--out", folder]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return folder


def words(figures, name):
    """(x, y, size, anchor, text) of everything that a drawing says."""
    tree = ElementTree.parse(figures / f"{name}.svg").getroot()
    width, height = float(tree.get("width")), float(tree.get("height"))
    found = [(*(float(node.get(key)) for key in ("x", "y", "font-size")), node.get("text-anchor"), node.text)
             for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    return width, height, found


def test_every_figure_is_drawn_and_small_enough_for_a_page(figures):
    names = {f"{name}.svg" for name in DRAWINGS} | {f"{name}.png" for name in PICTURES}
    sizes = {path.name: path.stat().st_size for path in figures.iterdir()}
    assert set(sizes) == names and max(sizes.values()) < 150_000 and sum(sizes.values()) < 600_000
    for name in PICTURES:
        picture = Image.open(figures / f"{name}.png")
        assert 800 < picture.width < 850 and len(np.unique(np.asarray(picture))) > 30


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_word_of_a_drawing_is_cut_off(figures, name):
    width, height, found = words(figures, name)
    for x, y, size, anchor, text in found:
        long = ImageFont.load_default(size).getlength(text)
        left = x - {"start": 0, "middle": long / 2, "end": long}[anchor]
        assert 0 < left and left + long < width and size < y < height, text


def test_the_drawings_say_the_official_shapes(figures):
    said = {name: " | ".join(line[-1] for line in words(figures, name)[2]) for name in DRAWINGS}
    for shape in ("hidden (B, 77, 1280)", "pooled (B, 1, 1280)", "semantic latent (B, 16, 24, 24)",
                  "image latent (B, 4, 256, 256)", "pixels (B, 3, 1024, 1024)"):
        assert shape in said["architecture"]
    assert "341 times fewer numbers" in said["why_cascade"] and "42.7 times fewer on each side" in said["why_cascade"]
    grids = re.findall(r"(\d+) × \1 × (\d+)", said["unet"])
    for side, width in (("24", "1536"), ("128", "320"), ("64", "576"), ("32", "1152"), ("16", "1152")):
        assert (side, width) in grids


def test_a_level_is_one_group_so_many_times():
    assert groups("RTARTARTA") == ("RTA", 3) and groups("RT") == ("RT", 1)
    assert [groups(level) for level in UNETS["stage_b"].down] == [("RT", 2), ("RT", 6), ("RTA", 28), ("RTA", 6)]


def test_the_run_in_the_figures_is_the_one_that_the_command_makes():
    cascade = Cascade()
    _, (_, c), (_, b) = journey(cascade, PROMPT, SEED)
    assert torch.equal(c[-1][0], cascade.prior(PROMPT, seed=SEED))
    assert torch.equal(b[-1][0], cascade(PROMPT, seed=SEED, output="latent"))


@pytest.mark.parametrize("file, old, new", EXERCISES)
def test_an_exercise_changes_one_line_that_is_there(file, old, new):
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if old in line]
    assert len(lines) == 1 and new != old
