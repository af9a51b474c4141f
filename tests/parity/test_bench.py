"""The benchmark runs at tiny sizes and compares the same networks. Its times mean nothing here."""
import subprocess
import sys

import pytest
from helpers import TESTS


def rows_of(*options):
    """The printed table, cell by cell, without its head."""
    command = [sys.executable, "-X", "utf8", str(TESTS / "porting" / "bench.py"), "--quick", *options]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_every_row_compares_ours_with_diffusers():
    rows = rows_of("--dtype", "fp32")
    assert len(rows) == 8 and sum("GB" in row[1] for row in rows) == 1
    for _, ours, theirs, ratio, _ in rows:
        ours, theirs = (float(cell.split()[0]) for cell in (ours, theirs))
        assert ours > 0 and theirs > 0 and float(ratio) == pytest.approx(ours / theirs, abs=0.02)
    assert all(float(row[4]) <= 1e-5 for row in rows[:4])


def test_every_optimisation_has_its_gain_and_changes_rounding_only():
    rows = rows_of("--gains", "--dtype", "fp32")
    assert len(rows) == 7
    assert all(float(row[2]) > 0 and float(row[3]) > 0 and float(row[5]) < 1e-5 for row in rows)
