"""Stage B and C are diffusers' StableCascadeUNet."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise, unet_inputs
from peers import diffusers_unet
from tiny import STAGE_B, STAGE_C, randomise, save, to_diffusers

from model import CascadeError, UNet, load

C_CONFIGS = {
    "tiny": STAGE_C,
    "one group per level, equal widths": replace(
        STAGE_C, widths=(64, 64), down=("RTA", "RTA"), up=("RTA", "RTA"), down_repeat=(1, 1), up_repeat=(1, 1), c_cond=64),
    "repeats everywhere": replace(STAGE_C, down_repeat=(3, 2), up_repeat=(2, 3), text_dim=40, image_dim=40),
    "three levels": replace(
        STAGE_C, widths=(64, 64, 128), down=("RTA",) * 3, up=("RTA",) * 3, down_repeat=(1, 1, 1), up_repeat=(1, 2, 1))}
B_CONFIGS = {
    "tiny": STAGE_B,
    "repeats everywhere": replace(STAGE_B, down_repeat=(2, 1, 3), up_repeat=(2, 3, 2)),
    "attention at the second level": replace(
        STAGE_B, widths=(32, 64, 128), down=("RT", "RTARTA", "RTA"), up=("RTARTA", "RTA", "RTRT")),
    "four levels": replace(
        STAGE_B, widths=(32, 32, 64, 64), down=("RT", "RT", "RTA", "RTA"), up=("RTA", "RTARTA", "RT", "RTRT"),
        down_repeat=(1, 1, 1, 1), up_repeat=(3, 3, 2, 2))}
CONFIGS = [*C_CONFIGS.values(), *B_CONFIGS.values()]
NAMES = [f"{stage}: {name}" for stage, configs in (("C", C_CONFIGS), ("B", B_CONFIGS)) for name in configs]


def inputs_of(config, height=4, width=5):
    """Three rows, with one image; no pixels, which are zeros."""
    return {**unet_inputs(config, rows=3, height=height, width=width, tokens=11, images=1), "pixels": None}


@torch.no_grad()
def assert_same_prediction(unet, ours, theirs=None):
    theirs = ours if theirs is None else theirs
    names = {"pixels"} if not unet.config.is_stage_b else set()
    ours, theirs = ({name: value for name, value in inputs.items() if name not in names} for inputs in (ours, theirs))
    peer = diffusers_unet(unet)
    assert_same(unet(**ours), peer(theirs.pop("x"), theirs.pop("r"), **theirs).sample)


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (8, 6)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_unet_predicts_what_diffusers_predicts(config, size):
    size = [5 + side for side in size] if config.is_stage_b else size
    assert_same_prediction(randomise(UNet(config), 1), inputs_of(config, *size))


@pytest.mark.parametrize("config, ours, theirs", [
    (STAGE_C, {"clip_img": noise(3, 3, 24)}, {"clip_img": noise(3, 3, 24)}),
    (STAGE_C, {"clip_img": noise(3, 24)}, {"clip_img": noise(3, 24)}),
    (STAGE_C, {"clip_img": None}, {"clip_img": torch.zeros(3, 1, 24)}),
    (STAGE_B, {"effnet": None}, {"effnet": None}),
    (STAGE_B, {"pixels": noise(3, 3, 9, 7)}, {"pixels": noise(3, 3, 9, 7)}),
    (STAGE_B, {"clip_text_pooled": noise(3, 64)}, {"clip_text_pooled": noise(3, 64)[:, None]}),
    (STAGE_C, {"clip_text_pooled": noise(3, 64)}, {"clip_text_pooled": noise(3, 64)[:, None]})],
    ids=["several image embeddings", "a flat image embedding", "no image embedding is zeros", "no semantic latent",
         "pixels", "B: a flat pooled embedding", "C: a flat pooled embedding"])
def test_a_unet_takes_other_conditions(config, ours, theirs):
    inputs = inputs_of(config, 8, 10)
    assert_same_prediction(randomise(UNet(config), 3), inputs | ours, inputs | theirs)


@torch.no_grad()
def test_sca_and_crp_of_each_row_reach_it():
    unet, inputs = randomise(UNet(STAGE_C), 6), unet_inputs(STAGE_C, rows=3, images=1)
    times = {"sca": torch.tensor([0.2, 0.0, 0.9]), "crp": torch.tensor([0.4, 0.7, 0.0])}
    peer, theirs = diffusers_unet(unet), []
    for i in range(3):                                  # it takes them one row at a time
        row = {name: value[i:i + 1] for name, value in (inputs | times).items()}
        theirs.append(peer(row.pop("x"), row.pop("r"), **row).sample)
    assert_same(unet(**inputs, **times), torch.cat(theirs))
    assert (unet(**inputs) - torch.cat(theirs)).abs().max() > 1e-2


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_both_layouts_load_as_the_same_network(config, tmp_path):
    unet = randomise(UNet(config), 7)
    save(unet.state_dict(), tmp_path / "original.safetensors")
    save(to_diffusers(unet.state_dict()), tmp_path / "diffusers.safetensors")
    inputs = unet_inputs(config, height=8, width=9)
    for name in ("original", "diffusers"):
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config and torch.equal(loaded(**inputs), unet(**inputs))


@pytest.mark.parametrize("config", [STAGE_B, STAGE_C], ids=["B", "C"])
def test_a_file_that_diffusers_saved_loads(tmp_path, config):
    unet = randomise(UNet(config), 8)
    diffusers_unet(unet).save_pretrained(tmp_path)
    loaded = load(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(loaded(**unet_inputs(config)), unet(**unet_inputs(config)))


def test_a_stage_c_that_switches_resolution_is_refused(tmp_path):
    """diffusers can build one, but no official file has it."""
    diffusers_unet(randomise(UNet(STAGE_C), 8)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"switch_level": [True]}))
    with pytest.raises(CascadeError, match="switch_level"):
        load(tmp_path / "diffusion_pytorch_model.safetensors")
