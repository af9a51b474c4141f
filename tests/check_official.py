"""Checks a folder of released weights and prints a short report to paste.

    python tests/check_official.py weights/official                     1024 x 1024, 20 + 10 steps
    python tests/check_official.py weights/official --quick             512 x 512, 4 + 2 steps
    python tests/check_official.py weights/official --dtype bf16 --device cuda
    python tests/check_official.py weights/tiny                         a check of this script

Every network in the folder is loaded, and its values must be finite. Stage C and B draw one image, their lite versions
another: check.png and check_lite.png in the current folder. If tests/parity/requirements.txt is installed, diffusers
draws the same image from the same weights and the same seed (Stage A is ours: tests/parity compares it). The exit
status is 2 if anything failed.

In fp32 the two images agree to rounding. In bf16 and fp16 they do not, and their difference is only reported: diffusers
rounds the times, and thus the schedule, to the type of the weights.
"""
import platform
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import distributions
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "parity"))

import torch  # noqa: E402

from cascade import DTYPES, NETWORK_NAMES, NETWORKS, Cascade, find_file, to_pillow  # noqa: E402
from model import CascadeError, load, require  # noqa: E402

PROMPT, NEGATIVE, SEED = "a large red circle on a white background", "blue", 7
TOLERANCE = 0.5                                         # of 255, in fp32: few steps amplify rounding
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow", "diffusers", "transformers")


def check_network(options, path, name):
    network = load(path, options.device, DTYPES[options.dtype], expect=name, networks=NETWORKS)
    for key, tensor in network.state_dict().items():
        require(tensor.isfinite().all(), f"tensor {key} is not finite")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters / 1e6:.1f} M parameters, {path.stat().st_size} bytes"


def check_image(options, ending):
    cascade = Cascade(options.folder, options.device, options.dtype, lite=bool(ending))
    side, steps, decoder_steps = (512, 4, 2) if options.quick else (1024, 20, 10)
    side = min(side, *cascade.size(None, None))
    run = {"width": side, "height": side, "seed": SEED, "steps": steps, "decoder_steps": decoder_steps}
    pixels = cascade(PROMPT, NEGATIVE, output="pt", **run)[0]
    to_pillow(pixels.permute(1, 2, 0).cpu().numpy()).save(f"check{ending}.png")
    report = f"{side} x {side}, {steps} + {decoder_steps} steps"
    try:
        from peers import combined_pipeline, draw
    except ImportError as error:
        return f"{report}, not compared with diffusers ({error})"
    with torch.no_grad():
        z = draw(combined_pipeline(cascade, with_stage_a=False), [PROMPT], [NEGATIVE], output="latent", **run)
        theirs = cascade.network("stage_a").decode(z)[0].float().clamp(0, 1)
    difference = 255 * (pixels - theirs).abs().max().item()
    report += f", maximum difference from diffusers {difference:.3g} of 255"
    require(difference <= TOLERANCE or options.dtype != "fp32", f"{report}: at most {TOLERANCE}")
    return report


def attempt(label, check, *arguments):
    """Runs a check and prints its line of the report. Returns whether it passed."""
    start = time.perf_counter()
    try:
        status, report = "OK", check(*arguments)
    except Exception as error:  # whatever it is, it belongs in the report
        status, report = "ERROR", f"{type(error).__name__}: {error}"
    print(f"{status:5} {label}: {report} ({time.perf_counter() - start:.1f} s)", flush=True)
    return status == "OK"


def main(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--quick", action="store_true", help="at most 512 x 512, 4 + 2 steps")
    options = parser.parse_args(arguments)
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.device}, {options.dtype}")
    print(*(f"{package.name} {package.version}" for package in distributions() if package.name in PACKAGES))

    passed = {}                                         # network or image -> whether it passed
    for name in (*NETWORK_NAMES, "stage_c_lite", "stage_b_lite"):
        try:
            path = find_file(options.folder, name, DTYPES[options.dtype])
        except CascadeError:                            # it is not there
            continue
        kind = name.removesuffix("_lite").split("/")[0]
        passed[name] = attempt(path.relative_to(options.folder), check_network, options, path, kind)
    for ending in ("", "_lite"):
        if {"text_encoder", f"stage_c{ending}", f"stage_b{ending}", "stage_a"} <= set(passed):
            passed[f"image{ending}"] = attempt(f"image{ending}", check_image, options, ending)
    return 0 if passed and all(passed.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
