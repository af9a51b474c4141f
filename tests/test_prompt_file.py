"""A file of prompts: each image is that of a single run, and what exists already is not drawn again."""
import os
import subprocess
import sys

import pytest
from commands import ROOT, SMALL, changed_copy, command, contents, count_networks, refused
from PIL import Image

import cascade
from cascade import Cascade

LINES = "a red circle\n\n  two stars \na st\u00e4r"  # line 2 is blank: images 0, 2 and 3
DRAWN = {0: "a red circle", 2: "two stars", 3: "a st\u00e4r"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(LINES, encoding="utf-8")
    return tmp_path


@pytest.fixture
def draw(place, folder):
    """Draws the file of prompts, or what the arguments name; returns {name: bytes} of all images."""
    def run(*arguments, said=(), status=0):
        if not arguments or str(arguments[0]).startswith("-"):
            arguments = ["--prompt-file", "prompts.txt", *arguments]
        few = ["--steps", 2, "--decoder-steps", 1, *SMALL, "--seed", 5]
        lines = command("-o", "x.png", "--weights", folder, *few, *arguments, status=status)
        assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines)), lines
        return images(place)
    return run


def images(place):
    return {path.name: path.read_bytes() for path in sorted(place.glob("x*.png"))}


# ------------------------------------------------------------------------------ the same images
def test_every_image_is_that_of_a_single_run_to_the_byte(draw):
    drawn = draw("--negative", "blue")
    assert list(drawn) == [f"x-{i}.png" for i in DRAWN]
    for i, prompt in DRAWN.items():
        assert drawn[f"x-{i}.png"] == draw(prompt, "--negative", "blue", "--seed", 5 + i)["x.png"]


def test_with_several_images_per_line_numbers_and_seeds_run_through(draw):
    drawn = draw("--images", 2)
    assert list(drawn) == [f"x-{i}.png" for i in (0, 1, 4, 5, 6, 7)]
    with Image.open("x-5.png") as image:
        assert (image.text["prompts"], image.text["seed"]) == ("two stars", "10")
    pair = draw("two stars", "--images", 2, "--seed", 9)
    assert [pair["x-0.png"], pair["x-1.png"]] == [drawn["x-4.png"], drawn["x-5.png"]]


def test_image_inputs_serve_every_line(draw):
    Image.new("RGB", (64, 64), "red").save("red.png")
    inputs = ["--init-image", "red.png", "--variation-image", "red.png"]
    assert draw(*inputs)["x-2.png"] == draw("two stars", *inputs, "--seed", 7)["x.png"]


@pytest.mark.parametrize("chunk, counts", [(100, [1, 1, 1, 2]), (2, [1, 1, 1, 2] * 2)])
def test_chunks_go_from_text_to_image_and_load_each_network_once(draw, monkeypatch, chunk, counts):
    whole = draw()
    for name in whole:
        os.remove(name)
    monkeypatch.setattr(cascade, "CHUNK", chunk)
    found = count_networks(monkeypatch)
    assert draw() == whole
    assert found == counts  # Stage A beside Stage B: an image is written at once


# ------------------------------------------------------------------------------ several processes
@pytest.mark.slow
def test_two_processes_of_torchrun_draw_what_one_draws_to_the_byte(place, folder):
    few = ["--steps", 2, "--decoder-steps", 1, *SMALL, "--decoder-guidance", 1.5, "--device", "cpu"]
    arguments = [ROOT / "cascade.py", "--prompt-file", "prompts.txt", "--weights", folder, *few]
    drawn = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        program = [sys.executable, *launcher, *arguments, "-o", "x.png"]
        run = subprocess.run(list(map(str, program)), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        drawn.append(images(place))
        for name in drawn[-1]:
            os.remove(name)
    assert drawn[0] == drawn[1] and len(drawn[0]) == len(DRAWN)


def test_processes_share_the_lines_without_overlap(draw, place, monkeypatch):
    (place / "prompts.txt").write_text("\n".join("abcdefg"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    jobs = []
    monkeypatch.setattr(cascade, "draw", lambda options, cascade, share: jobs.extend(share))
    for rank, count in enumerate((3, 2, 2)):
        monkeypatch.setenv("RANK", str(rank))
        draw(said=[f"rank {rank} of 3: {count} of 7 prompts"])
    assert sorted(job.record.prompts for job in jobs) == [[letter] for letter in "abcdefg"]
    (place / "prompts.txt").write_text("a")
    draw(said=["rank 2 of 3: 0 of 1 prompts"])


@pytest.mark.parametrize("rank, world", [
    ("0", None), (None, "2"), ("2", "2"), ("-1", "2"), ("x", "2"), ("", ""), ("0", "0"), ("0.0", "2"),
    ("9" * 5000, "2")], ids=lambda value: str(value)[:4])
def test_rank_and_world_size_are_both_valid_or_both_missing(draw, monkeypatch, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert not draw(said=["expected RANK and WORLD_SIZE, or neither, with 0 <= "], status=2)


def test_only_the_first_process_draws_a_plain_prompt(draw, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not draw("a star", said=["RANK=1: several processes can only share a"], status=2)
    monkeypatch.setenv("RANK", "0")
    assert list(draw("a star")) == ["x.png"]


def test_each_process_has_a_gpu_of_its_own(place, folder, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "93")):
        monkeypatch.setenv(name, value)
    few = ["--weights", str(folder), "--device", "cuda"]
    assert cascade.main(["--prompt-file", "prompts.txt", *few]) == 2
    assert "device: 'cuda:93' cannot be used" in capsys.readouterr().err


# ------------------------------------------------------------------------------ starting again
def test_started_again_it_draws_only_what_is_missing(draw, monkeypatch):
    whole, seeds, prior = draw(), [], Cascade.prior
    os.remove("x-2.png")

    def watching(*given, **named):
        seeds.append(named["seed"])
        return prior(*given, **named)

    monkeypatch.setattr(Cascade, "prior", watching)
    assert draw() == whole and seeds == [7]
    counts = count_networks(monkeypatch)
    assert draw(said=["every image of prompts.txt exists already"]) == whole and counts == []


FOREIGN = {
    "other bytes": lambda data: b"mine", "no bytes": lambda data: b"",
    "a cut image": lambda data: data[:len(data) // 2],
    "an image without a record": lambda data: data.replace(b"iTXt", b"teXt")}


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_is_not_this_runs_image_stops_it_unless_overwriting_is_asked_for(draw, place, fault):
    whole = draw()
    (place / "x-2.png").write_bytes(FOREIGN[fault](whole["x-2.png"]))
    before = images(place)
    assert draw(said=["x-2.png: exists, but is not this run's image; --overwrite"], status=2) == before
    assert draw("--overwrite") == whole


def test_the_images_of_another_run_are_not_taken_for_this_ones(draw):
    whole = draw()
    for change in ["--steps", 3], ["--negative", "blue"], ["--seed", 6], ["--dtype", "bf16"]:
        assert draw(*change, said=["x-0.png: exists, but"], status=2) == whole


def test_interrupted_it_leaves_whole_images_and_goes_on_with_the_rest(draw, monkeypatch):
    decode, calls = Cascade.decode, []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "decode", stopping)
        first = draw(said=["interrupted"], status=130)
    assert list(first) == ["x-0.png"]
    rest = draw()
    assert list(rest) == [f"x-{i}.png" for i in DRAWN] and rest["x-0.png"] == first["x-0.png"]


# ------------------------------------------------------------------------------ faults
TEXTS = {
    "empty": b"", "blank": b" \n\t\r\n", "Latin-1": b"st\xe4r", "UTF-16": "a\nb".encode("utf-16"),
    "UTF-16 without a mark": "a\nb".encode("utf-16-le"), "NUL": b"a\0b"}


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
def test_a_file_that_holds_no_prompts_is_refused(draw, place, data):
    (place / "prompts.txt").write_bytes(data)
    assert not draw(said=["prompts.txt: expected prompts in UTF-8, one per line"], status=2)


def test_windows_line_ends_and_byte_order_marks_are_read(draw, place):
    whole = draw()
    (place / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    assert draw(said=["every image"]) == whole


def test_what_is_no_file_of_prompts_is_refused(place, folder):
    os.mkfifo("pipe")
    for path in ("nowhere", ".", "pipe", "a\0"):
        refused(place, "--prompt-file", path, "--weights", folder)


@pytest.mark.parametrize("options, message", [
    (["--images", 0], "--images: expected"), (["--seed", 2 ** 32 - 3], "seed"),
    (["-o", "x.safetensors"], "--decoder-steps: not used"), (["-o", "nowhere/x.png"], "cannot be written")])
def test_wrong_options_are_refused_before_the_work(draw, place, options, message):
    before = contents(place)
    draw(*options, said=[message], status=2)
    assert contents(place) == before


def test_weights_that_break_leave_nothing_half_written(draw, folder, place):
    broken = changed_copy(folder, place, "stage_b", lambda all: all["clf.1.bias"].fill_(float("nan")))
    assert not draw("--weights", broken, said=["Stage B: the output is not finite"], status=2)
