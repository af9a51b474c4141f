"""Every network, exported to ONNX and run by onnxruntime, gives PyTorch's numbers for any batch."""
import pytest
import torch
from export import to_onnx
from exporting import INPUTS, assert_same_for_any_batch, network

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(name):
    """The network as a function that onnxruntime computes."""
    program = to_onnx(network(name), INPUTS[name](2))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **inputs: [torch.from_numpy(y) for y in
                             session.run(None, {name: value.numpy() for name, value in inputs.items()})]


@pytest.mark.parametrize("name", INPUTS)
def test_onnxruntime_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), run_onnx(name), INPUTS[name], 1e-5)
