"""Stage B and C are diffusers' StableCascadeUNet."""

from dataclasses import replace

import pytest
import torch
from peers import assert_same, diffusers_unet
from tiny import STAGE_B, STAGE_C, randomise, save, to_diffusers

from model import UNet, load

C_CONFIGS = {
    "tiny": STAGE_C,
    "one group a level, equal widths": replace(
        STAGE_C,
        widths=(64, 64),
        down=("RTA", "RTA"),
        up=("RTA", "RTA"),
        down_repeat=(1, 1),
        up_repeat=(1, 1),
        c_cond=64,
    ),
    "repeats everywhere": replace(STAGE_C, down_repeat=(3, 2), up_repeat=(2, 3), text=40, image=40),
    "a level that switches resolution": replace(STAGE_C, switch=(True,)),
    "three levels": replace(
        STAGE_C,
        widths=(64, 64, 128),
        down=("RTA",) * 3,
        up=("RTA",) * 3,
        down_repeat=(1, 1, 1),
        up_repeat=(1, 2, 1),
        switch=(False, True),
    ),
}
B_CONFIGS = {
    "tiny": STAGE_B,
    "repeats everywhere": replace(STAGE_B, down_repeat=(2, 1, 3), up_repeat=(2, 3, 2)),
    "attention at the second level": replace(
        STAGE_B, widths=(32, 64, 128), down=("RT", "RTARTA", "RTA"), up=("RTARTA", "RTA", "RTRT")
    ),
    "four levels": replace(
        STAGE_B,
        widths=(32, 32, 64, 64),
        down=("RT", "RT", "RTA", "RTA"),
        up=("RTA", "RTARTA", "RT", "RTRT"),
        down_repeat=(1, 1, 1, 1),
        up_repeat=(3, 3, 2, 2),
    ),
}


def inputs(config, size, seed=0, batch=3, tokens=11):
    torch.manual_seed(seed)
    given = {"clip_text_pooled": torch.randn(batch, 1, config.text)}
    if config.semantic:
        given["effnet"] = torch.randn(batch, 16, 5, 4)
    else:
        given |= {"clip_text": torch.randn(batch, tokens, config.text), "clip_img": torch.randn(batch, 1, config.image)}
    return torch.randn(batch, config.latent, *size), torch.rand(batch), given


def both(unet, x, r, **given):
    with torch.no_grad():
        return unet(x, r, **given), diffusers_unet(unet)(x, r, **given).sample


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (8, 6)], ids=str)
@pytest.mark.parametrize("config", C_CONFIGS.values(), ids=C_CONFIGS)
def test_stage_c_predicts_what_diffusers_predicts(config, size):
    x, r, given = inputs(config, size)
    assert_same(*both(randomise(UNet(config), 1), x, r, **given))


@pytest.mark.parametrize("size", [(16, 16), (22, 30), (26, 18)], ids=str)
@pytest.mark.parametrize("config", B_CONFIGS.values(), ids=B_CONFIGS)
def test_stage_b_predicts_what_diffusers_predicts(config, size):
    x, r, given = inputs(config, size)
    assert_same(*both(randomise(UNet(config), 2), x, r, **given))


def test_stage_c_sees_several_image_embeddings():
    x, r, given = inputs(STAGE_C, (4, 5))
    given["clip_img"] = torch.randn(3, 3, STAGE_C.image)
    assert_same(*both(randomise(UNet(STAGE_C), 3), x, r, **given))


def test_a_missing_image_embedding_is_zeros():
    unet = randomise(UNet(STAGE_C), 3)
    x, r, given = inputs(STAGE_C, (4, 5))
    _, theirs = both(unet, x, r, **given | {"clip_img": torch.zeros(3, 1, STAGE_C.image)})
    assert_same(unet(x, r, given["clip_text_pooled"], given["clip_text"]), theirs)


def test_stage_b_without_a_semantic_latent_adds_none():
    x, r, given = inputs(STAGE_B, (16, 16))
    assert_same(*both(randomise(UNet(STAGE_B), 4), x, r, **given | {"effnet": None}))


def test_stage_b_sees_pixels():
    x, r, given = inputs(STAGE_B, (16, 20))
    assert_same(*both(randomise(UNet(STAGE_B), 4), x, r, **given | {"pixels": torch.rand(3, 3, 9, 7)}))


@pytest.mark.parametrize("config", [STAGE_B, STAGE_C], ids=["B", "C"])
def test_a_flat_pooled_embedding_is_one_row(config):
    unet = randomise(UNet(config), 5)
    x, r, given = inputs(config, (8, 8))
    _, theirs = both(unet, x, r, **given)  # diffusers fails on the flat one
    assert_same(unet(x, r, **given | {"clip_text_pooled": given["clip_text_pooled"].squeeze(1)}), theirs)


def test_a_flat_image_embedding_is_one_row():
    x, r, given = inputs(STAGE_C, (4, 4))
    given["clip_img"] = given["clip_img"].squeeze(1)
    assert_same(*both(randomise(UNet(STAGE_C), 5), x, r, **given))


def test_sca_and_crp_of_each_row_reach_it():
    unet = randomise(UNet(STAGE_C), 6)
    x, r, given = inputs(STAGE_C, (4, 4))
    sca, crp = torch.tensor([0.2, 0.0, 0.9]), torch.tensor([0.4, 0.7, 0.0])
    peer = diffusers_unet(unet)  # it takes them one row at a time
    with torch.no_grad():
        theirs = torch.cat(
            [
                peer(
                    x[i : i + 1],
                    r[i : i + 1],
                    sca=sca[i : i + 1],
                    crp=crp[i : i + 1],
                    **{name: value[i : i + 1] for name, value in given.items()},
                ).sample
                for i in range(3)
            ]
        )
    assert_same(unet(x, r, sca=sca, crp=crp, **given), theirs)
    assert (unet(x, r, **given) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("config", [STAGE_C, *B_CONFIGS.values(), C_CONFIGS["repeats everywhere"]])
def test_both_layouts_load_as_the_same_network(config, tmp_path):
    unet = randomise(UNet(config), 7)
    save(unet.state_dict(), tmp_path / "original.safetensors")
    save(to_diffusers(unet.state_dict()), tmp_path / "diffusers.safetensors")
    x, r, given = inputs(config, (16, 18))
    for name in ("original", "diffusers"):
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config
        assert torch.equal(loaded(x, r, **given), unet(x, r, **given))


def test_a_file_that_diffusers_saved_loads(tmp_path):
    unet = randomise(UNet(STAGE_B), 8)
    diffusers_unet(unet).save_pretrained(tmp_path)
    x, r, given = inputs(STAGE_B, (8, 10))
    assert torch.equal(load(tmp_path / "diffusion_pytorch_model.safetensors")(x, r, **given), unet(x, r, **given))
