"""The command: its options by mode, the files it writes and never overwrites, its messages and exit statuses."""
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from commands import FEW, ROOT, SMALL, command, contents, refused
from PIL import Image
from safetensors.torch import save_file

import cascade

OTHERS = ["--seed 1", "--width 64", "--height 64", "--recipe lcm", "--images 2", "--previews .",
          "--steps 2", "--guidance 2", "--guidance-interval 0 1", "--negative blue", "--overwrite",
          "--variation-image a.png", "--init-image a.png", "--lite-prior"]
REFUSED = {
    "--latents a.safetensors": [*OTHERS, "--strength 0.5"], "--reconstruct a.png": OTHERS[4:],
    "--prompt-file prompts.txt": ["--previews ."], "prompt": ["--strength 0.5", "--overwrite"],
    "prompt -o b.safetensors": ["--decoder-steps 1", "--decoder-guidance 1", "--decoder-dtype bf16",
                                "--lite-decoder"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with an image, latents and prompts in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("a.png")
    save_file({"latents": torch.zeros(1, 16, 2, 2)}, "a.safetensors", {"cascade": "{}"})
    (tmp_path / "prompts.txt").write_text("a star")
    return tmp_path


# ------------------------------------------------------------------------------ options
@pytest.mark.parametrize("mode", REFUSED)
def test_an_option_that_the_mode_does_not_use_is_refused_by_name(place, mode):
    for option in REFUSED[mode]:
        line = refused(place, *mode.split(), *option.split())
        assert line.startswith(f"cascade.py: {option.split()[0]}: "), line


@pytest.mark.parametrize("options", [
    "", "prompt --latents a.safetensors", "--latents a.safetensors --reconstruct a.png",
    "prompt --prompt-file prompts.txt", "--prompt-file prompts.txt --latents a.safetensors"])
def test_exactly_one_mode_is_expected(place, options):
    assert "expected one of: prompts, --prompt-file, --latents" in refused(place, *options.split())


@pytest.mark.parametrize("options, message", [
    ("--steps 0", "--steps: expected an integer from 1 to 1000, got 0"),
    ("--steps -1", "--steps: expected an integer from 1 to 1000, got -1"),
    ("--steps 2.5", "--steps: expected an integer from 1 to 1000, got 2.5"),
    ("--steps 1001", "--steps: expected an integer"), ("--decoder-steps 0", "--decoder-steps: expected an"),
    ("--width 63", "--width: expected an integer from 64 to 8192, got 63"),
    ("--height 9e9", "--height: expected an integer"),
    ("--images 0", "--images: expected"), ("--images 1001", "--images: expected"),
    ("--seed -1", "--seed: expected an integer from 0 to 4294967295, got -1"),
    ("--seed 4294967296", "--seed: expected"), ("--seed 4294967295 --images 2", "seed: 2 images"),
    ("--guidance nan", "--guidance: expected"), ("--guidance inf", "--guidance: expected"),
    ("--guidance much", "--guidance: expected a number from 0.0 to 100.0, got much"),
    ("--decoder-guidance -1", "--decoder-guidance: expected a number"),
    ("--guidance-interval 0.7 0.3", "--guidance-interval: expected two times from 0 to 1"),
    ("--strength nan --init-image a.png", "--strength: expected a number"),
    ("--dtype fp8", "--dtype: invalid choice"), ("--recipe soup", "--recipe: invalid choice"),
    ("--variation-image", "--variation-image: expected one argument"),
    ("--prompt other", "unrecognized arguments: --prompt"), ("--step 3", "unrecognized arguments"),
    ("--lite --lite-prior", "--lite-prior: not allowed"), ("--init-image=", "--init-image: expected"),
    ("--weights nowhere", "nowhere: this folder cannot be opened"),
    ("--init-image nowhere.png", "nowhere.png: there is no such file"),
    ("--variation-image nowhere.png", "nowhere.png: there is no such file"),
    ("--previews nowhere", "nowhere/step-001.png: cannot be written"),
    ("--lite", "stage_c_lite is missing")])
def test_a_wrong_option_is_refused_by_name(place, folder, options, message):
    assert message in refused(place, "prompt", "--weights", folder, *options.split())


def test_traceback_shows_the_cause(capsys):
    assert cascade.main(["prompt", "--init-image", "nowhere.png", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "FileNotFoundError" in shown and "direct cause" in shown
    assert shown.splitlines()[-1] == "cascade.py: nowhere.png: there is no such file"


def test_arguments_that_are_not_utf8_are_refused(place):
    for arguments in ["a\udcff"], ["prompt", "--negative", "\udcff"], ["prompt", "-o", "\udcff.png"]:
        assert "expected arguments in UTF-8" in refused(place, *arguments)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cascade.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "python cascade.py" in shown and "Stage C" in shown
    assert re.search(r"--height HEIGHT\s+\w+", shown)


# ------------------------------------------------------------------------------ outputs
@pytest.mark.parametrize("name", [
    "a.jpg", "a", "", "..", ".png", "folder.png", "nowhere/b.png", "a.png/b.png", "pipe.png", "a\0.png",
    "x" * 252 + ".png"], ids=lambda name: name[:9])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(place, folder, name, monkeypatch):
    monkeypatch.setattr(cascade, "draw", None)
    os.mkdir("folder.png")
    os.mkfifo("pipe.png")
    refused(place, "a star", "--weights", folder, "-o", name)


@pytest.mark.parametrize("options", [
    "--init-image a.png -o a.png", "--variation-image a.png -o a.png", "--reconstruct a.png -o a.png",
    "--init-image a.png -o link.png", "--init-image b-1.png --images 2 -o b.png",
    "--init-image step-002.png --previews . -o b.png", "prompt --previews . -o step-003.png",
    "--prompt-file prompts.txt --init-image b-0.png -o b.png", "prompt -o weights/stage_c.safetensors",
    "prompt -o weights/text_encoder/model.safetensors", "prompt -o foreign.safetensors",
    "prompt -o weights.safetensors", "prompt --images 2 -o taken.png"])
def test_inputs_and_weights_are_never_overwritten(place, folder, options, monkeypatch):
    monkeypatch.setattr(cascade, "draw", None)
    shutil.copytree(folder, "weights")
    os.symlink("weights/stage_c.safetensors", "weights.safetensors")
    os.symlink("a.png", "link.png")
    os.mkdir("taken-1.png")
    save_file({"mine": torch.zeros(1)}, "foreign.safetensors")
    for name in ("b-0.png", "b-1.png", "step-002.png"):
        shutil.copy("a.png", name)
    refused(place, *options.split(), "--weights", "weights", "--steps", 3)


def test_a_folder_without_permission_is_refused_before_the_work(place, folder, monkeypatch):
    monkeypatch.setattr(cascade, "draw", None)
    monkeypatch.setattr(os, "access", lambda *given: False)  # root may write everywhere
    assert "cannot be written" in refused(place, "a star", "--weights", folder)


def test_a_link_is_replaced_and_its_target_left_alone(place, folder):
    (place / "target.png").write_bytes(b"mine")
    os.symlink("target.png", "b.png")
    os.symlink("a.png", "b.png.part")
    before = (place / "a.png").read_bytes()
    command("a star", *FEW, "--weights", folder, "-o", "b.png")
    assert (place / "target.png").read_bytes() == b"mine" and not (place / "b.png").is_symlink()
    assert (place / "a.png").read_bytes() == before


def failing(error):
    def fail(*given, **named):
        raise error
    return fail


@pytest.mark.parametrize("name", ["new.png", "a.png", "new.safetensors"])
@pytest.mark.parametrize("error, status", [
    (OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt(), 130)], ids=str)
def test_a_failure_while_writing_leaves_nothing_behind(place, folder, monkeypatch, name, error, status):
    monkeypatch.setattr(os, "replace", failing(error))
    before = contents(place)
    few = FEW if name.endswith("png") else ["--steps", 1, *SMALL]
    (line,) = command("a star", *few, "--weights", folder, "-o", name, status=status)
    assert contents(place) == before
    assert ("No space left" if status == 2 else "interrupted") in line


ALLOCATOR = "DefaultCPUAllocator: {} memory: you tried to allocate 9 bytes.\nMore lines"
OUT_OF_MEMORY = [
    RuntimeError(ALLOCATOR.format("can't allocate")), RuntimeError(ALLOCATOR.format("not enough")),
    torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
@pytest.mark.parametrize("module, name", [(cascade, "sample"), (Image, "open")])
def test_out_of_memory_is_said_wherever_it_happens(place, folder, monkeypatch, error, module, name):
    monkeypatch.setattr(module, name, failing(error))
    line = refused(place, "--init-image", "a.png", *FEW[2:], "--weights", folder)
    assert "out of memory; try --lite" in line


def test_another_error_of_memory_is_not_called_out_of_memory(folder, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(cascade, "sample", failing(error))
    with pytest.raises(RuntimeError, match="illegal"):
        command("a star", *FEW, "--weights", folder)


# ------------------------------------------------------------------------------ messages
def test_a_long_prompt_is_drawn_and_its_cut_is_said_once(place, folder):
    prompts = ["red " * 75 + "circle star", "green " * 99]
    few = ["--negative", "blue " * 99, "--images", 2, *FEW, "--weights", folder]
    lines = command(*prompts, prompts[0], *few)
    assert len(lines) == 3 and all("is cut to 77 tokens" in line for line in lines)
    assert "'red red" in lines[0] and "'circle star'" in lines[0]
    assert "'green" in lines[1] and "'blue" in lines[2] and max(map(len, lines)) < 160


def test_warnings_and_their_filters_are_left_as_they_were(place, folder):
    filters, show = warnings.filters[:], warnings.showwarning
    command("a star", *FEW, "--weights", folder)
    assert warnings.filters == filters and warnings.showwarning == show


def test_control_characters_in_names_are_not_printed(place, folder):
    name = "a\x1b[31m\n\u202eb"
    line = refused(place, "a star", "--weights", name)
    assert r"a\x1b[31m\n\u202eb" in line
    command("a\x1b[31m\nb", *FEW, "--weights", folder, "-o", f"{name}.png")


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Broken()], ids=["none", "broken"])
def test_a_missing_or_broken_stream_costs_no_image(place, folder, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    arguments = ["--reconstruct", "a.png", *FEW[2:], "--weights", str(folder), "-o", "b.png"]
    assert cascade.main([*arguments, "--device", "cpu"]) == 0
    assert Image.open("b.png").size == (64, 64)


# ------------------------------------------------------------------------------ the process
def start(*arguments):
    program = [sys.executable, ROOT / "cascade.py", *map(str, arguments), "--device", "cpu"]
    return subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_shell_sees_one_line_and_exit_status_2(place):
    process = start("a red circle", "--weights", "nowhere")
    out, error = process.communicate()
    assert process.returncode == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("cascade.py: nowhere: ")


@pytest.mark.slow
@pytest.mark.parametrize("number, status, word", [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")], ids=["INT", "TERM"])
def test_a_signal_ends_the_run_in_one_line_and_leaves_nothing(place, folder, number, status, word):
    before = contents(place)
    process = start("a star", "--steps", 1000, "--weights", folder, "-o", "b.png")
    shown = ""
    while "Stage C" not in shown:
        shown += process.stderr.read(1)
        assert process.poll() is None, shown
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status and "Traceback" not in error
    assert error.splitlines()[-1] == f"cascade.py: {word}" and contents(place) == before


@pytest.mark.slow
def test_two_processes_that_write_one_file_leave_one_whole_image(place, folder):
    both = [start(prompt, *SMALL, "--weights", folder, "-o", "b.png") for prompt in ("a", "b")]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    with Image.open("b.png") as image:
        image.load()
        assert image.text["prompts"] in ("a", "b")
    assert sorted(os.listdir()) == ["a.png", "a.safetensors", "b.png", "prompts.txt"]
