"""Every network passes through torch.export as a whole, at one image size and for any batch."""
import operator

import pytest
import torch
from exporting import INPUTS, assert_same_for_any_batch, exported, network
from helpers import assert_same, noise, slow_except

NETWORKS = slow_except(INPUTS, "stage_a decode")


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_batch_of_an_exported_network_is_dynamic(name):
    program = exported(name)
    assert len(program.range_constraints) == 1
    inputs = program.graph_signature.user_inputs
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in inputs]
    assert len(shapes) == len(INPUTS[name](1))
    for batch, *sides in shapes:
        assert not isinstance(batch, int) and all(isinstance(side, int) for side in sides)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_in_an_exported_network_depends_on_the_data(name):
    """Plain operators only: no branch, no loop, no number read out of a tensor."""
    aten = torch.ops.aten
    targets = {node.target for node in exported(name).graph.nodes if node.op == "call_function"}
    plain = {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert targets - plain <= {operator.getitem, operator.mul, operator.add, operator.floordiv}
    assert {target.namespace for target in plain} == {"aten"}
    assert not plain & {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), exported(name).module(), INPUTS[name], 1e-6)


@pytest.mark.slow
def test_an_exported_network_can_be_saved(tmp_path):
    torch.export.save(exported("stage_c"), tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    assert_same_for_any_batch(network("stage_c"), loaded, INPUTS["stage_c"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, multiple", [("stage_c", 1), ("stage_b", 8)])
def test_the_sides_of_a_unet_can_be_left_open(name, multiple):
    """As the docstring of porting/export.py says."""
    rows, high, wide = torch.export.Dim("rows"), torch.export.Dim("high", min=2), torch.export.Dim("wide", min=2)
    inputs = INPUTS[name](2)
    channels = inputs["x"].shape[1]
    inputs["x"] = noise(2, channels, 4 * multiple, 6 * multiple)
    shapes = {key: {0: rows} for key in inputs}
    shapes["x"] |= {2: multiple * high, 3: multiple * wide}
    program = torch.export.export(network(name), (), inputs, dynamic_shapes=shapes).module()
    other = INPUTS[name](3) | {"x": noise(3, channels, 3 * multiple, 5 * multiple)}
    assert_same(program(**other), network(name)(**other), 1e-6)
