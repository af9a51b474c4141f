"""fp16 where the stream passes 65504, the drift of every type, and that no tensor is made on the wrong device."""

import copy
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from precision import BF16, FP16, ROOT, STAGES, cast_all, drift, hostile, hostile_drift, inputs, memory, naive
from precision import random_drift
from tiny import ENCODER, IMAGE, PREVIEWER, STAGE_A, STAGE_B, STAGE_C, TEXT, write_folder
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import model
import text_encoder
from cascade import Cascade
from sampler import RECIPES, generators, sample

FP32 = torch.float32
DTYPES = [FP32, BF16, FP16]
WIDE_C = replace(STAGE_C, switch=(True,))               # levels of different sides
UNETS = pytest.mark.parametrize("config", [STAGE_C, WIDE_C, STAGE_B], ids=["C", "C that switches", "B"])
SIZES = pytest.mark.parametrize("size", [(2, 6, 5), (3, 7, 9), (1, 13, 5)], ids=str)     # rows, height, width
MAX = torch.finfo(FP16).max


# ------------------------------------------------------------------------------------------------ past 65504


@UNETS
@pytest.mark.parametrize("seed", range(4))
@SIZES
def test_fp16_is_within_half_a_percent_of_fp32_where_a_naive_run_is_not_finite(config, seed, size):
    with naive():
        assert math.isnan(hostile_drift(config, FP16, seed, *size))
    assert hostile_drift(config, FP16, seed, *size) < 5e-3


@UNETS
def test_even_far_larger_blocks_stay_finite(config):
    unet, given = hostile(config, 0, factor=1000), inputs(config, 0)
    assert drift(copy.deepcopy(unet).half()(**cast_all(given, FP16)), unet(**given)) < 5e-3


@UNETS
@torch.inference_mode()
def test_the_hostile_networks_pass_65504_a_hundred_times_over(config):
    """Stream and hidden values both: neither has room in fp16."""
    unet, stream, hidden = hostile(config, 0).half(), [], []
    for block in unet.modules():
        if isinstance(block, model.ResidualBlock):
            block.register_forward_hook(lambda block, args, out: stream.append(out))
            block.channelwise[2].register_forward_hook(lambda norm, args, out: hidden.append(out))
    unet(**cast_all(inputs(config, 0), FP16))
    assert {x.dtype for x in stream + hidden} == {FP32}
    assert max(x.abs().max() for x in stream) > 100 * MAX and max(x.abs().max() for x in hidden) > 10 * MAX


@UNETS
def test_ordinary_networks_are_no_worse_off(config):
    with naive():
        before = max(hostile_factor_one(config, seed) for seed in range(4))
    assert max(hostile_factor_one(config, seed) for seed in range(4)) <= before


@torch.inference_mode()
def hostile_factor_one(config, seed):
    unet, given = hostile(config, seed, factor=1), inputs(config, seed)
    return drift(copy.deepcopy(unet).half()(**cast_all(given, FP16)), unet(**given))


@pytest.mark.parametrize("large", [1.0, 1e3, 1e6, 1e12, 1e30])
def test_a_product_of_rows_of_any_size_is_exact_to_fp16(large):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 300), (torch.randn(40, 300) / 17).half(), torch.randn(40).half()
    x[1] *= large                                       # its neighbours keep theirs
    x[2, 7] = large
    x[3] = 0
    ours, exact = model.linear(x, weight, bias), x.double() @ weight.double().T + bias
    assert ours.dtype == FP32
    assert ((ours - exact).abs().amax(1) / exact.abs().amax(1)).max() < 1e-3
    assert torch.equal(ours[3], bias.float()) and torch.equal(ours[:1], model.linear(x[:1], weight, bias))


@UNETS
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_fp32_and_bf16_are_bit_for_bit_what_they_are_without_it(config, dtype, monkeypatch):
    unet, given = hostile(config, 0, factor=1).to(dtype), cast_all(inputs(config, 0), dtype)
    ours = unet(**given)
    monkeypatch.setattr(model, "wide", lambda x: x)
    monkeypatch.setattr(model, "linear", torch.nn.functional.linear)
    for kind in (model.Conv2d, model.ConvTranspose2d):
        plain = kind.__mro__[1].forward
        monkeypatch.setattr(kind, "forward", lambda self, x, plain=plain: (
            torch.nn.functional.linear(x, self.weight.flatten(1), self.bias) if self.kernel_size == (1, 1)
            else plain(self, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
    assert ours.dtype == dtype and torch.equal(ours, unet(**given))


def test_the_whole_way_in_fp16_is_near_the_picture_in_fp32(tmp_path):
    folder = write_folder(tmp_path, seed=1)
    exact, ours = (Cascade(folder, dtype=dtype).prior("a red circle", steps=3) for dtype in ("fp32", "fp16"))
    assert drift(ours, exact) < 2e-2


# ------------------------------------------------------------------------------------------------ drift and memory


@pytest.mark.parametrize("name", sorted({name for name, _ in STAGES.values()}))
def test_every_network_drifts_little(name):
    assert random_drift(name, FP16, seeds=2) < 5e-3
    assert random_drift(name, BF16, seeds=2) < 5e-2


@pytest.mark.parametrize("title", STAGES)
def test_readme_says_what_memory_a_run_computes(title):
    row = next(line for line in (ROOT / "README.md").read_text("utf-8").split("\n") if line.startswith(f"| {title} |"))
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == memory(title)


# ------------------------------------------------------------------------------------------------ devices, without any


class Fake(TorchFunctionMode):
    """Three functions that PyTorch lets fake tensors do only where it has the driver of their device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.new_tensor:
            return args[0].new_empty(len(args[1]))
        if function is torch.nn.functional.interpolate:
            return args[0].new_empty(*args[0].shape[:2], *kwargs["size"])
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, keys = args
        keys = keys if isinstance(keys, tuple) else (keys,)
        if any(torch.is_tensor(key) for key in keys):
            return torch.ops.aten.index(x, list(keys))
        dim = 0
        for key in keys:
            if key is None:
                x = x.unsqueeze(dim)
            elif isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop)
            else:
                x, dim = x.select(dim, key), dim - 1
            dim += 1
        return x


@contextmanager
def elsewhere():
    """Tensors on any device, which say that they are there and hold nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True), Fake():
        yield


def bare():
    """Every tiny network, on the meta device."""
    with torch.device("meta"):
        return [model.UNet(STAGE_C), model.UNet(STAGE_B), model.StageA(STAGE_A), model.SemanticEncoder(ENCODER),
                model.Previewer(PREVIEWER), text_encoder.TextEncoder(TEXT), text_encoder.ImageEncoder(IMAGE)]


def put(networks, device, dtype):
    """Their tensors made anew on another."""
    for network in networks:
        tensors = {name: torch.empty(tensor.shape, device=device,
                                     dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                   for name, tensor in network.state_dict().items()}
        network.load_state_dict(tensors, assign=True)
        network.eval().requires_grad_(False)
    return networks


def run_all(networks, device, dtype):
    """What they answer there."""
    c, b, a, encoder, previewer, text, image = put(networks, device, dtype)

    def rand(*shape, dtype=dtype):
        return torch.empty(shape, device=device, dtype=dtype)

    ids, r = rand(2, 77, dtype=torch.int64), rand(2, dtype=FP32)
    hidden, pooled = text(ids, ids)
    seen = image(rand(2, 3, IMAGE.side, IMAGE.side))
    answers = [c(rand(2, 16, 3, 4), r, pooled, hidden), c(rand(2, 16, 3, 4), r, pooled, hidden, seen, sca=r, crp=r),
               b(rand(2, 4, 22, 18), r, pooled),
               b(rand(2, 4, 22, 18), r, pooled, effnet=rand(2, 16, 3, 3), pixels=rand(2, 3, 9, 7), sca=r)]
    z = a.encode(rand(1, 3, 32, 40))
    latent = encoder(rand(1, 3, 96, 64))
    return [hidden, pooled, seen, *answers, z, a.decode(z), *a.quantise(z), latent, previewer(latent)]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_network_makes_a_tensor_on_another_device_than_its_own(dtype):
    """The meta device will not be mixed with the CPU."""
    assert {x.device.type for x in run_all(bare(), "meta", dtype)} == {"meta"}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_network_runs_on_a_gpu_that_is_not_there(dtype):
    networks = bare()
    with elsewhere():
        assert {x.device.type for x in run_all(networks, "cuda", dtype)} == {"cuda"}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_sampler_stays_on_the_networks_device(dtype, recipe, guidance):
    c, b, *_ = put(bare(), "meta", dtype)
    pooled, start = torch.empty(4, 1, 64, device="meta"), torch.empty(1, 16, 3, 4)
    for unet, shape, condition, more in (
        (c, (16, 3, 4), {"clip_text_pooled": pooled, "clip_text": pooled.expand(4, 77, 64)}, {"start": start}),
        (c, (16, 3, 4), {"clip_text_pooled": pooled, "clip_text": pooled.expand(4, 77, 64)}, {}),
        (b, (4, 22, 18), {"clip_text_pooled": pooled, "effnet": torch.empty(4, 16, 3, 3, device="meta")}, {}),
    ):
        for pair in sample(unet, shape, condition, 3, guidance, generators(0, 2), RECIPES[recipe], **more):
            assert all(x.is_meta and x.dtype == FP32 and x.shape == (2, *shape) for x in pair)


@pytest.fixture
def on_meta(tmp_path, monkeypatch):
    """A pipeline on the meta device. Whether a latent is finite is all that it asks of values: it is."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: torch.ones(1, dtype=torch.bool))
    folder = write_folder(tmp_path, seed=1)

    def make(dtype):
        pipeline = Cascade(folder, dtype=dtype)
        pipeline.device = torch.device("meta")
        return pipeline

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_whole_way_from_prompt_to_picture_stays_on_its_device(on_meta, dtype, recipe):
    few = {"steps": 2, "decoder_steps": 1, "decoder_guidance": 2.0, "width": 100, "height": 90, "recipe": recipe}
    embeddings, start = torch.empty(2, IMAGE.projection, device="meta"), torch.empty(1, 16, 3, 3, device="meta")
    for more in ({}, {"variation_images": embeddings, "init_image": start}):
        pixels = on_meta(dtype)(["a red circle", "a star"], "blue", images=2, output="pt", **few, **more)
        assert pixels.is_meta and pixels.shape == (4, 3, 90, 100)


@pytest.mark.parametrize("name", ["zeros_like", "arange"])
@pytest.mark.parametrize("device", ["meta", "cuda"])
@torch.inference_mode()
def test_a_tensor_that_a_network_makes_on_the_wrong_device_would_be_found(monkeypatch, name, device):
    real, networks = getattr(torch, name), bare()
    monkeypatch.setattr(torch, name, lambda *args, **given: real(*args, **given | {"device": "cpu"}))
    with pytest.raises(RuntimeError, match="device"), nullcontext() if device == "meta" else elsewhere():
        run_all(networks, device, FP32)


@pytest.mark.parametrize("name", ["zeros_like", "cat", "stack"])
def test_a_tensor_that_the_pipeline_makes_on_the_wrong_device_would_be_found(on_meta, monkeypatch, name):
    real, pipeline = getattr(torch, name), on_meta(FP32)
    monkeypatch.setattr(torch, name, lambda *args, **given: torch.empty(real(*args, **given).shape))
    with pytest.raises(RuntimeError, match="device"):
        pipeline("a red circle", steps=1, decoder_steps=1, output="pt")
