"""Stage A is diffusers' PaellaVQModel."""
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise
from peers import diffusers_stage_a
from tiny import STAGE_A, randomise, save

from model import StageA, load

CONFIGS = {
    "tiny": STAGE_A,
    "wide": replace(STAGE_A, widths=(24, 48), deep_blocks=1, codes=100, scale_factor=0.3764),
    "three levels": replace(STAGE_A, widths=(8, 16, 32), deep_blocks=2, latent_channels=6)}


EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 5)], ids=str)
@EACH_CONFIG
def test_pixels_latents_and_codes_are_the_same(config, size):
    stage_a, scale_factor = randomise(StageA(config), 11), config.scale_factor
    peer = diffusers_stage_a(stage_a)
    z, image = noise(2, config.latent_channels, *size), noise(2, 3, 32, 8 * size[1]).sigmoid()
    assert_same(stage_a.decode(z), peer.decode(z * scale_factor).sample)
    assert_same(stage_a.encode(image), peer.encode(image).latents / scale_factor)
    codes, indices = stage_a.quantise(z)
    their_codes, _, (_, _, their_indices) = peer.vquantizer(z * scale_factor)
    assert torch.equal(indices.flatten(), their_indices.flatten())
    assert_same(codes * scale_factor, their_codes)


@EACH_CONFIG
def test_both_layouts_load_as_the_same_network(tmp_path, config):
    """The scale factor is in diffusers' config.json, next to the files."""
    stage_a, z = randomise(StageA(config), 13), noise(1, config.latent_channels, 5, 6)
    save(stage_a.state_dict(), tmp_path / "original.safetensors")
    diffusers_stage_a(stage_a).save_pretrained(tmp_path)
    for name in "original", "diffusion_pytorch_model":
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config and torch.equal(loaded.decode(z), stage_a.decode(z))
