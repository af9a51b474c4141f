"""A correct port passes, an error in one block is named, and the tool itself needs no PyTorch."""
import json
import subprocess
import sys

import compare
import golden
import numpy as np
import pytest
import torch
from golden import GOLDEN
from helpers import ROOT, slow_except
from safetensors.numpy import save_file
from torch import nn

import model

FILES = sorted([*golden.CONFIGS, "tiny"])


def golden_trace(name):
    return compare.Trace(GOLDEN / f"{name}.safetensors")


def first_wrong(results):
    return next((result.name for result in results if result.wrong), None)


# ------------------------------------------------------------------------------ what is right

@pytest.mark.parametrize("kind", slow_except(["fp64", "avx2", "default", "bf16", "fp16"], "fp64"))
def test_a_correct_run_passes(kind, tmp_path):
    """On another instruction set, without vector instructions, in double precision, and in bf16 and fp16."""
    golden.run(kind, GOLDEN, tmp_path)
    number_format = kind if kind in golden.RUNS else "fp32"
    for name in FILES:
        results = compare.compare(golden_trace(name), compare.Trace(tmp_path / f"{name}.safetensors"), number_format)
        assert first_wrong(results) is None and len(results) > 2, name


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "stage_a", "text_encoder"])
def test_a_block_alone_passes_with_the_traces_inputs(name):
    block = golden.torch_block({name: golden.stored_network(name)[0]})
    results = compare.teacher_force(golden_trace(name), block)
    assert first_wrong(results) is None and len(results) > 5


# ------------------------------------------------------------------------------ ten errors

def tanh_gelu(block):
    block.channelwise[1] = nn.GELU(approximate="tanh")


def grn_epsilon(block):
    """Added to the quotient, not to the mean."""
    def forward(x):
        norm = x.square().sum((1, 2), keepdim=True).sqrt()
        return grn.gamma * x * (norm / norm.mean(-1, keepdim=True) + 1e-6) + grn.beta + x
    grn = block.channelwise[2]
    grn.forward = forward


def skip_first(block):
    def forward(x, t_emb, cond, skip):
        return x + block.channelwise(torch.cat([skip, block.norm(block.depthwise(x))], dim=-1))
    block.forward = forward


def swapped_halves(tensor, parts, *order):
    pieces = tensor.chunk(parts)
    tensor.copy_(torch.cat([pieces[i] for i in order]))


def queries_and_keys(block):
    swapped_halves(block.attention.attn.in_proj_weight, 3, 1, 0, 2)


def layer_norm_epsilon(block):
    block.norm.eps = 1e-5


def half_pixels(x, size):
    return nn.functional.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


def zero_padding(block):
    def pad(x):
        return nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    block.depthwise[0].forward = pad


def scale_and_shift(block):
    swapped_halves(block.mapper.weight, 2, 1, 0)
    swapped_halves(block.mapper.bias, 2, 1, 0)


def no_silu(block):
    block.kv_mapper[0] = nn.Identity()


def cosines_first(network):
    embed_time = network.embed_time
    network.embed_time = lambda *times: embed_time(*times).unflatten(1, (-1, 2, 32)).flip(2).flatten(1)


@pytest.mark.parametrize("error, where", [
    (tanh_gelu, "stage_c.down_blocks.0.0"), (grn_epsilon, "stage_c.up_blocks.1.0"),
    (skip_first, "stage_c.up_blocks.1.0"), (queries_and_keys, "stage_b.down_blocks.1.2"),
    (layer_norm_epsilon, "stage_b.up_blocks.0.0"), (half_pixels, "stage_b.effnet_mapper.in"),
    (zero_padding, "stage_a.up_blocks.3"), (scale_and_shift, "stage_b.up_blocks.1.1"),
    (no_silu, "stage_c.down_blocks.0.2"), (cosines_first, "stage_c.embed_time")], ids=lambda value: getattr(value, "__name__", ""))
def test_the_block_with_an_error_is_named_first(error, where, monkeypatch):
    name, path = where.split(".", 1)
    network, inputs = golden.stored_network(name)
    if error is half_pixels:
        monkeypatch.setattr(model, "resize", half_pixels)
    else:
        error(network.get_submodule(path) if "_blocks" in path else network)
    recorded, _ = golden.record_network(name, network, inputs, torch.float32)
    other = {key: tensor.numpy() for key, tensor in recorded.tensors.items()}
    results = compare.compare(golden_trace(name), other)
    assert first_wrong(results) == (where if where.endswith(".in") else f"{where}.out")
