import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "weights", ROOT / "tests", ROOT / "tests" / "porting"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for tiny networks threads only cost time

from tiny import write_folder

from cascade import Cascade


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: left out by -m "not slow"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def pipeline(folder):
    return Cascade(folder, keep=True)
