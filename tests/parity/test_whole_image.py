"""The sampler is diffusers' DDPMWuerstchenScheduler, step by step, and the image for a seed that of its pipelines."""
import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from helpers import assert_same, noise, random_image
from peers import combined_pipeline, draw, prior_pipeline
from tiny import write_diffusers_folder, write_folder

import sampler
from cascade import Cascade


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 60])
def test_every_step_is_the_schedulers(steps):
    """The same predictions; noise from the same generators in the same order: the first latent, then every step."""
    peer, shape = DDPMWuerstchenScheduler(), (4, 6, 5)
    peer.set_timesteps(steps)
    assert torch.equal(sampler.timesteps(steps), peer.timesteps)
    ours = sampler.generators(5, 3)
    theirs = [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
    x = sampler.draw_noise(ours, shape, "cpu")
    assert torch.equal(x, torch.stack([torch.randn(shape, generator=generator) for generator in theirs]))
    for i, (t, t_next) in enumerate(zip(peer.timesteps[:-1], peer.timesteps[1:])):
        eps = noise(3, *shape, seed=i)
        step_noise = sampler.draw_noise(ours, shape, "cpu") * (t_next > 0)
        y = peer.step(eps, t.expand(3), x, generator=theirs).prev_sample
        x = sampler.ddpm(x, eps, step_noise, sampler.alpha_bar(t), sampler.alpha_bar(t_next))
        assert_same(x, y, 1e-6)
    for a, b in zip(ours, theirs):                      # the last step drew as well
        assert torch.equal(torch.randn(20, generator=a), torch.randn(20, generator=b))


# ------------------------------------------------------------------------------ whole images
PROMPTS, NEGATIVE = ["a red circle", "three little stars, above them the moon"], ["blue", "a wall"]
SMALL = {"width": 128, "height": 128}
CASES = {
    "guidance on both stages": SMALL | {
        "steps": 4, "decoder_steps": 3, "decoder_guidance": 1.5, "images": 2, "seed": 7},
    "the default, guidance on Stage C only": SMALL | {"steps": 20, "decoder_steps": 10, "seed": 3},
    "no guidance": {"width": 256, "height": 128, "steps": 3, "decoder_steps": 2, "guidance": 1.0,
                    "images": 2, "seed": 11}}


@pytest.fixture(scope="module")
def peer_and_folders(tmp_path_factory):
    original = write_folder(tmp_path_factory.mktemp("original"), seed=3)
    diffusers = write_diffusers_folder(tmp_path_factory.mktemp("diffusers"), original)
    return combined_pipeline(Cascade(original)), (original, diffusers)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_image_is_the_same_from_both_layouts(peer_and_folders, case):
    peer, folders = peer_and_folders
    theirs = draw(peer, PROMPTS, NEGATIVE, **case)
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5 and theirs[inside].std() > 0.05, "the comparison would prove little"
    assert len({image.tobytes() for image in theirs}) == len(PROMPTS) * case.get("images", 1)
    for folder in folders:
        ours = Cascade(folder)(PROMPTS, NEGATIVE, output="np", **case)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1e-5


# ------------------------------------------------------------------------------ Stage C with reference images
REFERENCES = {"one image": [random_image(70, 50)], "embeddings": noise(2, 24),
              "two images": [random_image(70, 50), random_image(31, 44)]}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [[""], ["a red circle", "three stars"]], ids=len)
@pytest.mark.parametrize("reference", REFERENCES)
def test_variations_are_those_of_diffusers(tmp_path, reference, prompts, guidance):
    cascade, size = Cascade(write_folder(tmp_path, seed=3)), {"width": 128, "height": 128}
    ours = REFERENCES[reference]
    images = {"image_embeds": ours[None]} if reference == "embeddings" else {"images": ours}
    theirs = prior_pipeline(cascade)(
        prompt=prompts, negative_prompt=["blue"] * len(prompts), num_images_per_prompt=2,
        num_inference_steps=4, guidance_scale=guidance, generator=sampler.generators(7, 2 * len(prompts)),
        **size, **images)
    latents = cascade.prior(prompts, "blue", images=2, steps=4, guidance=guidance, seed=7,
                            variation_images=ours, **size)
    assert_same(latents, theirs.image_embeddings)
