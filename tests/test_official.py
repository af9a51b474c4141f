"""The official files: their names and shapes are those of our networks, and a file is told and sized by them."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import text_encoder
from model import (
    CascadeError,
    NETWORKS,
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
    SemanticEncoderConfig,
    StageA,
    StageAConfig,
    UNet,
    UNetConfig,
    Weights,
    load,
)

TESTS = Path(__file__).resolve().parent
FOR_C = {"latent": 16, "patch": 1, "extras": ("sca", "crp"), "image": 768, "switch": (False,)}
FOR_B = {"latent": 4, "patch": 2, "extras": ("sca",), "semantic": 16, "c_cond": 1280, "down_repeat": (1, 1, 1, 1)}
UNETS = {
    "stage_c": UNetConfig((2048, 2048), ("RTA" * 8, "RTA" * 24), ("RTA" * 24, "RTA" * 8),                   # 3589 M
                          down_repeat=(1, 1), up_repeat=(1, 1), c_cond=2048, **FOR_C),
    "stage_c_lite": UNetConfig((1536, 1536), ("RTA" * 4, "RTA" * 12), ("RTA" * 12, "RTA" * 4),              # 1031 M
                               down_repeat=(1, 1), up_repeat=(1, 1), c_cond=1536, **FOR_C),
    "stage_b": UNetConfig((320, 640, 1280, 1280), ("RT" * 2, "RT" * 6, "RTA" * 28, "RTA" * 6),              # 1563 M
                          ("RTA" * 6, "RTA" * 28, "RT" * 6, "RT" * 2), up_repeat=(3, 3, 2, 2), **FOR_B),
    "stage_b_lite": UNetConfig((320, 576, 1152, 1152), ("RT" * 2, "RT" * 4, "RTA" * 14, "RTA" * 4),         # 700 M
                               ("RTA" * 4, "RTA" * 14, "RT" * 4, "RT" * 2), up_repeat=(2, 2, 2, 2), **FOR_B),
}
OFFICIAL = {
    **{name: (UNet, config) for name, config in UNETS.items()},
    "stage_a": (StageA, StageAConfig()),
    "effnet_encoder": (SemanticEncoder, SemanticEncoderConfig()),
    "previewer": (Previewer, PreviewerConfig()),
    "text_encoder": (text_encoder.TextEncoder, text_encoder.TextConfig()),
    "image_encoder": (text_encoder.ImageEncoder, text_encoder.ImageConfig()),
}
DIFFUSERS = {
    "diffusers_prior": "stage_c",
    "diffusers_prior_lite": "stage_c_lite",
    "diffusers_decoder": "stage_b",
    "diffusers_decoder_lite": "stage_b_lite",
    "diffusers_vqgan": "stage_a",
}


def official(name):
    return {key: tuple(shape) for key, shape in json.loads((TESTS / "official" / f"{name}.json").read_text()).items()}


def on_meta(name):
    network, config = OFFICIAL[name]
    with torch.device("meta"):
        return network(config)


def write_empty(path, shapes):
    """A safetensors file with these names and shapes in bf16 and nothing in it: a sparse file takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_exactly_the_official_ones(name):
    assert {key: tuple(tensor.shape) for key, tensor in on_meta(name).state_dict().items()} == official(name)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("stage_c", 3589.1),
        ("stage_c_lite", 1030.8),
        ("stage_b", 1562.9),
        ("stage_b_lite", 699.5),
        ("stage_a", 18.4),
        ("text_encoder", 694.7),
        ("image_encoder", 304.0),
    ],
)
def test_the_number_of_parameters_is_the_official_one(name, millions):
    assert round(sum(parameter.numel() for parameter in on_meta(name).parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", [*OFFICIAL, *DIFFUSERS])
def test_a_file_is_told_and_sized_by_its_tensors(name, tmp_path):
    path, ours = write_empty(tmp_path / "file.safetensors", official(name)), DIFFUSERS.get(name, name)
    if name in text_encoder.TOWERS:
        network = text_encoder.load(path, expect=name)
    else:
        network = load(path)
        assert NETWORKS[ours.removesuffix("_lite")][1] is type(network)
    assert network.config == OFFICIAL[ours][1]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_a_file_with_a_controlnet_is_refused_by_name(tmp_path):
    shapes = {"backbone.0.0.weight": (24, 3, 3, 3), "controlnet_blocks.0.weight": (64, 64)}
    with pytest.raises(CascadeError, match="the file holds none"):
        load(write_empty(tmp_path / "canny.safetensors", shapes))


def test_asking_for_a_tensor_that_is_not_there_names_it(tmp_path):
    shapes = official("stage_a")
    del shapes["up_blocks.3.gammas"]
    weights = Weights(write_empty(tmp_path / "stage_a.safetensors", shapes))
    with pytest.raises(CascadeError, match="up_blocks.3.gammas is missing"):
        weights["up_blocks.3.gammas"]


FULL_SIZE = """
import resource, sys, time
import torch
from safetensors.torch import save_file
from model import UNet, load
from test_official import UNETS
torch.manual_seed(0)
for name, given in (
        ("stage_c_lite", dict(x=(2, 16, 24, 24), clip_text_pooled=(2, 1, 1280), clip_text=(2, 77, 1280))),
        ("stage_b_lite", dict(x=(1, 4, 256, 256), clip_text_pooled=(1, 1, 1280), effnet=(1, 16, 24, 24)))):
    with torch.device("meta"):
        shapes = UNet(UNETS[name]).state_dict()
    path = f"{sys.argv[1]}/{name}_bf16.safetensors"
    save_file({key: torch.randn(tensor.shape, dtype=torch.bfloat16).mul_(0.3 / max(1, tensor[0].numel()) ** 0.5)
               for key, tensor in shapes.items()}, path)
    clock = time.time()
    unet = load(path)
    ready = time.time() - clock
    with torch.inference_mode():
        given = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in given.items()}
        epsilon = unet(r=torch.full((len(given["x"]),), 0.5), **given)
    assert epsilon.isfinite().all() and epsilon.std() > 1e-3 and epsilon.shape == given["x"].shape
    print(f"{name}: ready in {ready:.2f} s, one step {time.time() - clock - ready:.1f} s, "
          f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")
    del unet
"""


@pytest.mark.skipif("CI" not in os.environ and "FULL_SIZE" not in os.environ, reason="3.5 GB of files: set FULL_SIZE=1")
def test_a_full_size_lite_pair_loads_and_runs_a_step_within_8_gb(tmp_path):
    """Random, in bf16, under the official names and shapes."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    assert all(float(line.split("peak ")[1].split()[0]) < 8 for line in run.stdout.splitlines())
