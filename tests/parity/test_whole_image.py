"""The image for a seed is that of diffusers' combined pipeline."""
import numpy as np
import pytest
from peers import combined_pipeline, draw
from tiny import write_diffusers_folder, write_folder

from cascade import Cascade

PROMPTS, NEGATIVE = ["a red circle", "three little stars, above them the moon"], ["blue", "a wall"]
SMALL = {"width": 128, "height": 128}
CASES = {
    "guidance on both stages": SMALL | {
        "steps": 4, "decoder_steps": 3, "decoder_guidance": 1.5, "images": 2, "seed": 7},
    "the default, guidance on Stage C only": SMALL | {"steps": 20, "decoder_steps": 10, "seed": 3},
    "no guidance": {"width": 256, "height": 128, "steps": 3, "guidance": 1.0, "decoder_steps": 2, "images": 2,
                    "seed": 11}}


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
