"""The trainer: a quick run of every stage, resumed once, gives files that the command draws with; and what wire.py
writes into a network is right."""
import io
import re
import sys
from argparse import Namespace
from contextlib import redirect_stdout

import pytest
import torch
import train_tiny
from commands import ROOT, command, contents
from wire import wire

from model import UNet
from sampler import alpha_bar


def train(folder, *stages):
    """Runs the trainer within this process -> what it prints."""
    arguments = ["train_tiny.py", *stages, "--quick", "--out", folder / "tiny", "--work", folder / "work"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", list(map(str, arguments)))
        train_tiny.main()
    return output.getvalue()


LOSSES = {"clip": "caption", "a": "mse", "encoder": "image", "b": "noise", "c": "noise", "previewer": "mse"}


@pytest.mark.slow
def test_a_quick_run_trains_every_stage_once_and_its_files_draw(tmp_path):
    output = train(tmp_path, "all")
    for stage, name in LOSSES.items():
        losses = re.findall(rf"^{stage} \d+/\d+ .*?{name} ([\d.]+)", output, re.MULTILINE)
        assert float(losses[-1]) < (0.98 if stage == "clip" else 0.9) * float(losses[0]), stage
    previews = {path.stem for path in (tmp_path / "work").glob("*.png")}
    assert previews == {"a", "encoder", "b", "c", "previewer"}
    before = contents(tmp_path / "tiny")
    assert "continues at step" in train(tmp_path, "a") and contents(tmp_path / "tiny") == before
    few = ["--steps", 2, "--decoder-steps", 2, "--weights", tmp_path / "tiny"]
    command("a red circle", *few, "-o", tmp_path / "image.png")


def test_a_cache_belongs_to_a_number_of_batches_and_to_the_content_of_a_file(tmp_path):
    options = Namespace(out=tmp_path, work=tmp_path / "work")
    batches = [train_tiny.sample_scenes(1, seed) for seed in range(3)]
    calls = []

    def network(images):
        calls.append(len(images))
        return images.mean((2, 3))  # (B, 3)

    for count, weights, computed in [
            (2, b"a", 2), (2, b"a", 0), (3, b"a", 3), (2, b"a", 0), (2, b"b", 2), (2, b"a", 0)]:
        (tmp_path / "file").write_bytes(weights)
        calls.clear()
        means = train_tiny.cached(options, "means", batches[:count], network, "file")
        assert means.shape == (count, 3) and len(calls) == computed


def test_a_quick_run_never_writes_into_the_trained_weights(monkeypatch, tmp_path, capsys):
    before = contents(ROOT / "weights" / "tiny")
    (tmp_path / "link").symlink_to(ROOT / "weights" / "tiny")
    for out in ([], ["--out", str(ROOT / "weights" / "tiny")], ["--out", str(tmp_path / "link")]):
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", "tokenizer", "--quick", *out])
        with pytest.raises(SystemExit):
            train_tiny.main()
        assert "--quick" in capsys.readouterr().err
    assert contents(ROOT / "weights" / "tiny") == before


# ------------------------------------------------------------------------------ wire.py
@pytest.mark.parametrize("config, latents, name, shape", [
    (train_tiny.STAGE_B, (4, 4, 32, 32), "effnet", (4, 16, 3, 3)),
    (train_tiny.STAGE_C, (4, 16, 3, 3), "clip_text", (4, 77, 128))], ids=["stage_b", "stage_c"])
def test_a_wired_network_predicts_x0_as_0_before_it_learns(config, latents, name, shape):
    """So eps is x / sqrt(1 - a), as far as it matters: an error counts as the error that it causes in x0."""
    torch.manual_seed(0)
    condition = {"clip_text_pooled": torch.randn(4, 1, 128), name: torch.randn(shape)}
    unet, x0 = wire(UNet(config)), torch.randn(latents)
    for t, allowed in ((1.0, 0.4), (0.95, 0.04), (0.7, 0.015), (0.4, 0.03)):
        a = alpha_bar(torch.tensor(t))
        x = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
        eps = unet(x, torch.full((4,), t), **condition)
        error = (eps - x / (1 - a).sqrt()) * ((1 - a) / a).sqrt()
        assert error.square().mean().sqrt() < allowed, t
