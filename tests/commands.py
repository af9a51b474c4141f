"""Runs cascade.py within the process of a test, and watches what it loads, says and writes."""
import io
import weakref
from contextlib import redirect_stderr
from pathlib import Path

from safetensors.torch import load_file
from tiny import file_name, save

import cascade
import model

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--width", "64", "--height", "64"]
FEW = ["--steps", "2", "--decoder-steps", "1", *SMALL]


def command(*arguments, status=0):
    """Its messages, without the progress bars; it must exit with `status` and say nothing else."""
    error = io.StringIO()
    with redirect_stderr(error):
        assert cascade.main([*map(str, arguments), "--device", "cpu"]) == status, error.getvalue()
    lines = [line for line in error.getvalue().splitlines() if line and "Stage " != line[:6]]
    assert all(line.startswith("cascade.py: ") and line.isprintable() for line in lines), lines
    return lines


def refused(arguments, *texts):
    """The command refuses in one line with these texts and changes nothing in the working directory."""
    before = contents(".")
    (line,) = command(*arguments, status=2)
    assert all(text in line for text in texts) and contents(".") == before, line


def failing(error):
    def fail(*given, **named):
        raise error
    return fail


def contents(place):
    """{path: bytes} of a folder, at any depth; None for what is not a file."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(place).rglob("*")}


def change_tensors(weights, name, change, metadata=None):
    """Changes the tensors {name: tensor} of one network in the fixture `weights`."""
    path = weights / file_name(name)
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # it is a link
    save(tensors, path, dtype=None, metadata=metadata)


def count_networks(monkeypatch):
    """A list that tells, whenever a network is loaded, how many are in memory."""
    loaded, counts, load_into = [], [], model.Weights.load_into

    def counting(*given):
        network = load_into(*given)
        loaded.append(weakref.ref(network))
        counts.append(sum(reference() is not None for reference in loaded))
        return network

    monkeypatch.setattr(model.Weights, "load_into", counting)  # every network passes through it
    return counts
