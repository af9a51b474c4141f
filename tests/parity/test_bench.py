"""Every row of tests/bench.py comes, at tiny sizes, and both sides run the same networks. No time is judged here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench.py"


def tables(*options):
    """The lines of the printed table, cell by cell, below its head; and what stands before it."""
    run = subprocess.run(
        [sys.executable, BENCH, "--quick", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    before, table = run.stdout.split("\n| ", 1)
    return before, [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("dtype, apart", [("fp32", 1e-5), ("bf16", 0.03)])
def test_every_row_has_ours_theirs_a_ratio_and_a_goal(dtype, apart):
    before, rows = tables("--dtype", dtype)
    assert dtype in before and "TFLOP/s in a matrix product" in before and "diffusers" in before
    assert [row[0].split(",")[0] for row in rows] == [
        "Stage A",
        "Stage B lite",
        "Stage C lite",
        "Text tower",
        "Import and start",
        "Loading the lite pair",
        "Prompt to picture",
        "Prompt to picture",
    ]
    assert [row[4] for row in rows] == [f"≤ {goal}" for goal in "0.55 0.70 0.85 0.90 0.35 0.40 0.50 0.75".split()]
    assert [row[6] for row in rows] == ["≥ 70 %", "≥ 70 %", "≥ 85 %", "", "", "", "", ""]
    for row in rows:
        (ours, unit), (theirs, same) = (cell.split() for cell in row[1:3])
        assert unit == same == ("GB" if "peak" in row[0] else "s") and float(ours) > 0 and float(theirs) > 0
        assert abs(float(row[3]) - float(ours) / float(theirs)) < 0.02
    for row in rows[:4]:
        assert row[5].endswith("%") and float(row[7]) <= apart  # the same networks


def test_every_way_to_keep_networks_has_its_peak():
    _, (base, *rows) = tables("--memory")
    assert base[0] == "tiny networks" and float(base[1]) > 0.05
    assert [row[0] for row in rows] == ["one at a time", "--prompts", "keep=True"]
    assert all(0.05 < float(cell) < 5 for row in rows for cell in row[1:])


def test_every_size_and_number_of_pictures_has_its_time_and_memory():
    _, rows = tables("--growth")
    assert [(row[0], row[1]) for row in rows] == [
        ("64×64", "1"),
        ("128×128", "1"),
        ("64×64", "2"),
        ("64×64", "4"),
        ("64×64", "8"),
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_every_thing_done_for_speed_has_its_worth_and_changes_no_number():
    _, rows = tables("--leads", "--dtype", "fp32")
    assert [row[0] for row in rows] == ["heads apart"] * 3 + ["strips"] + ["memory kept"] * 4
    assert all(float(row[2]) > 0 and float(row[3]) > 0 and float(row[5]) < 1e-5 for row in rows)
