"""The trainer trains: a quick run of every stage, resumed once, gives files that the command draws with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def train(folder, *stages):
    command = [
        sys.executable,
        ROOT / "weights" / "train_tiny.py",
        *stages,
        "--quick",
        "--out",
        folder / "tiny",
        "--work",
        folder / "work",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return folder, train(folder, "all")


@pytest.mark.parametrize("stage, loss", [("a", "mse"), ("encoder", "picture"), ("b", "noise"), ("c", "noise")])
def test_the_loss_of_every_stage_falls(trained, stage, loss):
    falls = [float(value) for value in re.findall(rf"^{stage} \d+/\d+ .*?{loss} ([\d.]+)", trained[1], re.MULTILINE)]
    assert falls[-1] < 0.9 * falls[0], falls


def test_a_finished_stage_is_not_trained_again_and_gives_the_same_file(trained):
    folder, _ = trained
    before = (folder / "tiny" / "stage_a.safetensors").read_bytes()
    assert "continues at step" in train(folder, "a")
    assert (folder / "tiny" / "stage_a.safetensors").read_bytes() == before


def test_the_command_draws_with_what_was_trained(trained):
    folder, _ = trained
    picture = folder / "picture.png"
    subprocess.run(
        [
            sys.executable,
            ROOT / "cascade.py",
            "a red circle",
            "--weights",
            folder / "tiny",
            "-o",
            picture,
            "--steps",
            "2",
            "--decoder-steps",
            "2",
        ],
        capture_output=True,
        check=True,
    )
    assert picture.stat().st_size > 1000
