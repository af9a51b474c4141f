"""The picture for a seed is that of diffusers' combined pipeline."""

import numpy as np
import pytest
import torch
from peers import combined_pipeline
from tiny import write_diffusers_folder, write_folder

import cascade

PROMPTS, NEGATIVE = ["a red circle", "three little stars, above them the moon"], ["blue", "a wall"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    original = write_folder(tmp_path_factory.mktemp("original"), seed=3)
    return original, write_diffusers_folder(tmp_path_factory.mktemp("diffusers"), original)


@pytest.fixture(scope="module")
def peer(folders):
    return combined_pipeline(folders[0])


CASES = {
    "guidance on both stages": dict(
        width=128, height=128, steps=4, guidance=4.0, decoder_steps=3, decoder_guidance=1.5, images=2, seed=7
    ),
    "the default, guidance on Stage C alone": dict(
        width=128, height=128, steps=20, guidance=4.0, decoder_steps=10, seed=3
    ),
    "no guidance": dict(width=256, height=128, steps=3, guidance=1.0, decoder_steps=2, images=2, seed=11),
}


@pytest.mark.parametrize("layout", [0, 1], ids=["original files", "diffusers folders"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_picture_is_the_same(folders, peer, case, layout):
    count = 2 * case.get("images", 1)
    theirs = peer(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        width=case["width"],
        height=case["height"],
        output_type="np",
        prior_num_inference_steps=case["steps"],
        prior_guidance_scale=case["guidance"],
        num_inference_steps=case["decoder_steps"],
        decoder_guidance_scale=case.get("decoder_guidance", 0.0),
        num_images_per_prompt=case.get("images", 1),
        generator=[torch.Generator("cpu").manual_seed(case["seed"] + i) for i in range(count)],
    ).images
    ours = cascade.Cascade(folders[layout])(PROMPTS, NEGATIVE, output="np", **case)
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5 and theirs[inside].std() > 0.05, "the comparison would say little"
    assert ours.shape == theirs.shape and len({picture.tobytes() for picture in theirs}) == count
    assert np.abs(ours - theirs).max() <= 1e-5
