"""A file of prompts: each image is that of a single run, and what exists already is not drawn again."""
import os
import subprocess
import sys

import pytest
import torch
from commands import FEW, ROOT, change_tensors, command, count_networks, refused

import cascade
from cascade import Cascade

LINES = "a red circle\n\n  two stars \na st\u00e4r"  # line 2 is blank: images 0, 2 and 3
DRAWN = {0: "a red circle", 2: "two stars", 3: "a st\u00e4r"}


@pytest.fixture
def draw(place, folder):
    """Draws the file of prompts, or the given prompt; returns {name: bytes} of all images."""
    def run(*arguments, prompt=None, said=(), status=0):
        what = [prompt] if prompt else ["--prompt-file", "prompts.txt"]
        drawing = [*what, "-o", "x.png", "--weights", folder, *FEW, "--seed", 5, *arguments]
        lines = command(*drawing, status=status)
        assert len(lines) == len(said), lines
        assert all(text in line for text, line in zip(said, lines)), lines
        return images(place)

    (place / "prompts.txt").write_text(LINES, encoding="utf-8")
    return run


def images(place):
    return {path.name: path.read_bytes() for path in sorted(place.glob("x*.png"))}


# ------------------------------------------------------------------------------ the same images
@pytest.mark.parametrize("options", [
    "--negative blue", "--init-image a.png --variation-image a.png"])
def test_every_image_is_that_of_a_single_run_to_the_byte(draw, options):
    drawn = draw(*options.split())
    assert list(drawn) == [f"x-{i}.png" for i in DRAWN]
    for i, prompt in DRAWN.items():
        alone = draw(*options.split(), "--seed", 5 + i, prompt=prompt)
        assert drawn[f"x-{i}.png"] == alone["x.png"]


def test_with_several_images_per_line_numbers_and_seeds_run_through(draw):
    drawn = draw("--images", 2)
    assert list(drawn) == [f"x-{i}.png" for i in (0, 1, 4, 5, 6, 7)]
    pair = draw("--images", 2, "--seed", 9, prompt="two stars")
    assert [pair["x-0.png"], pair["x-1.png"]] == [drawn["x-4.png"], drawn["x-5.png"]]


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
def test_two_processes_of_torchrun_draw_what_one_draws_to_the_byte(draw, place, folder):
    drawn = draw("--decoder-guidance", 1.5)
    for name in drawn:
        os.remove(name)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               ROOT / "cascade.py", "--prompt-file", "prompts.txt", "-o", "x.png", *FEW, "--seed", 5,
               "--weights", folder, "--decoder-guidance", 1.5, "--device", "cpu"]
    subprocess.run(list(map(str, program)), check=True)
    assert images(place) == drawn


def test_processes_share_the_lines_without_overlap(draw, place, monkeypatch):
    (place / "prompts.txt").write_text("\n".join("abcdefg"))
    jobs = []
    monkeypatch.setattr(cascade, "draw", lambda options, cascade, share: jobs.extend(share))
    monkeypatch.setenv("WORLD_SIZE", "3")
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
    assert not draw(said=["RANK"], status=2)


def test_only_the_first_process_draws_a_plain_prompt(draw, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not draw(prompt="a star", said=["RANK=1: "], status=2)
    monkeypatch.setenv("RANK", "0")
    assert list(draw(prompt="a star")) == ["x.png"]


def test_each_process_has_a_gpu_of_its_own(draw, folder, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "93")):
        monkeypatch.setenv(name, value)
    few = ["--weights", str(folder), "--device", "cuda"]
    assert cascade.main(["--prompt-file", "prompts.txt", *few]) == 2
    assert "cuda:93" in capsys.readouterr().err


# ------------------------------------------------------------------------------ starting again
def test_interrupted_it_leaves_whole_images_and_goes_on_with_the_rest(draw, monkeypatch):
    seeds, decode = [], Cascade.decode

    def stopping(*given, seed, **named):
        seeds.append(seed)
        if seeds == [5, 7]:
            raise KeyboardInterrupt
        return decode(*given, seed=seed, **named)

    monkeypatch.setattr(Cascade, "decode", stopping)
    first, whole = draw(said=["interrupted"], status=130), draw()
    assert list(first) == ["x-0.png"] and first["x-0.png"] == whole["x-0.png"]
    assert list(whole) == [f"x-{i}.png" for i in DRAWN] and seeds == [5, 7, 7, 8]
    counts = count_networks(monkeypatch)
    assert draw(said=["prompts.txt"]) == whole and counts == []  # every image exists


FOREIGN = {"other bytes": lambda data: b"mine", "no bytes": lambda data: b"",
    "a cut image": lambda data: data[:len(data) // 2],
    "an image without a record": lambda data: data.replace(b"iTXt", b"teXt")}


def test_what_is_not_this_runs_image_stops_it_unless_overwriting_is_asked_for(draw, place):
    whole = draw()
    for fault, change in FOREIGN.items():
        (place / "x-2.png").write_bytes(change(whole["x-2.png"]))
        before = images(place)
        assert draw(said=["x-2.png: exists"], status=2) == before, fault
    assert draw("--overwrite") == whole
    for change in ["--steps", 3], ["--negative", "blue"], ["--seed", 6], ["--dtype", "bf16"]:
        assert draw(*change, said=["x-0.png: exists"], status=2) == whole


# ------------------------------------------------------------------------------ faults
def test_prompts_are_read_as_utf8_with_any_line_ends_or_refused(draw, place):
    whole = draw()
    (place / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    assert draw(said=["prompts.txt"]) == whole  # every image exists
    utf16 = ["a\nb".encode(encoding) for encoding in ("utf-16", "utf-16-le")]
    for data in [b"", b" \n\t\r\n", b"st\xe4r", b"a\0b", *utf16]:
        (place / "prompts.txt").write_bytes(data)
        assert draw(said=["prompts.txt: expected"], status=2) == whole


@pytest.mark.parametrize("options, text", [
    ("--images 0", "--images: expected"), ("--seed 4294967293", "seed"), ("-o x.safetensors", "--"),
    ("-o nowhere/x.png", "cannot be written"), ("--prompt-file nowhere", "nowhere"),
    ("--prompt-file .", "expected"), ("--prompt-file pipe", "pipe"), ("--prompt-file a\0", "a")])
def test_wrong_options_are_refused_before_the_work(draw, folder, options, text):
    os.mkfifo("pipe")
    refused(["--prompt-file", "prompts.txt", "--weights", folder, *options.split()], text)


def test_weights_that_break_leave_nothing_half_written(draw, weights):
    change_tensors(weights, "stage_b", lambda tensors: tensors["clf.1.bias"].fill_(torch.nan))
    assert not draw("--weights", weights, said=["stage_b.safetensors"], status=2)
