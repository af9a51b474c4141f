"""The official files: their names and shapes are those of our networks, which are identified and sized from them."""
import json
import math
import struct

import pytest
import torch
from helpers import OFFICIAL, TESTS, on_meta, slow_except

from cascade import NETWORKS
from model import CascadeError, load

DIFFUSERS = {"diffusers_prior": "stage_c", "diffusers_prior_lite": "stage_c_lite",
             "diffusers_decoder": "stage_b", "diffusers_decoder_lite": "stage_b_lite",
             "diffusers_vqgan": "stage_a"}


def official_shapes(name):
    shapes = json.loads((TESTS / "official" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}


def write_empty(path, shapes):
    """A safetensors file with these names and shapes and without data: a sparse file takes no space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype, width = ("I64", 8) if name.endswith("num_batches_tracked") else ("BF16", 2)
        size = width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_exactly_the_official_ones(name):
    state = on_meta(*OFFICIAL[name]).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == official_shapes(name)


@pytest.mark.parametrize("name", slow_except(
    [*OFFICIAL, *DIFFUSERS], "stage_a", "controlnet_inpainting", "effnet_encoder", "previewer", "text_encoder", "image_encoder",
    "stage_b_lite", "diffusers_prior_lite", "diffusers_vqgan"))
def test_a_network_is_identified_and_sized_from_its_tensors(name, tmp_path):
    path = write_empty(tmp_path / "file.safetensors", official_shapes(name))
    ours = DIFFUSERS.get(name, name)
    network_class, config = OFFICIAL[ours]
    expect = "controlnet" if ours.startswith("controlnet") else ours.removesuffix("_lite")
    network = load(path, expect=expect, networks=NETWORKS)
    path.unlink()
    assert type(network) is network_class and network.config == config
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_a_file_of_another_architecture_is_refused(tmp_path):
    shapes = {"backbone.0.0.weight": (24, 3, 3, 3), "controlnet_blocks.0.weight": (64, 64)}
    with pytest.raises(CascadeError, match="an unknown network"):
        load(write_empty(tmp_path / "canny.safetensors", shapes))
