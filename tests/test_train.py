"""The trainer trains: a quick run of every stage, resumed once, gives files that the command draws with. What it shows
the networks is never held out, and what it wires into them is right and stays."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny
from wire import wire

from model import UNet
from sampler import alpha_bar

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


STAGES = [
    ("clip", "caption"),
    ("a", "mse"),
    ("encoder", "picture"),
    ("b", "noise"),
    ("c", "noise"),
    ("previewer", "mse"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return folder, train(folder, "all")


@pytest.mark.parametrize("stage, loss", STAGES)
def test_the_loss_of_every_stage_falls(trained, stage, loss):
    falls = [float(value) for value in re.findall(rf"^{stage} \d+/\d+ .*?{loss} ([\d.]+)", trained[1], re.MULTILINE)]
    assert falls[-1] < (0.98 if stage == "clip" else 0.9) * falls[0], falls


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


def test_every_stage_but_the_towers_leaves_pictures_of_what_it_learned(trained):
    work = trained[0] / "work"
    assert {path.stem for path in work.glob("*.png")} == {"a", "encoder", "b", "previewer"}


# ------------------------------------------------------------------------------------------------ what is wired

UNETS = {"b": train_tiny.STAGE_B, "c": train_tiny.STAGE_C}


def wired(name):
    torch.manual_seed(0)
    x0 = torch.randn(4, *((4, 32, 32) if name == "b" else (16, 3, 3)))
    given = {"effnet": torch.randn(4, 16, 3, 3)} if name == "b" else {"clip_text": torch.randn(4, 77, 128)}
    return wire(UNet(UNETS[name])), x0, {"clip_text_pooled": torch.randn(4, 1, 128), **given}


@pytest.mark.parametrize("name", UNETS)
def test_a_wired_network_takes_all_for_noise_before_it_learns(name):
    """So its epsilon is x / sqrt(1 - a), to what matters: an error counts as the error that it makes in x0."""
    unet, x0, given = wired(name)
    for t, allowed in ((1.0, 0.4), (0.95, 0.04), (0.7, 0.015), (0.4, 0.03)):
        a, noise = alpha_bar(torch.tensor(t)), torch.randn_like(x0)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with torch.no_grad():
            epsilon = unet(x, torch.full((4,), t), **given)
        error = (epsilon - x / (1 - a).sqrt()) * ((1 - a) / a).sqrt()
        assert error.square().mean().sqrt() < allowed, t


@pytest.mark.parametrize("name", UNETS)
def test_what_is_wired_stays_and_the_rest_learns(name):
    unet, x0, given = wired(name)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    optimizers = train_tiny.muon(unet, 2e-3)
    for _ in range(3):
        unet.zero_grad()
        sum(train_tiny.noise_loss(unet, x0, **given).values()).backward()
        for optimizer in optimizers:
            optimizer.step()
    after = {key: value for key, value in unet.state_dict().items() if value.dim() > 1}
    moved = {key: (value != before[key]).flatten(1).any(1) for key, value in after.items()}
    c, k = unet.config.widths[0], 16
    held = np.r_[:k, 2 * k : 2 * k + 4]
    last = len(unet.up_blocks) - 1
    ends = [f"{block}.0.channelwise.4.weight" for block in (f"up_blocks.{last}", "down_blocks.0")]
    for key in ("embedding.1.weight", *ends):
        assert moved[key].sum() == c - len(held) and not moved[key][held].any(), key
    assert not moved["clf.1.weight"].any() and not moved[f"up_blocks.{last}.0.channelwise.0.weight"][: 2 * k].any()
    assert sum(rows.sum() for rows in moved.values()) > 0.9 * sum(len(rows) for rows in moved.values())
