"""Every network is diffusers' or transformers': Stage B and C, Stage A, the image encoder with its preprocessing. The text
encoder is in test_text.py."""
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise, random_image, unet_inputs
from peers import diffusers_stage_a, diffusers_unet, image_processor, normalised, transformers_image
from tiny import IMAGE, STAGE_A, STAGE_B, STAGE_C, randomise, save

import text_encoder
from model import StageA, UNet, load
from text_encoder import ImageEncoder, clip_preprocess

# ------------------------------------------------------------------------------ Stage B and C are diffusers' StableCascadeUNet
UNETS = {"C": STAGE_C, "C: one group per level, equal widths": replace(
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
EACH_UNET = pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)


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
@EACH_UNET
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


@EACH_UNET
def test_both_layouts_of_a_unet_load_as_the_same_network(config, tmp_path):
    unet, inputs = randomise(UNet(config), 7), inputs_of(config)
    save(unet.state_dict(), tmp_path / "original.safetensors")
    diffusers_unet(unet).save_pretrained(tmp_path)
    for name in "original", "diffusion_pytorch_model":
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config and torch.equal(loaded(**inputs), unet(**inputs))


# ------------------------------------------------------------------------------ Stage A is diffusers' PaellaVQModel
STAGES_A = {
    "tiny": STAGE_A,
    "wide": replace(STAGE_A, widths=(24, 48), deep_blocks=1, codes=100, scale_factor=0.3764),
    "three levels": replace(STAGE_A, widths=(8, 16, 32), deep_blocks=2, latent_channels=6)}
EACH_STAGE_A = pytest.mark.parametrize("config", STAGES_A.values(), ids=STAGES_A)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 5)], ids=str)
@EACH_STAGE_A
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


@EACH_STAGE_A
def test_both_layouts_of_stage_a_load_as_the_same_network(tmp_path, config):
    """The scale factor is in diffusers' config.json, next to the files."""
    stage_a, z = randomise(StageA(config), 13), noise(1, config.latent_channels, 5, 6)
    save(stage_a.state_dict(), tmp_path / "original.safetensors")
    diffusers_stage_a(stage_a).save_pretrained(tmp_path)
    for name in "original", "diffusion_pytorch_model":
        loaded = load(tmp_path / f"{name}.safetensors")
        assert loaded.config == config and torch.equal(loaded.decode(z), stage_a.decode(z))


# ------------------------------------------------------------------------------ the image encoder is transformers' CLIPVisionModelWithProjection
IMAGE_ENCODERS = {
    "tiny": IMAGE, "gelu": replace(IMAGE, act="gelu", layers=2),
    "wide": replace(IMAGE, width=192, hidden=100, layers=1, projection=64, side=28, patch=14)}


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (97, 1000), (1000, 97), (1, 1)], ids=str)
def test_an_image_is_preprocessed_as_by_the_processor(size):
    image = random_image(*size)
    theirs = image_processor(224)(image, return_tensors="pt").pixel_values[0]
    assert torch.allclose(normalised(clip_preprocess(image, 224)), theirs, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", IMAGE_ENCODERS.values(), ids=IMAGE_ENCODERS)
def test_the_embedding_is_that_of_transformers_and_its_folder_loads(config, tmp_path):
    encoder = randomise(ImageEncoder(config), 31)
    pixels = noise(2, 3, config.side, config.side).sigmoid()
    peer = transformers_image(encoder)
    assert_same(encoder(pixels), peer(normalised(pixels)).image_embeds)
    peer.save_pretrained(tmp_path)
    loaded = text_encoder.load(tmp_path / "model.safetensors", expect="image_encoder")
    assert loaded.config == config and torch.equal(loaded(pixels), encoder(pixels))
