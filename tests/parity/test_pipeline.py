"""The picture for a seed is that of diffusers' combined pipeline."""
import numpy as np
import pytest
import torch
from diffusers import StableCascadeCombinedPipeline
from peers import diffusers_stage_a, diffusers_unet, scheduler, transformers_text
from tiny import write_diffusers_folder, write_folder
from transformers import CLIPTokenizer

import cascade
from model import load
from text_encoder import load as load_text

PROMPTS, NEGATIVE = ["a red circle", "three little stars, above them the moon"], ["blue", "a wall"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    original = write_folder(tmp_path_factory.mktemp("original"), seed=3)
    return original, write_diffusers_folder(tmp_path_factory.mktemp("diffusers"), original)


@pytest.fixture(scope="module")
def peer(folders):
    folder, _ = folders
    unets = [diffusers_unet(load(folder / f"{name}.safetensors")) for name in ("stage_c", "stage_b")]
    text = transformers_text(load_text(folder / "text_encoder"))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    pipeline = StableCascadeCombinedPipeline(
        tokenizer=tokenizer, text_encoder=text, decoder=unets[1], scheduler=scheduler(),
        vqgan=diffusers_stage_a(load(folder / "stage_a.safetensors")), prior_prior=unets[0], prior_text_encoder=text,
        prior_tokenizer=tokenizer, prior_scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = {
    "guidance on both stages": dict(width=128, height=128, steps=4, guidance=4.0, decoder_steps=3, decoder_guidance=1.5,
                                    images=2, seed=7),
    "the default, guidance on Stage C alone": dict(width=128, height=128, steps=20, guidance=4.0, decoder_steps=10, seed=3),
    "no guidance": dict(width=256, height=128, steps=3, guidance=1.0, decoder_steps=2, images=2, seed=11),
}


@pytest.mark.parametrize("layout", [0, 1], ids=["original files", "diffusers folders"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_picture_is_the_same(folders, peer, case, layout):
    count = 2 * case.get("images", 1)
    theirs = peer(
        prompt=PROMPTS, negative_prompt=NEGATIVE, width=case["width"], height=case["height"], output_type="np",
        prior_num_inference_steps=case["steps"], prior_guidance_scale=case["guidance"],
        num_inference_steps=case["decoder_steps"], decoder_guidance_scale=case.get("decoder_guidance", 0.0),
        num_images_per_prompt=case.get("images", 1),
        generator=[torch.Generator("cpu").manual_seed(case["seed"] + i) for i in range(count)]).images
    ours = cascade.Cascade(folders[layout])(PROMPTS, NEGATIVE, output="np", **case)
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5 and theirs[inside].std() > 0.05, "the comparison would say little"
    assert ours.shape == theirs.shape and len({picture.tobytes() for picture in theirs}) == count
    assert np.abs(ours - theirs).max() <= 1e-5
