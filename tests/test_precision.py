"""fp16 where feature maps go beyond 65504; the drift of every type; no tensor is made on the wrong device."""
import pytest
import torch
from helpers import RUNS, golden, on_meta, relative_error, slow_except, unet_inputs
from precision import (BF16, FP16, cast_inputs, overflowing, overflowing_drift, random_drift,
                       without_upcast)
from tiny import NETWORKS, STAGE_B, STAGE_C

import model
from cascade import Cascade
from sampler import RECIPES, generators, sample

FP32 = torch.float32
UNETS = pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids=["C", "B"])
DTYPES = pytest.mark.parametrize("dtype", slow_except([FP32, BF16, FP16], FP16), ids=str)
SIZES = [{"rows": 2, "height": 6, "width": 5}, {"rows": 3, "height": 7, "width": 9},
         {"rows": 1, "height": 13, "width": 5}]


# ------------------------------------------------------------------------------ beyond 65504

@UNETS
@pytest.mark.parametrize("seed", slow_except(range(4), 0))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp16_is_within_half_a_percent_of_fp32_where_plain_fp16_is_not_finite(config, seed, size):
    with without_upcast():
        assert overflowing_drift(config, FP16, seed, **size) == torch.inf
    assert overflowing_drift(config, FP16, seed, **size) < 5e-3
    assert overflowing_drift(config, FP16, seed, factor=1000, **size) < 5e-3  # far larger blocks


@pytest.mark.parametrize("large", [1.0, 1e3, 1e6, 1e12, 1e30])
def test_a_product_of_rows_of_any_size_is_exact_to_fp16(large):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 300), (torch.randn(40, 300) / 17).half(), torch.randn(40).half()
    x[1] *= large                                       # does not change its neighbours
    x[2, 7], x[3] = large, 0
    ours, exact = model.scaled_linear(x, weight, bias), x.double() @ weight.double().T + bias
    assert ours.dtype == FP32
    assert ((ours - exact).abs().amax(1) / exact.abs().amax(1)).max() < 1e-3
    assert torch.equal(ours[3], bias.float())
    assert torch.equal(ours[:1], model.scaled_linear(x[:1], weight, bias))


@UNETS
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_fp32_and_bf16_are_the_same_bits_without_the_plumbing_for_fp16(config, dtype, monkeypatch):
    unet, inputs = overflowing(config, 0, factor=1).to(dtype), cast_inputs(unet_inputs(config), dtype)
    ours = unet(**inputs)
    monkeypatch.setattr(model, "upcast_fp16", lambda x: x)
    monkeypatch.setattr(model, "scaled_linear", torch.nn.functional.linear)
    assert ours.dtype == dtype and torch.equal(ours, unet(**inputs))


def test_the_pipeline_in_fp16_is_near_the_pipeline_in_fp32(folder):
    exact, ours = (
        Cascade(folder, dtype=dtype).prior("a red circle", steps=3) for dtype in ("fp32", "fp16"))
    assert relative_error(ours, exact) < 2e-2


@pytest.mark.parametrize("name", slow_except(NETWORKS, "stage_c", "stage_b", "stage_a"))
def test_every_network_drifts_little(name):
    assert random_drift(name, FP16, seeds=2) < 5e-3
    assert random_drift(name, BF16, seeds=2) < 5e-2


# ------------------------------------------------------------------------------ devices: "meta" does not mix with the CPU

def networks_on_meta(dtype):
    return {name: on_meta(*network).to(dtype) for name, network in NETWORKS.items()}


def run_all(dtype):
    """The outputs of all networks on the meta device; the UNets' with all conditions and with as few as possible."""
    outputs = []
    for name, network in networks_on_meta(dtype).items():
        inputs = {key: x.to("meta") for key, x in cast_inputs(golden(name)[0], dtype).items()}
        outputs += RUNS[name](network, **inputs).values()
        if name in ("stage_c", "stage_b"):
            times = dict.fromkeys(network.config.time_conditions, inputs["r"])
            few = {key: x for key, x in inputs.items() if key not in ("clip_img", "effnet", "pixels")}
            outputs += [network(**inputs, **times), network(**few)]
        if name == "stage_a":
            outputs += network.quantise(inputs["z"])
    return outputs


@torch.inference_mode()
@DTYPES
def test_no_network_makes_a_tensor_on_another_device_than_its_own(dtype):
    assert {x.device.type for x in run_all(dtype)} == {"meta"}


@torch.inference_mode()
@pytest.mark.parametrize("name", ["zeros_like", "arange"])
def test_a_tensor_that_a_network_makes_on_the_wrong_device_would_be_found(monkeypatch, name):
    make = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **named: make(*args, **named | {"device": "cpu"}))
    with pytest.raises(RuntimeError, match="device"):
        run_all(FP32)


@torch.inference_mode()
@DTYPES
@pytest.mark.parametrize("recipe", slow_except(RECIPES, "original"))
@pytest.mark.parametrize("guidance", slow_except([0.0, 3.0], 3.0))
def test_the_sampler_stays_on_the_networks_device(dtype, recipe, guidance):
    unet, pooled = networks_on_meta(dtype)["stage_c"], torch.empty(4, 1, 64, device="meta")
    condition = {"clip_text_pooled": pooled, "clip_text": pooled.expand(4, 77, 64)}
    start = {"init_latent": torch.zeros(1, 16, 3, 4)} if guidance else {}
    for pair in sample(unet, (16, 3, 4), condition, 2, guidance, generators(0, 2), RECIPES[recipe], **start):
        assert all(x.is_meta and x.dtype == FP32 and x.shape == (2, 16, 3, 4) for x in pair)
