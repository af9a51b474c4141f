"""Every network goes through torch.export whole: strictly, so without a graph break, at one size and for any batch."""

import operator
from functools import cache

import pytest
import tiny
import torch
from torch import nn

from cascade import TINY
from model import load


class Way(nn.Module):
    """One of Stage A's two ways, as a network of its own."""

    def __init__(self, stage_a, name):
        super().__init__()
        self.stage_a, self.name = stage_a, name

    def forward(self, x):
        return getattr(self.stage_a, self.name)(x)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text(batch):
    ids = torch.randint(0, 519, (batch, 77), generator=torch.Generator().manual_seed(batch))
    ends = torch.arange(2, 2 + batch)[:, None]  # every row has an end of its own
    ids[torch.arange(77) >= ends] = 519
    return {"ids": ids, "mask": (torch.arange(77) <= ends).long()}


def for_c(batch, width=64, image=24):
    pooled, hidden, seen = noise(batch, 1, width), noise(batch, 77, width), noise(batch, 1, image)
    return {"x": noise(batch, 16, 5, 6), "r": noise(batch).sigmoid(), "clip_text_pooled": pooled,
            "clip_text": hidden, "clip_img": seen}


def for_b(batch):
    return {"x": noise(batch, 4, 22, 18), "r": noise(batch).sigmoid(), "clip_text_pooled": noise(batch, 1, 64),
            "effnet": noise(batch, 16, 4, 3)}


# name -> what it is given, by the batch
GIVEN = {
    "stage_c": for_c,
    "stage_b": for_b,
    "stage_a encode": lambda batch: {"x": noise(batch, 3, 24, 32).sigmoid()},
    "stage_a decode": lambda batch: {"x": 30 * noise(batch, 4, 7, 9)},
    "effnet_encoder": lambda batch: {"image": noise(batch, 3, 64, 96).sigmoid()},
    "previewer": lambda batch: {"latent": noise(batch, 16, 4, 5)},
    "text_encoder": text,
    "image_encoder": lambda batch: {"pixels": noise(batch, 3, 30, 30).sigmoid()},
}


@cache
def network(name):
    made = {key.removesuffix("/model"): value for key, value in tiny.networks().items()}
    name, _, way = name.partition(" ")
    return Way(made[name], way) if way else made[name]


def export(network, given):
    batch = torch.export.Dim("batch")
    return torch.export.export(network, (), given, dynamic_shapes={name: {0: batch} for name in given}, strict=True)


@cache
def exported(name):
    return export(network(name), GIVEN[name](2))


def assert_same_for_any_batch(network, run, given, relative):
    """`run` is the exported network; 2 is the batch that it was exported with."""
    for batch in (1, 2, 5):
        ours, theirs = (y if isinstance(y, tuple | list) else (y,) for y in (network(**given(batch)),
                                                                            run(**given(batch))))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert one.shape == other.shape and one.std() > 1e-2
            error = ((one - other).abs().max() / one.abs().max()).item()
            assert error <= relative, f"batch {batch}: relative error {error:.1e}"


@pytest.mark.parametrize("name", GIVEN)
def test_a_network_exports_with_the_batch_as_its_only_unknown(name):
    program = exported(name)
    assert len(program.range_constraints) == 1
    inputs = program.graph_signature.user_inputs
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in inputs]
    assert len(shapes) == len(GIVEN[name](1))
    assert all(not isinstance(shape[0], int) and all(isinstance(side, int) for side in shape[1:]) for shape in shapes)


@pytest.mark.parametrize("name", GIVEN)
def test_nothing_in_an_exported_network_depends_on_the_data(name):
    """Plain operators only: no branch, no loop, no number read out of a tensor."""
    targets = {node.target for node in exported(name).graph.nodes if node.op == "call_function"}
    plain = {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert targets - plain <= {operator.getitem, operator.mul, operator.add, operator.floordiv}
    assert {target.namespace for target in plain} == {"aten"}
    assert not plain & {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                        torch.ops.aten.masked_select.default}


@pytest.mark.parametrize("name", GIVEN)
def test_an_exported_network_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), exported(name).module(), GIVEN[name], 1e-6)


def test_the_small_cascades_stage_c_exports_too():
    unet = load(TINY / "stage_c.safetensors", dtype=torch.float32)

    def given(batch):
        return for_c(batch, unet.config.text, unet.config.image) | {"x": noise(batch, 16, 3, 3)}

    assert_same_for_any_batch(unet, export(unet, given(2)).module(), given, 1e-6)
