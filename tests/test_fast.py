"""Attention by head gives the numbers of PyTorch's kernel, and runs only where it is faster. The norm of GRN has a
gradient everywhere."""
import ctypes

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

import cascade
import model


def qkv(rows, heads, queries, keys):
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, 64) for length in (queries, keys, keys)]


# Several heads at a time, fewer in the last turn; one at a time; all at once.
SHAPES = pytest.mark.parametrize("shape", [(2, 5, 900, 1000), (1, 2, 1500, 1504), (3, 4, 9, 20)], ids=str)


@SHAPES
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_head_is_pytorchs(shape, masked):
    q, k, v = qkv(*shape)
    mask = torch.zeros(shape[0], 1, *shape[2:])
    if masked:
        mask[:, :, :, ::3] = -torch.inf
    theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert relative_error(model.attention_by_head(q, k, v, mask if masked else None), theirs) < 1e-6


@SHAPES
def test_its_bf16_is_hardly_further_from_fp32_than_pytorchs(shape):
    """It rounds the scores, which PyTorch's kernel keeps in fp32."""
    exact = F.scaled_dot_product_attention(*qkv(*shape))
    q, k, v = (x.bfloat16() for x in qkv(*shape))
    ours, theirs = (attend(q, k, v).float() for attend in (model.attention_by_head, F.scaled_dot_product_attention))
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("device, dtype, by_head", [
    ("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cpu", torch.float16, False),
    ("meta", torch.bfloat16, False), ("meta", torch.float32, False)], ids=str)
def test_attention_runs_by_head_in_bf16_on_a_cpu_only(monkeypatch, device, dtype, by_head):
    calls = []
    monkeypatch.setattr(model, "attention_by_head", lambda *args: calls.append("by head"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append("kernel"))
    model.scaled_dot_product(*(x.to(device, dtype) for x in qkv(1, 2, 3, 4)))
    assert calls == ["by head" if by_head else "kernel"]


def test_grn_learns_where_a_channel_is_zero():
    """The square root has no gradient at 0."""
    norm, x = model.GlobalResponseNorm(3), torch.randn(2, 4, 5, 3)
    x[..., 1] = 0
    x.requires_grad_()
    norm(x).sum().backward()
    assert x.grad.isfinite().all() and norm.gamma.grad.isfinite().all()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)  # it has no mallopt
    cascade.tune_process()
