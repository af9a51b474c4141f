"""Stage A is diffusers' PaellaVQModel."""

import json
from dataclasses import replace

import pytest
import torch
from peers import assert_same, diffusers_stage_a
from tiny import STAGE_A, randomise, save, to_diffusers

from model import StageA, load

CONFIGS = {
    "tiny": STAGE_A,
    "wide": replace(STAGE_A, widths=(24, 48), deep_blocks=1, codes=100, scale_factor=0.3764),
    "three levels": replace(STAGE_A, widths=(8, 16, 32), deep_blocks=2, latent=6),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def pair(request):
    stage_a = randomise(StageA(request.param), 11)
    return stage_a, diffusers_stage_a(stage_a)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 5)], ids=str)
def test_decode_gives_the_same_pixels(pair, size):
    stage_a, peer = pair
    torch.manual_seed(0)
    z = torch.randn(2, stage_a.config.latent, *size)
    assert_same(stage_a.decode(z), peer.decode(z * stage_a.config.scale_factor).sample)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_encode_gives_the_same_latent(pair, size):
    stage_a, peer = pair
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert_same(stage_a.encode(image), peer.encode(image).latents / stage_a.config.scale_factor)


@torch.no_grad()
def test_quantise_finds_the_same_codes(pair):
    stage_a, peer = pair
    z = torch.randn(2, stage_a.config.latent, 6, 7, generator=torch.Generator().manual_seed(0))
    codes, numbers = stage_a.quantise(z)
    theirs, _, (_, _, their_numbers) = peer.vquantizer(z * stage_a.config.scale_factor)
    assert torch.equal(numbers.flatten(), their_numbers.flatten())
    assert_same(codes * stage_a.config.scale_factor, theirs)


def test_the_scale_factor_is_that_of_the_config_beside_the_file_or_the_original_one(tmp_path):
    state = randomise(StageA(STAGE_A), 12).state_dict()
    save(state, tmp_path / "original" / "stage_a.safetensors")
    save(to_diffusers(state), tmp_path / "vqgan" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vqgan" / "config.json").write_text(json.dumps({"scale_factor": 0.3764}))
    assert load(tmp_path / "original" / "stage_a.safetensors").config.scale_factor == 0.43
    stage_a = load(tmp_path / "vqgan" / "diffusion_pytorch_model.safetensors")
    z = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same(stage_a.decode(z), diffusers_stage_a(stage_a).decode(0.3764 * z).sample)


def test_both_layouts_load_as_the_same_network(tmp_path):
    for config in CONFIGS.values():
        stage_a = randomise(StageA(replace(config, scale_factor=0.43)), 13)
        z = torch.randn(1, config.latent, 5, 6)
        for name, state in (("original", stage_a.state_dict()), ("diffusers", to_diffusers(stage_a.state_dict()))):
            save(state, tmp_path / f"{name}.safetensors")
            loaded = load(tmp_path / f"{name}.safetensors")
            assert loaded.config == stage_a.config
            assert torch.equal(loaded.decode(z), stage_a.decode(z))
