"""A correct port passes, an error in one block is named, and the tool itself needs no PyTorch."""
import json
import math
import os
import re
import subprocess
import sys

import compare
import golden
import numpy as np
import pytest
import torch
from compare import first_wrong
from golden import GOLDEN
from helpers import ROOT
from pages import PORTING_PAGE, with_section
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn
from trace import MANIFEST

import model

FILES = sorted([*golden.CONFIGS, "tiny"])


def golden_trace(name):
    return compare.Trace(GOLDEN / f"{name}.safetensors")


# ------------------------------------------------------------------------------ what is right

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp64", "avx2", "default", "bf16", "fp16"])
def test_a_correct_run_passes(kind, tmp_path):
    """On another instruction set, without vector instructions, in double precision, and in bf16 and fp16."""
    golden.run(kind, GOLDEN, tmp_path)
    number_format = kind if kind in golden.RUNS else "fp32"
    for name in FILES:
        other = compare.Trace(tmp_path / f"{name}.safetensors")
        results = compare.compare(golden_trace(name), other, number_format)
        assert first_wrong(results) is None and len(results) > 2, name


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "stage_a", "text_encoder"])
def test_a_block_alone_passes_with_the_traces_inputs(name):
    block = golden.torch_block({name: golden.stored_network(name)[0]})
    results = compare.teacher_force(golden_trace(name), block)
    assert first_wrong(results) is None and len(results) > 4


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
    (no_silu, "stage_c.down_blocks.0.2"), (cosines_first, "stage_c.embed_time")])
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
    assert first_wrong(results).name == (where if where.endswith(".in") else f"{where}.out")


# ------------------------------------------------------------------------------ the command

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*arguments):
    """trace.py --compare where PyTorch cannot be imported: exit status and lines."""
    script = ROOT / "tests" / "porting" / "trace.py"
    call = [sys.executable, "-c", WITHOUT_TORCH, str(script), "--compare", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def other(tmp_path):
    """Part of stage_c.safetensors, with an error in one block."""
    stored = golden_trace("stage_c")
    tensors = {name: np.array(stored[name]) for name in stored.graph if "up_blocks" not in name}
    tensors["stage_c.down_blocks.1.1.out"] = 1.01 * tensors["stage_c.down_blocks.1.1.out"]
    save_file(tensors | {"mine": np.zeros(1)}, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_the_last_line_names_the_first_wrong_block(other):
    status, lines = command(GOLDEN / "stage_c.safetensors", other)
    wrong = "first wrong block: stage_c.down_blocks.1.1.out (TimestepBlock): "
    assert status == 1 and lines[-1].startswith(wrong)
    assert "1 unknown to the trace" in lines[0] and "stage_c.up_blocks.*.*.out (" in lines[1]


def test_json_holds_every_measure(other, capsys):
    assert compare.main([str(GOLDEN / "stage_c.safetensors"), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first_wrong"] == "stage_c.down_blocks.1.1.out" and found["unknown"] == ["mine"]
    wrong, = [tensor for tensor in found["tensors"] if tensor["growth"] > tensor["limit"]]
    assert wrong["error"] == pytest.approx(0.01, rel=0.1)
    assert wrong["snr"] == pytest.approx(40, abs=1) and wrong["pcc"] > 0.9999


def test_a_pipe_that_closes_is_no_error(other):
    script = ROOT / "tests" / "porting" / "compare.py"
    line = f"{sys.executable} {script} {GOLDEN / 'stage_c.safetensors'} {other} --json | head -c 9"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert not done.stderr and len(done.stdout) == 9


@pytest.mark.parametrize("change, note", [
    (lambda x: x * np.nan, "not finite"),
    (lambda x: x.transpose(0, 3, 1, 2), "is one channels-first?")])
def test_values_and_shapes_that_cannot_be_compared_are_wrong(change, note):
    stored, name = golden_trace("stage_c"), "stage_c.down_blocks.0.1.out"
    result, = compare.compare(stored, {name: change(stored[name])})
    assert result.wrong and note in result.note and note in compare.report([result])


@pytest.mark.parametrize("content, message", [
    (None, "not a readable"), (b"", "not a readable"), (b"\xff" * 64, "not a readable"),
    (b"\x02" + bytes(7) + b"{}", "holds none of the trace's names")])
def test_a_file_that_cannot_be_read_ends_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "mine.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert compare.main([str(GOLDEN / "stage_c.safetensors"), str(path)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: ") and message in line


# ------------------------------------------------------------------------------ the code in PORTING.md

@pytest.fixture(scope="module")
def page():
    """What its Python defines."""
    names = {"np": np, "math": math, "compare": compare}
    code = "".join(re.findall(r"```python\n(.*?)```", PORTING_PAGE.read_text("utf-8"), re.S))
    exec(code.replace("tests/porting/golden", str(GOLDEN)), names)
    return names


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "stage_a"])
def test_the_numpy_blocks_agree(page, name):
    page["trace"] = golden_trace(name)
    results = compare.teacher_force(page["trace"], page["block"])
    assert first_wrong(results) is None
    assert {result.kind for result in results} <= set(page["BLOCKS"])
    assert len(results) >= 6


def test_the_numpy_time_embeddings_agree(page):
    constants = json.loads((GOLDEN / "constants.json").read_text("utf-8"))

    def decode(words):
        return np.array([int(word, 16) for word in words], "<u4").view("<f4")

    for steps, words in constants["times"].items():
        ours = page["embed_time"](decode(words)[:-1], decode(constants["frequencies"]))
        assert np.abs(ours - constants["time_embeddings"][steps]).max() < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 7, 2 ** 32 - 1, 2 ** 32 + 7])
def test_the_numpy_noise_agrees(page, seed):
    """Also where the size is no multiple of 16."""
    generator, twister = torch.Generator().manual_seed(seed), np.random.RandomState(seed % 2 ** 32)
    for shape in ((16, 3, 3), (4, 5, 7), (17,), (4, 32, 32)):
        noise = torch.randn(shape, generator=generator).numpy()
        assert np.abs(page["randn"](twister, *shape) - noise).max() < 1e-5


# ------------------------------------------------------------------------------ golden data

def test_the_golden_networks_are_what_regenerating_gives():
    stored = {name: golden_trace(name) for name in golden.CONFIGS}
    for name, trace in stored.items():
        recorded, state = golden.record_network(name, *golden.draw_network(name), torch.float32)
        assert list(trace.graph) == list(recorded.tensors)
        assert set(state) == set(trace.header) - set(trace.graph)
        for key, tensor in state.items():               # one ulp of noise is one ulp of bf16
            assert np.abs(trace[key] - tensor.float().numpy()).max() <= 1e-2 * np.abs(trace[key]).max()


def test_the_golden_image_is_that_of_the_weights():
    """Also says when the weights have changed: run python tests/porting/golden.py."""
    recorded = golden.record_image()
    other = {name: tensor.numpy() for name, tensor in recorded.tensors.items()}
    results = compare.compare(golden_trace("tiny"), other)
    assert first_wrong(results) is None and len(results) == len(recorded.tensors)
    made = json.loads(MANIFEST.read_text("utf-8"))["made"]
    assert made["weights_sha256"] == golden.weights_digest()


def test_operators_constants_and_the_page_are_what_regenerating_gives():
    stored = load_file(GOLDEN / "operators.safetensors")
    for name, tensor in golden.operators().items():
        if tensor.isfinite().all():                     # not the mask
            tolerance = 1e-2 if name.endswith("bf16") else 1e-5
            tensor = tensor.float()
            assert (tensor - stored[name].float()).abs().max() <= tolerance * tensor.abs().max(), name
    found = golden.constants()
    constants = json.loads((GOLDEN / "constants.json").read_text("utf-8"))
    assert found["frequencies"] == constants["frequencies"]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # there linspace differs by one ulp in one time
        page = PORTING_PAGE.read_text("utf-8")
        assert page == with_section(page, "constants", golden.constants_section(found))
