"""Writes every network as ONNX, for any batch, at one image size.

    python tests/porting/export.py --size 1024 1024 --out onnx                              the tiny cascade
    python tests/porting/export.py --weights weights/official --lite --dtype bf16           width 1024, height 1024
    python tests/porting/export.py --official-nodes 640 [--lite]                            counts nodes, writes nothing

Needs onnx and onnxscript. In Python, with the sides left open too (Stage B's must be multiples of 8):

    rows, high, wide = torch.export.Dim("rows"), torch.export.Dim("high", min=2), torch.export.Dim("wide", min=2)
    shapes = {name: {0: rows} for name in inputs} | {"x": {0: rows, 2: 8 * high, 3: 8 * wide}}
    program = torch.export.export(network, (), inputs, dynamic_shapes=shapes)
    torch.onnx.export(program, (), kwargs=inputs).save("stage_b.onnx")
"""
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from compare import Parser, exit_status
from helpers import OFFICIAL
from tiny import randomise

import cascade
from model import CascadeError, UNet, require


class RandomOfficial:
    """Takes the place of a Cascade: the official networks with random weights and all their blocks, but no level of a
    UNet has more channels than `widest`. The optimiser folds operations on weights of at most 8,192 numbers, which the
    official UNets rarely have; from 640 channels on the number of nodes does not depend on the width."""

    def __init__(self, widest, lite):
        self.widest, self.lite = widest, lite
        self.dtypes = dict.fromkeys(cascade.NETWORKS, torch.float32)

    def network(self, name):
        network_class, config = OFFICIAL.get(f"{name}_lite" * self.lite, OFFICIAL[name])
        if network_class is UNet:
            widths = tuple(min(width, self.widest) for width in config.widths)
            config = replace(config, widths=widths, c_cond=min(config.c_cond, self.widest))
        return randomise(network_class(config), 0)


class Method(nn.Module):
    """Stage A's `encode` or `decode` as a network of its own."""

    def __init__(self, stage_a, name):
        super().__init__()
        self.stage_a, self.name = stage_a, name

    def forward(self, x):
        return getattr(self.stage_a, self.name)(x)


def export(network, inputs):
    """A network as torch.export sees it: strictly, so without a graph break, at one size and for any batch."""
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs}
    return torch.export.export(network, (), inputs, dynamic_shapes=shapes, strict=True)


def to_onnx(network, inputs):
    return torch.onnx.export(export(network, inputs), (), kwargs=inputs, verbose=False)


def network_and_inputs(pipeline, name, width, height):
    """A network of a cascade, and inputs of two rows for images of this size."""
    name, _, method = name.partition(" ")
    network = pipeline.network(name)
    config, dtype, rows = network.config, pipeline.dtypes[name], 2
    Hc, Wc = cascade.semantic_sides(width, height, cascade.COMPRESSION)
    Hb, Wb = 2 * math.ceil(height / 8), 2 * math.ceil(width / 8)

    def zeros(*shape):
        return torch.zeros(rows, *shape, dtype=dtype)

    if name == "text_encoder":
        ids = torch.full((rows, config.length), config.end)
        return network, {"ids": ids, "mask": torch.ones_like(ids)}
    if method:
        shapes = {"encode": (3, 4 * Hb, 4 * Wb), "decode": (4, Hb, Wb)}
        return Method(network, method), {"x": zeros(*shapes[method])}
    if name == "image_encoder":
        return network, {"pixels": zeros(3, config.side, config.side)}
    if name == "effnet_encoder":
        return network, {"image": zeros(3, 32 * Hc, 32 * Wc)}
    if name == "previewer":
        return network, {"latent": zeros(16, Hc, Wc)}
    inputs = {"r": torch.ones(rows), "clip_text_pooled": zeros(1, config.text_dim)}
    if name == "stage_b":
        return network, {"x": zeros(4, Hb, Wb), "effnet": zeros(16, Hc, Wc)} | inputs
    inputs |= {"clip_text": zeros(77, config.text_dim), "clip_img": zeros(1, config.image_dim)}
    return network, {"x": zeros(16, Hc, Wc)} | inputs


NAMES = ("text_encoder", "stage_c", "stage_b", "stage_a decode", "stage_a encode",
         "effnet_encoder", "image_encoder", "previewer")


def run(options):
    require(find_spec("onnxscript"), "expected onnx and onnxscript: pip install onnx onnxscript")
    width, height = options.size
    cascade.check(width=width, height=height)
    if options.official_nodes:
        pipeline = RandomOfficial(options.official_nodes, options.lite)
    else:
        pipeline = cascade.Cascade(options.weights, dtype=options.dtype, lite=options.lite)
        options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        program = to_onnx(*network_and_inputs(pipeline, name, width, height))
        path = options.out / f"{name.replace(' ', '-')}.onnx"
        if not options.official_nodes:
            program.save(path)
        print(f"{path}: {len(program.model.graph)} nodes", flush=True)


def main(arguments=None):
    parser = Parser(__doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--size", nargs=2, type=int, default=(1024, 1024), metavar=("WIDTH", "HEIGHT"), help=default)
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help=default)
    add("--weights", type=Path, default=cascade.TINY, metavar="FOLDER", help=default)
    add("--networks", nargs="+", default=NAMES, choices=NAMES, help="(default: all)")
    add("--lite", action="store_true", help="as in cascade.py")
    add("--dtype", default="fp32", choices=cascade.DTYPES, help=default)
    add("--official-nodes", type=int, metavar="CHANNELS",
        help="only count, with random weights and at most so many channels in the UNets")
    return exit_status("export.py", lambda: run(parser.parse_args(arguments)), CascadeError, OSError)


if __name__ == "__main__":
    sys.exit(main())
