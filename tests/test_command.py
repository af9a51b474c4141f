"""The command: its options by mode, the files it writes and never overwrites, its messages and exit statuses."""
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import FEW, ROOT, SMALL, command, contents, failing, refused
from PIL import Image
from safetensors.torch import save_file

import cascade

# ------------------------------------------------------------------------------ options
OTHERS = ["--seed 1", "--width 64", "--height 64", "--recipe lcm", "--images 2", "--previews .",
          "--steps 2", "--guidance 2", "--guidance-interval 0 1", "--negative blue", "--overwrite",
          "--variation-image a.png", "--init-image a.png", "--lite-prior", "--animate b.gif"]
NOT_USED = {
    "--latents a.safetensors": [*OTHERS, "--strength 0.5"], "--reconstruct a.png": OTHERS[4:],
    "--prompt-file prompts.txt": ["--previews .", "--animate b.gif"], "prompt": ["--strength 0.5", "--overwrite"],
    "prompt -o b.safetensors": ["--decoder-steps 1", "--decoder-guidance 1", "--decoder-dtype bf16",
                                "--lite-decoder", "--animate b.gif"]}
WRONG_VALUES = {
    "--steps": ["0", "-1", "2.5", "1001"], "--decoder-steps": ["0"], "--width": ["63"],
    "--height": ["9e9"], "--images": ["0", "1001"], "--seed": ["-1", "4294967296"],
    "--guidance": ["nan", "inf", "much"], "--decoder-guidance": ["-1"],
    "--guidance-interval": ["0.7 0.3"], "--strength": ["nan --init-image a.png"],
    "--variation-image": [""]}
MODES = ["", "prompt --latents a.safetensors", "--latents a.safetensors --reconstruct a.png",
         "prompt --prompt-file prompts.txt", "--prompt-file prompts.txt --latents a.safetensors"]
WRONG_COMMANDS = {
    **dict.fromkeys(MODES, "expected"),  # exactly one of them
    **{f"prompt {option} {value}": f"cascade.py: {option}: expected"
       for option, values in WRONG_VALUES.items() for value in values},
    "prompt --init-image=": "--init-image: expected", "prompt --dtype fp8": "--dtype: invalid",
    "prompt --seed 4294967295 --images 2": "seed: ", "prompt --recipe soup": "--recipe: invalid",
    "--prompt other": "unrecognized arguments: --prompt", "prompt --step 3": "unrecognized",
    "prompt --lite --lite-prior": "--lite-prior: ", "prompt --weights nowhere": "nowhere: ",
    "prompt --init-image nowhere.png": "nowhere.png: there is no such file",
    "--variation-image nowhere.png": "nowhere.png: there is no such file",
    "prompt --animate a.png": "--animate: expected a name that ends in .gif or .webp",
    "prompt --previews nowhere": "nowhere/step-001.png: ", "prompt --lite": "stage_c_lite is"}


@pytest.mark.parametrize("mode", NOT_USED)
def test_an_option_that_the_mode_does_not_use_is_refused_by_name(place, mode):
    for option in NOT_USED[mode]:
        refused([*mode.split(), *option.split()], f"cascade.py: {option.split()[0]}: ")


@pytest.mark.parametrize("arguments", WRONG_COMMANDS)
def test_wrong_options_are_refused_by_name(place, folder, arguments):
    refused(["--weights", folder, *arguments.split()], WRONG_COMMANDS[arguments])


def test_traceback_shows_the_cause(capsys):
    assert cascade.main(["prompt", "--init-image", "nowhere.png", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "FileNotFoundError" in shown and "direct cause" in shown
    assert shown.splitlines()[-1].startswith("cascade.py: nowhere.png: ")


def test_arguments_that_are_not_utf8_are_refused(place):
    for arguments in (["a\udcff"], ["a", "--negative", "\udcff"], ["a", "-o", "\udcff.png"]):
        refused(arguments, "expected arguments in UTF-8")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cascade.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "python cascade.py" in shown and "Stage C" in shown
    assert re.search(r"--height HEIGHT\s+\w+", shown)


# ------------------------------------------------------------------------------ outputs
def test_a_folder_without_permission_is_refused_before_the_work(place, folder, monkeypatch):
    monkeypatch.setattr(cascade, "draw", None)
    monkeypatch.setattr(os, "access", lambda *given: False)  # root may write everywhere
    refused(["a star", "--weights", folder], "cannot be written")


UNWRITABLE = [
    "b.jpg", "b", "", "..", ".png", "folder.png", "nowhere/b.png", "a.png/b.png", "pipe.png", "b\0.png",
    "x" * 252 + ".png", "weights/stage_c.safetensors", "weights/text_encoder/model.safetensors",
    "foreign.safetensors", "link.safetensors"]
OUTPUTS = {f"prompt --output={name}": "" for name in UNWRITABLE} | {
    "--init-image a.png -o a.png": "", "--variation-image a.png -o a.png": "",
    "--reconstruct a.png -o a.png": "", "--init-image a.png -o link.png": "",
    "--init-image b-1.png --images 2 -o b.png": "b-1.png",
    "--init-image step-002.png --previews . -o b.png": "step-002.png",
    "prompt --animate nowhere/b.gif": "nowhere/b.gif", "--init-image a.gif --animate a.gif": "a.gif",
    "prompt --previews . -o step-002.png": "step-002.png",
    "--prompt-file prompts.txt --init-image b-0.png -o b.png": "b-0.png",
    "prompt --images 2 -o taken.png": "taken-1.png"}


@pytest.mark.parametrize("options", OUTPUTS, ids=lambda options: options[:40])
def test_outputs_that_cannot_or_must_not_be_written_are_refused(weights, options, monkeypatch):
    monkeypatch.setattr(cascade, "draw", None)  # before the work
    os.symlink("weights/stage_c.safetensors", "link.safetensors")
    os.symlink("a.png", "link.png")
    os.mkfifo("pipe.png")
    for name in ("folder.png", "taken-1.png"):
        os.mkdir(name)
    save_file({"mine": torch.zeros(1)}, "foreign.safetensors")
    Path("prompts.txt").write_text("a star")
    for name in ("b-0.png", "b-1.png", "step-002.png", "a.gif"):
        shutil.copy("a.png", name)
    refused([*options.split(), "--weights", "weights", "--steps", 3], OUTPUTS[options])


def test_a_link_is_replaced_and_its_target_left_alone(place, folder):
    before = (place / "a.png").read_bytes()
    for link in ("b.png", "b.png.part"):
        os.symlink("a.png", link)
    command("a star", *FEW, "--weights", folder, "-o", "b.png")
    assert (place / "a.png").read_bytes() == before and not (place / "b.png").is_symlink()


@pytest.mark.parametrize("name", ["new.png", "a.png", "new.safetensors"])
@pytest.mark.parametrize("error, status, text", [
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "interrupted")], ids=str)
def test_a_failure_while_writing_leaves_nothing(
        place, folder, monkeypatch, name, error, status, text):
    monkeypatch.setattr(os, "replace", failing(error))
    before = contents(place)
    few = FEW if name.endswith("png") else ["--steps", 1, *SMALL]
    (line,) = command("a star", *few, "--weights", folder, "-o", name, status=status)
    assert text in line and contents(place) == before


ALLOCATOR = "DefaultCPUAllocator: {} memory: you tried to allocate 9 bytes.\nMore lines"
OUT_OF_MEMORY = [
    RuntimeError(ALLOCATOR.format("can't allocate")), RuntimeError(ALLOCATOR.format("not enough")),
    torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
@pytest.mark.parametrize("module, name", [(cascade, "sample"), (Image, "open")])
def test_out_of_memory_is_said_wherever_it_happens(place, folder, monkeypatch, error, module, name):
    monkeypatch.setattr(module, name, failing(error))
    refused(["--init-image", "a.png", *FEW, "--weights", folder], "out of memory; try --lite")


def test_another_error_of_memory_is_not_called_out_of_memory(folder, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(cascade, "sample", failing(error))
    with pytest.raises(RuntimeError, match="illegal"):
        command("a star", *FEW, "--weights", folder)


# ------------------------------------------------------------------------------ messages
def test_a_long_prompt_is_drawn_and_its_cut_is_said_once(place, folder):
    prompts = ["red " * 75 + "circle star", "green " * 99]
    few = ["--negative", "blue " * 99, "--images", 2, *FEW, "--weights", folder]
    red, green, blue = lines = command(*prompts, prompts[0], *few)
    assert all("is cut to 77 tokens" in line and len(line) < 160 for line in lines)
    assert "'red red" in red and "'circle star'" in red and "'green" in green and "'blue" in blue


def test_control_characters_in_names_are_not_printed(place, folder):
    name = "a\x1b[31m\n\u202eb"
    refused(["a star", "--weights", name], r"a\x1b[31m\n\u202eb")
    command("a\x1b[31m\nb", *FEW, "--weights", folder, "-o", f"{name}.png")


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_missing_or_broken_stream_costs_no_image(place, folder, monkeypatch):
    for name, stream in (("b.png", None), ("c.png", Broken())):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        arguments = ["--reconstruct", "a.png", *FEW[2:], "--weights", str(folder), "-o", name]
        assert cascade.main([*arguments, "--device", "cpu"]) == 0
        assert Image.open(name).size == (64, 64)


# ------------------------------------------------------------------------------ the process
def start(*arguments):
    program = [sys.executable, ROOT / "cascade.py", *map(str, arguments), "--device", "cpu"]
    return subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
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
    both = [start(prompt, *FEW, "--weights", folder, "-o", "b.png") for prompt in ("a", "b")]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    with Image.open("b.png") as image:
        image.load()
        assert image.text["prompts"] in ("a", "b")
    assert sorted(os.listdir()) == ["a.png", "b.png"]
