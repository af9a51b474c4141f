"""Every network, exported to ONNX and run by onnxruntime, gives PyTorch's numbers for any batch."""
import pytest
import torch
from exporting import INPUTS, assert_same_for_any_batch, exported, network

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def to_onnx(name):
    """The network as a function that onnxruntime computes. Not optimised: the optimiser would fold the 32 frequencies of
    the time embedding with numpy's exp, which differs by one ulp in places, and one ulp of a frequency is up to 6e-4 rad
    of its angle."""
    program = torch.onnx.export(exported(name), (), kwargs=INPUTS[name](2), optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **inputs: [torch.from_numpy(y) for y in
                             session.run(None, {name: value.numpy() for name, value in inputs.items()})]


@pytest.mark.parametrize("name", INPUTS)
def test_onnxruntime_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), to_onnx(name), INPUTS[name], 1e-5)
