"""What the peers answered (tests/make_golden.py), and that every parameter has its say in it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import randomise, weight_sum, write_folder

import cascade
import sampler
from model import UNet, UNetConfig, load
from text_encoder import TOWERS
from text_encoder import load as load_tower

GOLDEN = Path(__file__).resolve().parent / "golden"
RUNS = {
    "stage_c": lambda network, **given: {"epsilon": network(**given)},
    "stage_b": lambda network, **given: {"epsilon": network(**given)},
    "stage_a": lambda network, z, image: {"decoded": network.decode(z), "encoded": network.encode(image)},
    "text_encoder": lambda network, ids, mask: dict(zip(("hidden", "pooled"), network(ids, mask))),
    "image_encoder": lambda network, pixels: {"embedding": network(pixels)},
    "effnet_encoder": lambda network, image: {"latent": network(image)},
    "previewer": lambda network, latent: {"picture": network(latent)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=0)


def golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return [
        {key[len(side) :]: value for key, value in tensors.items() if key.startswith(side)} for side in ("in.", "out.")
    ]


def opened(folder, name):
    if name in TOWERS:
        return load_tower(folder / name / "model.safetensors")
    return load(folder / f"{name}.safetensors")


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", RUNS)
def test_the_network_answers_as_its_peer_did(folder, name):
    network, (given, answers) = opened(folder, name), golden(name)
    drawn = load_file(GOLDEN / f"{name}.safetensors")["weights"]
    assert torch.isclose(weight_sum(network), drawn), "this PyTorch draws other random weights: not the same network"
    ours = RUNS[name](network, **given)
    for key, theirs in answers.items():
        assert theirs.std() > 0.1
        assert error(ours[key], theirs) <= 1e-5, key


# What an answer cannot depend on: the codebook, which neither encode nor decode reads, and the keys' bias, which adds
# the same to every score of a query.
SILENT = ("num_batches_tracked", "vquantizer.codebook.weight", "k_proj.bias")


@pytest.mark.parametrize("name", RUNS)
def test_a_small_change_of_any_parameter_is_seen(folder, name):
    network, (given, answers) = opened(folder, name), golden(name)
    for key, tensor in network.state_dict().items():
        if key.endswith(SILENT):
            continue
        before = tensor.clone()
        tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        ours = RUNS[name](network, **given)
        tensor.copy_(before)
        seen = max(error(ours[answer], theirs) for answer, theirs in answers.items())
        assert seen > 2e-5, f"{key}: {seen:.1e}"


def test_alpha_bar_is_the_schedulers():
    given, answers = golden("scheduler")
    assert (sampler.alpha_bar(given["t"]) - answers["alpha_bar"]).abs().max() <= 1e-6


def test_alpha_bar_is_the_cosine_schedule_in_double_precision():
    """cos^2 of half a turn's half: without that half, alpha_bar(0.5) would be off by 5 in 10,000."""
    import math

    for t in (0.02, 0.25, 0.5, 0.75, 0.97):
        exact = math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert abs(sampler.alpha_bar(torch.tensor(t)).item() - exact) <= 1e-6
    assert sampler.alpha_bar(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.9999, 0.0001])


def test_every_step_is_the_schedulers():
    given, answers = golden("scheduler")
    a, source, x = sampler.alpha_bar(sampler.timesteps(10)), sampler.generators(4, 1), given["start"]
    for i, theirs in enumerate(answers["steps"]):
        noise = sampler.draw(source, (2, 4, 4), "cpu") * (i < 9)
        x = sampler.ddpm(x, given["epsilon"][i : i + 1], noise, a[i], a[i + 1])
        assert error(x, theirs[None]) <= 1e-5, f"step {i + 1}"


def test_the_picture_is_the_pipelines(folder):
    _, answers = golden("pipeline")
    pipeline = cascade.Cascade(folder)
    ours = [
        pipeline(
            ["a red circle", "three stars"],
            ["blue", "a wall"],
            steps=4,
            guidance=4.0,
            decoder_steps=3,
            decoder_guidance=1.5,
            seed=7,
            output=output,
        )
        for output in ("latent", "pt")
    ]
    assert error(ours[0], answers["latents"]) <= 1e-5
    assert 0.1 < answers["pixels"].std() and ((answers["pixels"] > 0) & (answers["pixels"] < 1)).float().mean() > 0.5
    assert error(ours[1][:, :, ::4, ::4], answers["pixels"]) <= 1e-5


def test_no_network_is_too_simple_to_tell_skips_apart():
    """A level that is passed twice reads its skip twice; a network that read it once would answer otherwise."""
    config = UNetConfig(
        widths=(64, 64),
        down=("RT", "RT"),
        up=("RT", "RT"),
        down_repeat=(1, 1),
        up_repeat=(1, 2),
        c_cond=16,
        latent=4,
        patch=2,
        extras=("sca",),
        text=8,
        semantic=16,
    )
    network = randomise(UNet(config), 9)
    x, r, pooled = torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 8)
    seen, read = [], network.up_blocks[1][0].forward
    network.up_blocks[1][0].forward = lambda x, t, cond, skip: (seen.append(skip), read(x, t, cond, skip))[1]
    network(x, r, pooled)
    assert len(seen) == 2 and torch.equal(*seen)
