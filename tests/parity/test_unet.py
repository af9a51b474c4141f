"""Stage B and C are diffusers' StableCascadeUNet."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise, unet_inputs
from peers import diffusers_unet
from tiny import STAGE_B, STAGE_C, randomise, save

from model import CascadeError, UNet, load

CONFIGS = {"C": STAGE_C, "C: one group per level, equal widths": replace(
        STAGE_C, widths=(64, 64), down=("RTA",) * 2, up=("RTA",) * 2,
        down_repeat=(1, 1), up_repeat=(1, 1), c_cond=64), "C: repeats everywhere": replace(
        STAGE_C, down_repeat=(3, 2), up_repeat=(2, 3), text_dim=40, image_dim=40),
    "C: three levels": replace(STAGE_C, widths=(64, 64, 128), down=("RTA",) * 3, up=("RTA",) * 3,
                               down_repeat=(1, 1, 1), up_repeat=(1, 2, 1)), "B": STAGE_B,
    "B: repeats everywhere": replace(STAGE_B, down_repeat=(2, 1, 3), up_repeat=(2, 3, 2)),
    "B: attention at the second level": replace(
        STAGE_B, widths=(32, 64, 128), down=("RT", "RTARTA", "RTA"), up=("RTARTA", "RTA", "RTRT")),
    "B: four levels": replace(STAGE_B, widths=(32, 32, 64, 64), down=("RT", "RT", "RTA", "RTA"),
        up=("RTA", "RTARTA", "RT", "RTRT"), down_repeat=(1, 1, 1, 1), up_repeat=(3, 3, 2, 2))}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def inputs_of(config, height=8, width=10):
    """Three rows, with one image; no pixels, which are zeros."""
    inputs = unet_inputs(config, rows=3, height=height, width=width, tokens=11, images=1)
    inputs.pop("pixels", None)
    return inputs


@torch.no_grad()
def assert_same_prediction(unet, ours, theirs):
    x, r, *_ = theirs.values()
    condition = {name: value for name, value in theirs.items() if name not in ("x", "r")}
    assert_same(unet(**ours), diffusers_unet(unet)(x, r, **condition).sample)


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (8, 6)], ids=str)
@EACH_CONFIG
def test_a_unet_predicts_what_diffusers_predicts(config, size):
    size = [5 + side for side in size] if config.is_stage_b else size
    inputs = inputs_of(config, *size)
    assert_same_prediction(randomise(UNet(config), 1), inputs, inputs)


@pytest.mark.parametrize("config, name, ours, theirs", [
    (STAGE_C, "clip_img", noise(3, 3, 24), noise(3, 3, 24)),
    (STAGE_C, "clip_img", noise(3, 24), noise(3, 24)),
    (STAGE_C, "clip_img", None, torch.zeros(3, 1, 24)), (STAGE_B, "effnet", None, None),
    (STAGE_B, "pixels", noise(3, 3, 9, 7), noise(3, 3, 9, 7)),
    (STAGE_B, "clip_text_pooled", noise(3, 64), noise(3, 64)[:, None])],
    ids=["several image embeddings", "a flat image embedding", "no image embedding is zeros",
         "no semantic latent", "pixels", "a flat pooled embedding"])
def test_a_unet_takes_other_conditions(config, name, ours, theirs):
    inputs = inputs_of(config)
    assert_same_prediction(randomise(UNet(config), 3), inputs | {name: ours}, inputs | {name: theirs})


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


@EACH_CONFIG
def test_both_layouts_load_as_the_same_network(config, tmp_path):
    unet, inputs = randomise(UNet(config), 7), inputs_of(config)
    save(unet.state_dict(), tmp_path / "original.safetensors")
    diffusers_unet(unet).save_pretrained(tmp_path)
    for name in "original", "diffusion_pytorch_model":
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config and torch.equal(loaded(**inputs), unet(**inputs))


def test_a_stage_c_that_switches_resolution_is_refused(tmp_path):
    """diffusers can build one, but no official file has it."""
    diffusers_unet(randomise(UNet(STAGE_C), 8)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"switch_level": [True]}))
    with pytest.raises(CascadeError, match="switch_level"):
        load(tmp_path / "diffusion_pytorch_model.safetensors")
