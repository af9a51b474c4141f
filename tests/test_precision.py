"""fp16 where feature maps go beyond 65504; the drift of every type; no tensor is made on the wrong device."""
import pytest
import torch
from helpers import on_meta, relative_error, slow_except, unet_inputs
from precision import (BF16, FP16, cast_inputs, overflowing, overflowing_drift, random_drift,
                       without_upcast)
from tiny import IMAGE, NETWORKS, STAGE_B, STAGE_C

import model
from cascade import Cascade
from sampler import RECIPES, generators, sample

FP32, MAX = torch.float32, torch.finfo(FP16).max
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


@UNETS
@torch.inference_mode()
def test_the_overflowing_networks_exceed_65504_a_hundred_times(config):
    """Both feature maps and hidden values: neither fit in fp16."""
    unet, feature_maps, hidden = overflowing(config, 0).half(), [], []
    for block in unet.modules():
        if isinstance(block, model.ResidualBlock):
            block.register_forward_hook(lambda block, args, out: feature_maps.append(out))
            block.channelwise[2].register_forward_hook(lambda norm, args, out: hidden.append(out))
    unet(**cast_inputs(unet_inputs(config), FP16))
    assert {x.dtype for x in feature_maps + hidden} == {FP32}
    assert max(x.abs().max() for x in feature_maps) > 100 * MAX
    assert max(x.abs().max() for x in hidden) > 10 * MAX


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
    exact, ours = (Cascade(folder, dtype=dtype).prior("a red circle", steps=3) for dtype in ("fp32", "fp16"))
    assert relative_error(ours, exact) < 2e-2


@pytest.mark.parametrize("name", slow_except(NETWORKS, "stage_c", "stage_b", "stage_a"))
def test_every_network_drifts_little(name):
    assert random_drift(name, FP16, seeds=2) < 5e-3
    assert random_drift(name, BF16, seeds=2) < 5e-2


# ------------------------------------------------------------------------------ devices: "meta" does not mix with the CPU

def networks_on_meta(dtype):
    return {name: on_meta(*network).to(dtype) for name, network in NETWORKS.items()}


def run_all(dtype):
    """The outputs of all networks on the meta device."""
    networks = networks_on_meta(dtype)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    ids, r = empty(2, 77, dtype=torch.int64), empty(2, dtype=FP32)
    x, z = empty(2, 16, 3, 4), empty(2, 4, 22, 18)
    stage_c, stage_b, stage_a = (networks[f"stage_{letter}"] for letter in "cba")
    hidden, pooled = networks["text_encoder"](ids, ids)
    embedding = networks["image_encoder"](empty(2, 3, IMAGE.side, IMAGE.side))
    latent = networks["effnet_encoder"](empty(1, 3, 96, 64))
    return [hidden, pooled, embedding, latent, networks["previewer"](latent),
        stage_c(x, r, pooled, hidden), stage_c(x, r, pooled, hidden, embedding, sca=r, crp=r),
        stage_b(z, r, pooled), stage_b(z, r, pooled, effnet=x, pixels=empty(2, 3, 9, 7), sca=r),
        stage_a.encode(empty(1, 3, 32, 40)), stage_a.decode(z), *stage_a.quantise(z)]


@torch.inference_mode()
@DTYPES
def test_no_network_makes_a_tensor_on_another_device_than_its_own(dtype):
    assert {x.device.type for x in run_all(dtype)} == {"meta"}


@torch.inference_mode()
@pytest.mark.parametrize("name", ["zeros_like", "arange"])
def test_a_tensor_that_a_network_makes_on_the_wrong_device_would_be_found(monkeypatch, name):
    make = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **options: make(*args, **options | {"device": "cpu"}))
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
