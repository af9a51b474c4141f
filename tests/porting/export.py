"""Writes every network as ONNX, for any batch, at one image size.

    python tests/porting/export.py --size 1024 1024 --out onnx                              the tiny cascade
    python tests/porting/export.py --weights weights/official --lite --dtype bf16           width 1024, height 1024
    python tests/porting/export.py --official-nodes [--lite]                                of networks without files

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
from model import CascadeError, UNetConfig, require


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


def with_inputs(network, name, width, height, dtype=torch.float32):
    """A network, or one method of Stage A, and its inputs: two rows for images of this size."""
    name, _, method = name.partition(" ")
    config, rows = network.config, 2
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


# ------------------------------------------------------------------------------ nodes at official size

def with_depths(config, depths):
    """The same network with other numbers of layers, or of blocks of each kind in the levels of a UNet."""
    if isinstance(config, UNetConfig):
        units = ["RTA" if "A" in level else "RT" for level in config.down]
        down = tuple(unit * depth for unit, depth in zip(units, depths))
        return replace(config, down=down, up=down[::-1])
    return replace(config, layers=depths[0]) if depths else config


def official_nodes(name, lite, width, height):
    """Every further layer, or group of blocks in a level, adds the same number of nodes. So the shallowest network and
    those with one more of each tell the number for any depth, and little memory is needed."""
    file = name.partition(" ")[0]
    network_class, config = OFFICIAL.get(f"{file}_lite" if lite else file, OFFICIAL[file])
    depths = [config.layers] if hasattr(config, "layers") else []
    if isinstance(config, UNetConfig):
        depths = [level.count("R") for level in config.down]

    def count(depths):
        network = randomise(network_class(with_depths(config, depths)), 0)
        return len(to_onnx(*with_inputs(network, name, width, height)).model.graph)

    ones = [1] * len(depths)
    shallow = nodes = count(ones)
    for i, depth in enumerate(depths):
        deeper = [*ones[:i], 2, *ones[i + 1:]]
        nodes += (depth - 1) * (count(deeper) - shallow)
    return nodes


# ------------------------------------------------------------------------------ the command

NAMES = ("text_encoder", "stage_c", "stage_b", "stage_a decode", "stage_a encode",
         "effnet_encoder", "image_encoder", "previewer")


def run(options):
    require(find_spec("onnxscript"), "expected onnx and onnxscript: pip install onnx onnxscript")
    width, height = options.size
    cascade.check(width=width, height=height)
    if options.official_nodes:
        for name in options.networks:
            print(f"{name}: {official_nodes(name, options.lite, width, height)} nodes", flush=True)
        return
    pipeline = cascade.Cascade(options.weights, dtype=options.dtype, lite=options.lite)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        file = name.partition(" ")[0]
        network, dtype = pipeline.network(file), pipeline.dtypes[file]
        program = to_onnx(*with_inputs(network, name, width, height, dtype))
        path = options.out / f"{name.replace(' ', '-')}.onnx"
        program.save(path)
        print(f"{path}: {len(program.model.graph)} nodes")


def main(arguments=None):
    parser = Parser(__doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--size", nargs=2, type=int, default=(1024, 1024), metavar=("WIDTH", "HEIGHT"), help=default)
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help=default)
    add("--weights", type=Path, default=cascade.TINY, metavar="FOLDER", help=default)
    add("--networks", nargs="+", default=NAMES, choices=NAMES, help="(default: all)")
    add("--lite", action="store_true", help="as in cascade.py")
    add("--dtype", default="fp32", choices=cascade.DTYPES, help=default)
    add("--official-nodes", action="store_true", help="only count, with random weights")
    return exit_status("export.py", lambda: run(parser.parse_args(arguments)), CascadeError, OSError)


if __name__ == "__main__":
    sys.exit(main())
