"""What is done for speed and memory changes no number: strips, heads apart, and what the command asks of the system."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from precision import inputs
from test_official import on_meta
from tiny import STAGE_A, STAGE_B, STAGE_C, randomise

import cascade
import model
import operators
from sampler import RECIPES, generators, sample

ROOT = Path(__file__).resolve().parent.parent


def heads(B, count, T, seen):
    torch.manual_seed(0)
    return [torch.randn(B, count, rows, 64) for rows in (T, seen, seen)]


# B, heads, T, T': a few heads at a time, the last fewer; one at a time; all at once
SHAPES = pytest.mark.parametrize("shape", [(2, 5, 900, 1000), (1, 2, 1500, 1504), (3, 4, 9, 20)], ids=str)


@SHAPES
def test_attention_head_by_head_is_pytorchs(shape):
    q, k, v = heads(*shape)
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert (model.by_head(q, k, v) - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_attention_head_by_head_takes_a_mask():
    q, k, v = heads(2, 5, 1000, 1000)
    visible = torch.ones(1000, 1000).tril().bool() & (torch.arange(1000) % 3 > 0) | torch.eye(1000).bool()
    mask = torch.where(visible.expand(2, 1, -1, -1), 0.0, -torch.inf)
    theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert (model.by_head(q, k, v, mask) - theirs).abs().max() < 1e-6 * theirs.abs().max()


@SHAPES
def test_its_bf16_is_hardly_further_from_fp32_than_pytorchs(shape):
    """It rounds the scores, which PyTorch's kernel keeps in fp32."""
    exact = F.scaled_dot_product_attention(*heads(*shape))
    q, k, v = (x.bfloat16() for x in heads(*shape))
    ours, theirs = (f(q, k, v).float() for f in (model.by_head, F.scaled_dot_product_attention))
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_only_the_cpu_takes_the_heads_apart(monkeypatch):
    asked = []
    for name in ("cpu", "meta"):
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: asked.append(given[0].device.type))
        model.attention(*(x.to(name) for x in heads(1, 2, 3, 4)))
    assert asked == ["meta"]


@torch.no_grad()
@pytest.mark.parametrize("strip", [1, 12, 40, 41])
def test_stage_a_in_strips_gives_the_pixels_of_stage_a_whole(monkeypatch, strip):
    stage_a = randomise(model.StageA(STAGE_A), 0)
    z, image = torch.randn(2, 4, 11, 10), torch.rand(2, 3, 44, 40)
    monkeypatch.setattr(model, "STRIP", 10**9)
    pixels, latent = stage_a.decode(z), stage_a.encode(image)
    monkeypatch.setattr(model, "STRIP", strip)
    assert (stage_a.decode(z) - pixels).abs().max() < 1e-6 * pixels.abs().max()
    assert (stage_a.encode(image) - latent).abs().max() < 1e-6 * latent.abs().max()


@torch.inference_mode()
def test_stage_a_draws_2048_pixels_a_side_within_what_readme_says():
    record, stage_a = operators.Record(), on_meta("stage_a").bfloat16().eval()
    record.held |= {tensor.untyped_storage()._cdata: 1 for tensor in stage_a.state_dict().values()}
    with record:
        stage_a.decode(torch.empty(1, 4, 512, 512, dtype=torch.bfloat16, device="meta"))
    assert record.peak < 1.25e9
    assert "1.2 GB of activations" in " ".join((ROOT / "README.md").read_text("utf-8").split())


@torch.no_grad()
@pytest.mark.parametrize("config", [STAGE_B, STAGE_C], ids=["B", "C"])
def test_a_prepared_condition_gives_the_same_bits_and_asks_for_the_text_no_more(config):
    unet, given = randomise(model.UNet(config), 0), inputs(config, 0)
    x, r = given.pop("x"), given.pop("r")
    answer, prepared = unet(x, r, **given), unet.prepare(**given)
    assert set(prepared) == {"cond"} | set(given) - {"clip_text_pooled", "clip_text", "clip_img"}
    unet.clip_norm = unet.clip_mapper = unet.clip_txt_mapper = None  # whoever asks fails
    assert torch.equal(unet(x, r, **prepared), answer) and torch.equal(unet(x, r, **prepared), answer)


def test_the_sampler_prepares_once_with_guidance_and_once_without(monkeypatch):
    unet, rows, real = randomise(model.UNet(STAGE_C), 0), [], model.UNet.prepare
    condition = {name: value[:4] for name, value in inputs(STAGE_C, 0, rows=4).items() if name.startswith("clip")}
    monkeypatch.setattr(
        model.UNet, "prepare", lambda self, **given: rows.append(len(given["clip_text"])) or real(self, **given)
    )
    recipe = replace(RECIPES["diffusers"], interval=(0.3, 0.8))
    with torch.no_grad():
        list(sample(unet, (16, 3, 3), condition, 8, 4.0, generators(0, 2), recipe))
    assert rows == [2, 4]


def test_grn_learns_where_a_channel_is_silent():
    """The root of 0 has no slope."""
    norm, x = model.GlobalResponseNorm(3), torch.randn(2, 4, 5, 3)
    x[..., 1] = 0
    x.requires_grad_()
    norm(x).sum().backward()
    assert x.grad.isfinite().all() and norm.gamma.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ the process


def test_the_command_keeps_its_memory(tmp_path):
    """A large piece that is freed comes back without a page fault. In a process of its own, which is changed for good."""
    code = """
import ctypes, resource, torch, cascade
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(50_000_000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before, _ = faults(), cascade.quicken()
faults()
print(before, faults(), getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-3, 2**30))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    before, after, heeded = map(int, run.stdout.split())
    if not heeded:
        pytest.skip("not glibc, or one that does not keep so much")
    assert after < before / 10


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def other(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", other)
    monkeypatch.setattr(cascade.gc, "freeze", lambda: None)
    cascade.quicken()
