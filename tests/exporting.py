"""The tiny networks as torch.export sees them, for tests/test_export.py and tests/parity/test_onnx.py."""
from functools import cache

import torch
from export import Method, export
from helpers import assert_same, noise
from tiny import networks


def text_inputs(batch):
    ids = torch.randint(0, 519, (batch, 77), generator=torch.Generator().manual_seed(batch))
    ends = torch.arange(2, 2 + batch)[:, None]  # another one in each row
    ids[torch.arange(77) >= ends] = 519
    return {"ids": ids, "mask": (torch.arange(77) <= ends).long()}


# name -> its inputs for a batch
INPUTS = {
    "stage_c": lambda batch: {
        "x": noise(batch, 16, 5, 6), "r": noise(batch).sigmoid(), "clip_img": noise(batch, 1, 24),
        "clip_text_pooled": noise(batch, 1, 64), "clip_text": noise(batch, 77, 64)},
    "stage_b": lambda batch: {
        "x": noise(batch, 4, 22, 18), "r": noise(batch).sigmoid(),
        "clip_text_pooled": noise(batch, 1, 64), "effnet": noise(batch, 16, 4, 3)},
    "stage_a encode": lambda batch: {"x": noise(batch, 3, 24, 32).sigmoid()},
    "stage_a decode": lambda batch: {"x": 30 * noise(batch, 4, 7, 9)},
    "effnet_encoder": lambda batch: {"image": noise(batch, 3, 64, 96).sigmoid()},
    "previewer": lambda batch: {"latent": noise(batch, 16, 4, 5)}, "text_encoder": text_inputs,
    "image_encoder": lambda batch: {"pixels": noise(batch, 3, 30, 30).sigmoid()}}


@cache
def network(name):
    name, _, method = name.partition(" ")
    return Method(networks()[name], method) if method else networks()[name]


@cache
def exported(name):
    return export(network(name), INPUTS[name](2))


def assert_same_for_any_batch(network, exported, inputs, tolerance):
    """Batches of 1, 2, which it was exported with, and 5."""
    for batch in (1, 2, 5):
        ours, theirs = network(**inputs(batch)), exported(**inputs(batch))
        ours, theirs = ([y] if torch.is_tensor(y) else list(y) for y in (ours, theirs))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(other, one, tolerance)
