"""A file of prompts: every line's picture is that of a single run, and what is there already is not drawn again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import alive
from tiny import save, write_folder

import cascade
from cascade import Cascade

ROOT = Path(__file__).resolve().parent.parent
LINES = "a red circle\n\n  two stars \na st\u00e4r"  # line 2 is blank: pictures 0, 2 and 3
DRAWN = {0: "a red circle", 2: "two stars", 3: "a st\u00e4r"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture
def draw(folder, tmp_path):
    """Runs the command within this process; returns {name: bytes} of the pictures that are there after it."""
    (tmp_path / "prompts.txt").write_text(LINES, encoding="utf-8")
    (tmp_path / "out").mkdir()

    def run(*arguments, status=0):
        assert cascade.main(options(folder, tmp_path, *arguments)) == status
        return pictures(tmp_path)

    return run


def options(folder, place, *arguments):
    few = "--steps 2 --decoder-steps 1 --width 70 --height 80 --device cpu --seed 5".split()
    return [*few, "--weights", str(folder), "-o", str(place / "out" / "x.png"), *map(str, arguments)]


def pictures(place):
    return {path.name: path.read_bytes() for path in sorted((place / "out").iterdir())}


# ------------------------------------------------------------------------------------------------ the same pictures


def test_every_lines_picture_is_that_of_a_single_run_to_the_byte(draw, tmp_path):
    all = draw("--prompts", tmp_path / "prompts.txt", "--negative", "blue")
    assert list(all) == [f"x-{i}.png" for i in DRAWN]
    for i, prompt in DRAWN.items():
        one = draw(prompt, "--negative", "blue", "--seed", 5 + i)
        assert all[f"x-{i}.png"] == one["x.png"]  # what it says of itself too


def test_with_several_images_a_line_they_are_numbered_and_seeded_through(draw, tmp_path):
    all = draw("--prompts", tmp_path / "prompts.txt", "--images", 2)
    assert list(all) == [f"x-{i}.png" for i in (0, 1, 4, 5, 6, 7)]
    with Image.open(tmp_path / "out" / "x-5.png") as picture:
        assert picture.info["prompt"] == "two stars" and picture.info["seed"] == "10"
    pair = draw("two stars", "--images", 2, "--seed", 9)
    assert [pair["x-0.png"], pair["x-1.png"]] == [all["x-4.png"], all["x-5.png"]]


def test_pictures_may_stand_beside_a_file_of_prompts(draw, tmp_path):
    start = tmp_path / "start.png"
    Image.new("RGB", (70, 80), "red").save(start)
    beside = "--init-image", start, "--variation-image", start
    all = draw("--prompts", tmp_path / "prompts.txt", *beside)
    assert all["x-2.png"] == draw("two stars", *beside, "--seed", 7)["x.png"]


def test_each_network_is_loaded_once_and_makes_room_for_the_next_stage(draw, tmp_path, monkeypatch):
    log = alive(monkeypatch)
    draw("--prompts", tmp_path / "prompts.txt")
    assert log == [1, 1, 1, 2]  # Stage A beside Stage B: a picture is written as soon as it is painted


def test_two_processes_of_torchrun_draw_what_one_draws_to_the_byte(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(LINES, encoding="utf-8")
    drawn = {}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        (tmp_path / name / "out").mkdir(parents=True)
        run = subprocess.run(
            [sys.executable, *launcher, ROOT / "cascade.py"]
            + options(folder, tmp_path / name, "--prompts", tmp_path / "prompts.txt", "--decoder-guidance", 1.5),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as torchrun sets it: threads round differently
        )
        assert run.returncode == 0, run.stderr
        drawn[name] = pictures(tmp_path / name)
    assert drawn["two"] == drawn["one"] and len(drawn["one"]) == len(DRAWN)


def test_processes_share_the_lines_without_overlap(folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefg"))
    given = cascade.parse(options(folder, tmp_path, "--prompts", tmp_path / "prompts.txt"))
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(cascade.batches(given))
    assert [len(share) for share in shares] == [3, 2, 2]
    assert sorted(sum(shares, [])) == [(i, [letter]) for i, letter in enumerate("abcdefg")]


def test_each_process_has_a_gpu_of_its_own(draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "93")
    draw("--prompts", tmp_path / "prompts.txt", "--device", "cuda", status=2)
    assert "device 'cuda:93' cannot be used" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ starting again


def test_started_again_it_draws_only_what_is_missing(draw, tmp_path, monkeypatch):
    whole = draw("--prompts", tmp_path / "prompts.txt")
    (tmp_path / "out" / "x-2.png").unlink()
    (tmp_path / "out" / "x-3.png").write_bytes(b"mine")
    drawn, real = [], Cascade.prior
    monkeypatch.setattr(Cascade, "prior", lambda *given, **named: drawn.append(given[8]) or real(*given, **named))
    again = draw("--prompts", tmp_path / "prompts.txt")
    assert drawn == [5 + 2] and again == whole | {"x-3.png": b"mine"}


def test_with_all_there_nothing_is_loaded(draw, tmp_path, monkeypatch):
    whole, log = draw("--prompts", tmp_path / "prompts.txt"), alive(monkeypatch)
    assert draw("--prompts", tmp_path / "prompts.txt") == whole and log == []


def test_stopped_in_the_middle_it_leaves_whole_pictures_and_goes_on_with_the_rest(draw, tmp_path, monkeypatch):
    real, calls = Cascade.decode, []

    def stops(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cascade, "decode", stops)
        draw("--prompts", tmp_path / "prompts.txt")
    first = pictures(tmp_path)
    assert list(first) == ["x-0.png"]
    rest = draw("--prompts", tmp_path / "prompts.txt")
    assert list(rest) == [f"x-{i}.png" for i in DRAWN] and rest["x-0.png"] == first["x-0.png"]
    Image.open(tmp_path / "out" / "x-3.png").load()


# ------------------------------------------------------------------------------------------------ what can be wrong


@pytest.mark.parametrize(
    "data, said",
    [
        (None, "No such file"),
        (b"", "it is empty"),
        (b" \n\t\r\n", "it is empty"),
        (b"a red circle\n\xff\xfe", "can't decode byte 0xff"),
    ],
    ids=["not there", "empty", "blank", "not text"],
)
def test_a_file_that_holds_no_prompts(draw, tmp_path, capsys, data, said):
    (tmp_path / "prompts.txt").write_bytes(data) if data is not None else (tmp_path / "prompts.txt").unlink()
    assert not draw("--prompts", tmp_path / "prompts.txt", status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompts.txt: not prompts, one a line" in line and said in line


@pytest.mark.parametrize(
    "beside",
    [["a star"], ["--latents", "x.safetensors"], ["--reconstruct", "x.png"], ["--previews", "."]],
    ids=lambda beside: beside[0],
)
def test_a_file_of_prompts_beside_what_it_excludes(draw, tmp_path, capsys, beside):
    assert not draw("--prompts", tmp_path / "prompts.txt", *beside, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "wanted is one of: a prompt or a picture to draw after; --prompts FILE, without --previews;" in line


def test_a_file_of_prompts_draws_pictures_only(draw, tmp_path, capsys):
    assert not draw("--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out" / "x.safetensors", status=2)
    assert capsys.readouterr().err.endswith("wanted is a name that ends in .png\n")


@pytest.mark.parametrize("images", ["0", "-1", "100000000"])
def test_a_number_of_images_out_of_bounds(draw, tmp_path, capsys, images):
    assert not draw("--prompts", tmp_path / "prompts.txt", "--images", images, status=2)
    assert f"images is {images}; wanted is a whole number" in capsys.readouterr().err


def test_weights_that_break_leave_nothing_half_written(draw, folder, tmp_path, capsys):
    broken = write_folder(tmp_path / "broken", seed=1)
    tensors = load_file(broken / "stage_b.safetensors")
    tensors["clf.1.bias"].fill_(float("nan"))
    save(tensors, broken / "stage_b.safetensors")
    assert not draw("--prompts", tmp_path / "prompts.txt", "--weights", broken, status=2)
    assert "Stage B: the latent is not finite" in capsys.readouterr().err
