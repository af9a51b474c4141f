import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "weights"), str(ROOT / "tests")]

from tiny import write_folder

from cascade import Cascade


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def pipeline(folder):
    return Cascade(folder, keep=True)
