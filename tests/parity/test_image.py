"""The image encoder is transformers' CLIPVisionModelWithProjection, clip_preprocess its CLIPImageProcessor, and Stage C
with reference images is diffusers' prior pipeline."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same, noise
from peers import image_processor, normalised, prior_pipeline, transformers_image
from PIL import Image
from tiny import IMAGE, randomise, write_folder

import text_encoder
from cascade import Cascade
from text_encoder import ImageEncoder, clip_preprocess

CONFIGS = {
    "tiny": IMAGE, "gelu": replace(IMAGE, act="gelu", layers=2),
    "wide": replace(IMAGE, width=192, hidden=100, layers=1, projection=64, side=28, patch=14)}


def image_of(width, height):
    random = np.random.default_rng([width, height])
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (97, 1000), (1000, 97), (1, 1)], ids=str)
def test_an_image_is_preprocessed_as_by_the_processor(size):
    image = image_of(*size)
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
    folder = write_folder(tmp_path, seed=3)
    ours = {"one image": [image_of(70, 50)], "two images": [image_of(70, 50), image_of(31, 44)],
            "embeddings": noise(2, 24)}[reference]
    images = {"image_embeds": ours[None]} if reference == "embeddings" else {"images": ours}
    theirs = prior_pipeline(Cascade(folder))(
        prompt=prompts, negative_prompt=["blue"] * len(prompts), width=128, height=128, num_inference_steps=4,
        guidance_scale=guidance, num_images_per_prompt=2, **images,
        generator=[torch.Generator("cpu").manual_seed(7 + i) for i in range(2 * len(prompts))]).image_embeddings
    latents = Cascade(folder).prior(prompts, "blue", width=128, height=128, steps=4, guidance=guidance, images=2, seed=7,
                                    variation_images=ours)
    assert_same(latents, theirs)
