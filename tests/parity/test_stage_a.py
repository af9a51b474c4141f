"""Stage A is diffusers' PaellaVQModel."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise
from peers import diffusers_stage_a
from tiny import STAGE_A, randomise, save, to_diffusers

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


@torch.no_grad()
def test_the_scale_factor_is_read_from_the_config_next_to_the_file(tmp_path):
    state = randomise(StageA(STAGE_A), 12).state_dict()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save(to_diffusers(state), path)
    assert load(path).config.scale_factor == 0.43
    (tmp_path / "config.json").write_text(json.dumps({"scale_factor": 0.3764}))
    z = noise(1, 4, 5, 5)
    assert_same(load(path).decode(z), diffusers_stage_a(load(path)).decode(0.3764 * z).sample)


@EACH_CONFIG
def test_both_layouts_load_as_the_same_network(tmp_path, config):
    stage_a = randomise(StageA(replace(config, scale_factor=0.43)), 13)
    z = noise(1, config.latent_channels, 5, 6)
    for state in stage_a.state_dict(), to_diffusers(stage_a.state_dict()):
        save(state, tmp_path / "file.safetensors")
        loaded = load(tmp_path / "file.safetensors")
        assert loaded.config == stage_a.config and torch.equal(loaded.decode(z), stage_a.decode(z))
