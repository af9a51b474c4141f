"""Every network, exported to ONNX and run by onnxruntime, gives PyTorch's numbers for any batch."""
from dataclasses import replace

import export
import pytest
import torch
from export import to_onnx
from exporting import INPUTS, assert_same_for_any_batch, network
from tiny import STAGE_B, randomise

from model import UNet

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def session_of(model):
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run_onnx(name):
    """The network as a function that onnxruntime computes."""
    program = to_onnx(network(name), INPUTS[name](2))
    session = session_of(program.model_proto.SerializeToString())

    def run(**inputs):
        outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(y) for y in outputs]

    return run


@pytest.mark.parametrize("name", INPUTS)
def test_onnxruntime_gives_the_same_numbers_for_any_batch(name):
    assert_same_for_any_batch(network(name), run_onnx(name), INPUTS[name], 1e-5)


@pytest.mark.slow
def test_the_command_writes_a_network(folder, tmp_path, capsys):
    out = tmp_path / "onnx"
    command = f"--weights {folder} --size 100 64 --out {out} --networks stage_b"
    assert export.main(command.split()) == 0
    x, = [value for value in session_of(out / "stage_b.onnx").get_inputs() if value.name == "x"]
    assert x.shape[1:] == [4, 16, 26] and "stage_b.onnx: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_nodes_of_a_deep_network_follow_from_those_of_shallow_ones(monkeypatch):
    down = "RTRT", "RT", "RTARTARTA"
    config = replace(STAGE_B, down=down, up=down[::-1], up_repeat=(2, 1, 1))
    monkeypatch.setitem(export.OFFICIAL, "stage_b", (UNet, config))
    program = to_onnx(*export.with_inputs(randomise(UNet(config), 0), "stage_b", 128, 128))
    assert export.official_nodes("stage_b", False, 128, 128) == len(program.model.graph)


@pytest.mark.parametrize("arguments, message", [
    ("--size 9 9", "width: expected an integer from 64 to 8192, got 9"), ("--out {file}", "File exists"),
    ("--networks stage_d", "invalid choice"), ("--weights nowhere", "cannot open this folder")])
def test_a_mistake_ends_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    assert export.main(arguments.format(file=tmp_path / "file").split()) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("export.py: ") and message in line
