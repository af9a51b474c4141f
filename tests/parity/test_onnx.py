"""Every network, exported to ONNX and run by onnxruntime, gives PyTorch's numbers for any batch."""

import pytest
import torch
from test_export import GIVEN, assert_same_for_any_batch, exported, network

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def onnx(name):
    """The network as a function that onnxruntime computes; the inputs keep their names. Unoptimised, for the optimiser
    would fold the 32 frequencies of the time embedding with numpy's exp. That is one ulp off here and there, and one
    ulp of a frequency is up to 6e-4 rad of its angle."""
    program = torch.onnx.export(exported(name), (), kwargs=GIVEN[name](2), optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **given: [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in given.items()})]


@pytest.mark.parametrize("name", GIVEN)
def test_onnxruntime_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), onnx(name), GIVEN[name], 1e-5)
