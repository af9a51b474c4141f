"""The image tower is transformers' CLIPVisionModelWithProjection, `fit` its CLIPImageProcessor, and what Stage C makes
of pictures is what diffusers' prior pipeline does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peers import assert_same, prior_pipeline, transformers_image
from PIL import Image
from tiny import IMAGE, randomise, write_folder
from transformers import CLIPImageProcessorPil

import text_encoder
from cascade import Cascade
from text_encoder import CLIP_MEAN, CLIP_STD, ImageEncoder, fit

CONFIGS = {
    "tiny": IMAGE,
    "gelu": replace(IMAGE, act="gelu", layers=2),
    "wide": replace(IMAGE, width=192, hidden=100, layers=1, projection=64, side=28, patch=14),
}


def picture(width, height):
    values = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def processed(picture, side):
    peer = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return peer(picture, return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    "size", [(224, 224), (640, 480), (481, 641), (97, 1000), (1000, 97), (33, 50), (1, 1)], ids=str
)
def test_a_picture_is_prepared_as_the_processor_does(size):
    ours, theirs = fit(picture(*size), 224), processed(picture(*size), 224)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    assert torch.allclose((ours - mean) / std, theirs[0], atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_embedding_is_that_of_transformers(config):
    image = randomise(ImageEncoder(config), 31)
    with torch.no_grad():
        theirs = transformers_image(image)(processed(picture(70, 50), config.side)).image_embeds
    assert_same(image(fit(picture(70, 50), config.side)[None]), theirs)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_folder_that_transformers_saved_loads(tmp_path, act):
    image = randomise(ImageEncoder(replace(IMAGE, act=act)), 32)
    transformers_image(image).save_pretrained(tmp_path)
    loaded = text_encoder.load(tmp_path / "model.safetensors", expect="image_encoder")
    assert loaded.config == image.config
    pixels = torch.rand(2, 3, 30, 30)
    assert torch.equal(loaded(pixels), image(pixels))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [[""], ["a red circle", "three stars"]], ids=len)
@pytest.mark.parametrize("given", ["one picture", "two pictures", "embeddings"])
def test_variations_are_those_of_diffusers(tmp_path, given, prompts, guidance):
    folder = write_folder(tmp_path, seed=3)
    if given == "embeddings":
        seen = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
        ours, theirs = seen, {"image_embeds": seen[None]}
    else:
        ours = [picture(70, 50), picture(31, 44)][: 1 if given == "one picture" else 2]
        theirs = {"images": ours}
    theirs = prior_pipeline(folder)(
        prompt=prompts,
        negative_prompt=["blue"] * len(prompts),
        width=128,
        height=128,
        num_inference_steps=4,
        guidance_scale=guidance,
        num_images_per_prompt=2,
        generator=[torch.Generator("cpu").manual_seed(7 + i) for i in range(2 * len(prompts))],
        **theirs,
    ).image_embeddings
    latents = Cascade(folder).prior(
        prompts, "blue", 128, 128, 4, guidance, images=2, seed=7, variation_images=ours
    )
    assert_same(latents, theirs)
