"""Runs the golden and the pipeline tests on several versions of PyTorch, each in a virtual environment of its own.

    python tests/versions.py                    oldest supported, pinned, newest; only what pip offers as a CPU build
    python tests/versions.py 2.13.0 2.14.1      these, even if pip offers only a CUDA build, of 3 to 6 GB

Prints a table: the tests, whether an image can be drawn in each type on a CPU, whether the trainer's optimiser is there;
or why a version was not run.
"""
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = (ROOT / "requirements.txt").read_text().split()
PINNED = next(line.partition("==")[2] for line in REQUIREMENTS if line.startswith("torch=="))
VERSIONS = ("2.2.2", PINNED, "")                        # "": the newest
TESTS = [f"{ROOT}/tests/test_{name}.py" for name in ("golden", "pipeline")]
DRAW = [f"{ROOT}/cascade.py", "a red circle", "--device", "cpu"]
TRIALS = {"fp32": DRAW, "bf16": [*DRAW, "--dtype", "bf16"], "fp16": [*DRAW, "--dtype", "fp16"],
          "Muon": ["-c", "import torch; torch.optim.Muon"]}


def run(*command, cwd=ROOT):
    """Its output, and whether it succeeded."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    return done.stdout.strip(), done.returncode == 0


def report(version, folder, cuda_builds):
    """A row of the table."""
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    packages = [line for line in REQUIREMENTS if not line.startswith("torch==")]
    if version.startswith("2.2."):                      # built for numpy 1
        packages.append("numpy<2")
    install = [python, "-m", "pip", "install", "--quiet", f"torch=={version}" if version else "torch", *packages]
    plan = folder / "plan.json"
    output, works = run(*install, "--dry-run", "--report", str(plan))
    if not works:
        return version, f"not run: {output.splitlines()[-1]}"
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(plan.read_text())["install"]}
    version = found["torch"]
    if any(name.startswith("nvidia") for name in found) and not cuda_builds:
        return version, "not run: pip offers only a CUDA build"
    run(*install)
    tests, _ = run(python, "-m", "pytest", "-q", *TESTS)
    trials = [run(python, *trial, cwd=folder)[1] for trial in TRIALS.values()]
    return version, tests.splitlines()[-1], *("yes" if works else "no" for works in trials)


if __name__ == "__main__":
    named = sys.argv[1:]
    print(f"Python {sys.version.split()[0]}\n| PyTorch | tests | {' | '.join(TRIALS)} |\n|---|---|---|---|---|---|")
    for each in named or VERSIONS:
        with tempfile.TemporaryDirectory() as place:
            print("|", " | ".join(report(each, Path(place), bool(named))), "|", flush=True)
