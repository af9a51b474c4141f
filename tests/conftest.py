import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "weights", ROOT / "tests", ROOT / "tests" / "porting"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for tiny networks threads only cost time

import torch
from PIL import Image
from tiny import write_folder

import cascade
from cascade import Cascade

CHIPS = {"cuda": torch.cuda, "mps": torch.backends.mps}
if os.name == "nt":                                     # tests that make pipes or links
    os.mkfifo = os.symlink = Path.symlink_to = lambda *args: pytest.skip("Windows has none")


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: left out by -m "not slow"')
    for name in CHIPS:
        config.addinivalue_line("markers", f"{name}: skipped where {name} is not available")


def pytest_runtest_setup(item):
    for name, chip in CHIPS.items():
        if item.get_closest_marker(name) and not chip.is_available():
            pytest.skip(f"{name} is not available")


@pytest.fixture(autouse=True)
def only_marked_tests_use_a_gpu(request, monkeypatch):
    if not any(request.node.get_closest_marker(name) for name in CHIPS):
        monkeypatch.setattr(cascade, "default_device", lambda: "cpu")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def pipeline(folder):
    return Cascade(folder, "cpu", keep=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with an image in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("a.png")
    return tmp_path


@pytest.fixture
def weights(folder, place):
    """A copy of the weights folder, whose files may be replaced, but not written to: they are links."""
    return shutil.copytree(folder, place / "weights", copy_function=os.link)
