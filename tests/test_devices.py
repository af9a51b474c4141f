"""Defaults by device; when a stage is checked; attention by head. The tests marked cuda or mps need that device."""
import ctypes

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, unet_inputs
from PIL import Image
from precision import cast_inputs, overflowing
from tiny import STAGE_B, STAGE_C, networks

import cascade
import model
from cascade import Cascade
from model import CascadeError
from sampler import generators, sample

CUDA, MPS = (pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cuda", "mps"))
CHIP = pytest.mark.parametrize("chip", [CUDA, MPS])
FEW = {"steps": 3, "decoder_steps": 2, "seed": 3, "output": "pt"}
DEFAULT_DEVICE = cascade.default_device                 # conftest.py replaces it


# ------------------------------------------------------------------------------ on any machine
@pytest.mark.parametrize("cuda, mps, expected", [
    (True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_device_is_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert DEFAULT_DEVICE() == expected


@pytest.mark.parametrize("device, capability, expected", [
    ("cpu", 0, "float32"), ("mps", 0, "float32"), ("cuda", 7, "float16"),
    ("cuda", 8, "bfloat16"), ("cuda", 12, "bfloat16")])
def test_the_type_fits_the_device(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 5))
    assert cascade.check_dtype("dtype", "auto", torch.device(device)) == getattr(torch, expected)


def test_the_command_and_python_have_the_same_defaults(folder):
    options, ours = cascade.parse(["a star"]), Cascade(folder)
    assert (options.device, options.dtype) == ("auto", "auto")
    assert ours.device.type == "cpu" and set(ours.dtypes.values()) == {torch.float32}


def test_the_command_switches_reduced_precision_off():
    products = torch.backends.cuda.matmul
    torch.backends.cudnn.allow_tf32 = products.allow_tf32 = True
    assert cascade.main([]) == 2
    assert not (torch.backends.cudnn.allow_tf32 or products.allow_tf32)
    assert not products.allow_bf16_reduced_precision_reduction
    assert not products.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("device, steps", [("cpu", 2), ("meta", 4)])
def test_the_step_that_fails_is_named_at_once_on_a_cpu_else_after_the_stage(
        folder, monkeypatch, device, steps):
    pipeline, ran = Cascade(folder, "cpu", keep=True), []
    pipeline.network("stage_c")
    pipeline.device = torch.device(device)

    def fake(*args):
        for i in range(4):
            ran.append(i)
            yield torch.tensor([0.0, 0.0 if i == 0 else torch.inf]), torch.zeros(2)

    monkeypatch.setattr(cascade, "sample", fake)
    with pytest.raises(CascadeError, match="after step 2 of 4"):
        pipeline._denoise("stage_c", None, {}, 4, 1.0, [], None)
    assert len(ran) == steps


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_padding_keeps_feature_maps_channels_last(device):
    assert model.ReplicationPad2d(1)(torch.randn(2, 5, 6, 8, device=device)).is_contiguous()


# ------------------------------------------------------------------------------ attention by head, GRN, mallopt
def qkv(rows, heads, queries, keys):
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, 64) for length in (queries, keys, keys)]


# Several heads at a time, fewer in the last turn; one at a time; all at once.
SHAPES = pytest.mark.parametrize(
    "shape", [(2, 5, 900, 1000), (1, 2, 1500, 1504), (3, 4, 9, 20)], ids=str)


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
    ours, theirs = model.attention_by_head(q, k, v), F.scaled_dot_product_attention(q, k, v)
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


# ------------------------------------------------------------------------------ on a GPU
@CHIP
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_the_same_seed_gives_the_cpus_image(folder, chip, dtype, bound):
    options = FEW | {"variation_images": Image.new("RGB", (64, 64), "red"), "strength": 0.7,
                     "init_image": Image.new("RGB", (64, 64), "blue")}
    exact = Cascade(folder, "cpu", "fp32")("a red circle", **options)
    ours = Cascade(folder, chip, dtype)("a red circle", **options)
    assert ours.device.type == chip and ours.dtype == torch.float32
    error = (ours.cpu() - exact).abs()
    assert (error.max() if dtype == "fp32" else error.mean()) < bound


@CHIP
@pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids=["C", "B"])
@torch.inference_mode()
def test_fp16_stays_finite_past_65504(chip, config):
    unet, inputs = overflowing(config, 0), unet_inputs(config)
    exact = unet(**inputs)
    inputs = {name: value.to(chip) for name, value in cast_inputs(inputs, torch.float16).items()}
    assert relative_error(unet.half().to(chip)(**inputs).cpu(), exact) < 5e-3


@pytest.mark.cuda
@torch.inference_mode()
def test_the_loop_does_not_wait_for_the_gpu():
    unet = networks()["stage_c"].cuda()
    text = torch.randn(4, 77, 64, device="cuda")
    condition = {"clip_text": text, "clip_text_pooled": text[:, :1]}
    steps = sample(unet, (16, 3, 4), condition, 5, 4.0, generators(0, 2))
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_released_network_takes_no_memory_when_the_next_is_loaded(folder, monkeypatch):
    load, taken = model.load, []

    def watched(*args):
        taken.append(torch.cuda.memory_allocated())
        return load(*args)

    monkeypatch.setattr(model, "load", watched)
    Cascade(folder, "cuda")("a star", **FEW)
    sizes = [sum(each.numel() for each in network.parameters()) for network in networks().values()]
    assert len(taken) == 4 and max(taken) - taken[0] < 2 * min(sizes)
