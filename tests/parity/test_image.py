"""The image encoder is transformers' CLIPVisionModelWithProjection, clip_preprocess its CLIPImageProcessor, and Stage C
with reference images is diffusers' prior pipeline."""
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, noise, random_image
from peers import image_processor, normalised, prior_pipeline, transformers_image
from tiny import IMAGE, randomise, write_folder

import text_encoder
from cascade import Cascade
from sampler import generators
from text_encoder import ImageEncoder, clip_preprocess

CONFIGS = {
    "tiny": IMAGE, "gelu": replace(IMAGE, act="gelu", layers=2),
    "wide": replace(IMAGE, width=192, hidden=100, layers=1, projection=64, side=28, patch=14)}


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (97, 1000), (1000, 97), (1, 1)], ids=str)
def test_an_image_is_preprocessed_as_by_the_processor(size):
    image = random_image(*size)
    theirs = image_processor(224)(image, return_tensors="pt").pixel_values[0]
    assert torch.allclose(normalised(clip_preprocess(image, 224)), theirs, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_embedding_is_that_of_transformers_and_its_folder_loads(config, tmp_path):
    encoder, pixels = randomise(ImageEncoder(config), 31), noise(2, 3, config.side, config.side).sigmoid()
    peer = transformers_image(encoder)
    assert_same(encoder(pixels), peer(normalised(pixels)).image_embeds)
    peer.save_pretrained(tmp_path)
    loaded = text_encoder.load(tmp_path / "model.safetensors", expect="image_encoder")
    assert loaded.config == config and torch.equal(loaded(pixels), encoder(pixels))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [[""], ["a red circle", "three stars"]], ids=len)
@pytest.mark.parametrize("reference", ["one image", "two images", "embeddings"])
def test_variations_are_those_of_diffusers(tmp_path, reference, prompts, guidance):
    cascade, size = Cascade(write_folder(tmp_path, seed=3)), {"width": 128, "height": 128}
    ours = {"one image": [random_image(70, 50)], "two images": [random_image(70, 50), random_image(31, 44)],
            "embeddings": noise(2, 24)}[reference]
    images = {"image_embeds": ours[None]} if reference == "embeddings" else {"images": ours}
    theirs = prior_pipeline(cascade)(
        prompt=prompts, negative_prompt=["blue"] * len(prompts), num_inference_steps=4, guidance_scale=guidance,
        num_images_per_prompt=2, generator=generators(7, 2 * len(prompts)), **size, **images).image_embeddings
    latents = cascade.prior(
        prompts, "blue", steps=4, guidance=guidance, images=2, seed=7, variation_images=ours, **size)
    assert_same(latents, theirs)
