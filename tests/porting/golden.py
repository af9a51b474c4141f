"""Golden data: what a port without PyTorch checks itself against.

    python tests/porting/golden.py                          regenerates golden/ and the constants in PORTING.md: 15 s of CPU
    python tests/porting/golden.py --record SOURCE FOLDER   runs the networks that are in one folder, in fp32, for another

In golden/ are, all in the format of trace.py (see compare.py for a reader that needs numpy alone):

    manifest.json               every file with its tensors and shapes in order; the tolerances; how all this was made
    tiny.safetensors            an image of the tiny cascade: Stage C's steps 0 and 19 and Stage B's step 0 complete
    stage_c.safetensors, …      random networks: weights.PATH (in bf16, exactly), inputs, all activations. Levels repeat
                                and sides are odd; the blocks on the way up have such small values that epsilons matter
    operators.safetensors       single operators: OPERATOR.NAME for inputs and weights, .out in fp32 and .out_bf16
    constants.json              frequencies and times in hex, time embeddings, noise

The tolerances are measured: the networks run in fp32 with AVX2, with the plain path, and in fp64, bf16 and fp16, and are
compared with fp32. `floor` is the largest error of a block with exact inputs, `growth` and `total` are MARGIN times the
largest values of a whole run.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import compare
import tiny
import trace
from exporting import INPUTS
from helpers import noise
from pages import PORTING_PAGE, table, write_section

import cascade
import model
import sampler
from model import CascadeError
from text_encoder import SelfAttention

GOLDEN = trace.MANIFEST.parent
MARGIN = 8
IMAGE = ["a large red circle on a blue background",
         *"--width 64 --height 64 --steps-recorded 0 19".split()]
DTYPES = cascade.DTYPES | {"fp64": torch.float64}
cascade.ENDINGS[torch.float64] = cascade.ENDINGS[torch.float32]
# The correct runs of each number format: types, or processor features for another process. The first is also the type of
# blocks that are given exact inputs.
RUNS = {"fp32": ("fp64", "avx2", "default"), "bf16": ("bf16",), "fp16": ("fp16",)}
ROUNDING = {"fp32": 6e-8, "bf16": 2e-3, "fp16": 2.4e-4}     # no floor is lower

# ------------------------------------------------------------------------------ random networks

CONFIGS = {
    "stage_c": replace(tiny.STAGE_C, widths=(64, 64), down=("RTA", "RTA"), up=("RTA", "RTA")),
    "stage_b": replace(tiny.STAGE_B, widths=(32, 64), down=("RT", "RTA"), up=("RTA", "RT"),
                       down_repeat=(1, 1), up_repeat=(3, 2)),
    "stage_a": tiny.STAGE_A, "text_encoder": replace(tiny.TEXT, layers=2),
    "image_encoder": replace(tiny.IMAGE, layers=2), "effnet_encoder": tiny.ENCODER,
    "previewer": tiny.PREVIEWER}


def draw_network(name, seed=5):
    """A random network and its inputs, exact in bf16."""
    made = tiny.randomise(tiny.NETWORKS[name][0](CONFIGS[name]), seed)
    for path, block in made.named_modules():
        if isinstance(block, model.ResidualBlock) and path.startswith("up_blocks"):
            first, grn, last = (block.channelwise[i] for i in (0, 2, 4))
            for tensor in block.depthwise.weight, block.depthwise.bias:
                tensor.mul_(1e-2)                       # so the epsilons of the norms matter
            for tensor in first.weight, first.bias, grn.beta:
                tensor.mul_(1e-4)
            last.weight.mul_(1e4)
    if name == "stage_a":
        made.up_blocks[0][0].weight.mul_(0.02)          # the latents of random UNets are in the dozens
    for tensor in made.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    inputs = INPUTS.get(name, INPUTS["stage_a decode"])(2 if name == "text_encoder" else 1)
    if name == "stage_a":
        inputs = {"z": inputs["x"], "image": noise(1, 3, 20, 28).sigmoid()}
    elif name == "stage_b":
        inputs["pixels"] = noise(1, 3, 5, 7).sigmoid()
    elif name == "stage_c":
        inputs["clip_text"] = inputs["clip_text"][:, :20]
    return made, {key: cast(value, torch.bfloat16, torch.float32) for key, value in inputs.items()}


def cast(value, *dtypes):
    """Integers stay as they are."""
    for dtype in dtypes:
        value = value.to(dtype if value.is_floating_point() else None)
    return value


def stored_network(name, folder=GOLDEN):
    """The same from its file: noise differs by one ulp from machine to machine, and its rounding to bf16 by more."""
    made = tiny.NETWORKS[name][0](CONFIGS[name]).eval().requires_grad_(False)
    stored, inputs, weights = compare.Trace(folder / f"{name}.safetensors"), {}, {}
    for key in stored.header:
        kind, _, path = key.partition(".")
        if kind in ("inputs", "weights"):
            (inputs if kind == "inputs" else weights)[path] = torch.tensor(stored[key])
    made.load_state_dict(weights)
    return made, inputs


@torch.no_grad()
def record_network(name, made, inputs, dtype):
    """The Trace of one call, and what else its file holds."""
    weights = made.state_dict()
    state = {f"weights.{path}": cast(tensor, torch.bfloat16) for path, tensor in weights.items()}
    state |= {f"inputs.{key}": value for key, value in inputs.items()}
    recorded, inputs = trace.Trace([name], [0], []), dict(inputs)
    recorded.watch(made.to(dtype), name)
    if name in ("stage_c", "stage_b"):
        x, r = inputs.pop("x"), inputs.pop("r")
        recorded.add("timesteps", r, "given", [])
        recorded.add("x", x, "given", [])
        inputs = {key: value.to(dtype) for key, value in inputs.items()}
        for key, value in inputs.items():
            recorded.add(f"condition.{key}", value, "given", [])
        made(x.to(dtype), r, **inputs)
    elif name == "stage_a":
        recorded.prefix = "stage_b"
        recorded.add("latent", inputs["z"], "given", [])
        recorded.begin(name)
        made.decode(inputs["z"].to(dtype))
        recorded.add("image", inputs["image"], "given", [])
        made.encode(inputs["image"].to(dtype))
    else:
        made(*(cast(value, dtype) for value in inputs.values()))
    return recorded, state


def record_image(dtype="fp32"):
    """The Trace of an image of the tiny cascade."""
    options = trace.parse(IMAGE)
    options.dtype = DTYPES[dtype]
    with mock.patch.dict(cascade.DTYPES, DTYPES):
        return trace.record(options)


def record_all(dtype, networks):
    """{file: (Trace, what else it holds)} of the random networks, {name: (network, inputs)}, and of the
    tiny cascade."""
    recorded = {"tiny": (record_image(dtype), {})}
    for name, (made, inputs) in networks.items():
        recorded[name] = record_network(name, made, inputs, DTYPES[dtype])
    return recorded


def write_all(recorded, dtype, folder):
    for name, (tensors, state) in recorded.items():
        used = {"dtype": dtype, "torch": torch.__version__}
        if name == "tiny":
            used["arguments"] = IMAGE
        tensors.save(folder / f"{name}.safetensors", used, compact=True, state=state)


# ------------------------------------------------------------------------------ tolerances

def attention_mask(mask, dtype=torch.float32):
    """The text encoder's causal mask and padding mask (B, L), as its layers read them."""
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    visible = causal & mask.bool()[:, None, None]
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


def torch_block(networks, dtype=torch.float32):
    """PyTorch's blocks, for compare.teacher_force; networks {name: network}."""
    @torch.no_grad()
    def block(name, inputs):
        stage, path = name.split(".", 1)
        path = ".".join(part for part in path.split(".") if not part.startswith(("step-", "pass-")))
        module = networks[stage].get_submodule(path)
        given = {key: cast(torch.tensor(value), dtype) for key, value in inputs.items()}
        is_unet = stage in ("stage_c", "stage_b") and not path.startswith("clip")
        if dtype == torch.float16 and is_unet:          # feature maps and time embeddings stay fp32
            given |= {key: torch.tensor(value) for key, value in inputs.items() if key != "cond"}
        if "mask" in given:
            output = module(given["x"], attention_mask(given["mask"], dtype))
        elif isinstance(module, (model.ResidualBlock, model.TimestepBlock, model.AttentionBlock)):
            output = module(given["x"], *(given.get(key) for key in ("t_emb", "cond", "skip")))
        else:
            output = module(given["x"])
        return output.float().numpy()
    return block


def run(kind, source, folder):
    """Records what is in the folder `source` in another type, or in another process with other processor features."""
    if kind in DTYPES:
        networks = {name: stored_network(name, source) for name in CONFIGS}
        return write_all(record_all(kind, networks), kind, folder)
    command = [sys.executable, __file__, "--record", str(source), str(folder)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": kind}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def measure_floors(traces, source, number_format):
    """The largest error of every kind of block with exact inputs."""
    dtype = DTYPES[RUNS[number_format][0]]
    floors = Counter()
    for name, exact in traces.items():
        if name == "tiny":
            pipeline = cascade.Cascade(device="cpu", keep=True)
            networks = {stage: pipeline.network(stage).to(dtype) for stage in trace.STAGES}
        else:
            networks = {name: stored_network(name, source)[0].to(dtype)}
        for result in compare.teacher_force(exact, torch_block(networks, dtype), number_format):
            floors[result.kind] = max(floors[result.kind], result.error, ROUNDING[number_format])
    floors["other"] = max(floors.values())
    return floors


def measure_tolerances(folder):
    """{number format: {kind: {"floor", "growth", "total"}}}; `folder` holds the fp32 run."""
    traces = {name: compare.Trace(folder / f"{name}.safetensors") for name in (*CONFIGS, "tiny")}
    found = {}
    for number_format, kinds in RUNS.items():
        floors = measure_floors(traces, folder, number_format)
        tolerances = {kind: {"floor": floors[kind], "growth": 0, "total": 0} for kind in floors}
        growth, total = Counter(), Counter()            # by kind of tensor
        for kind in kinds:
            with tempfile.TemporaryDirectory() as other:
                run(kind, folder, Path(other))
                for name, exact in traces.items():
                    exact.tolerances[number_format] = tolerances
                    theirs = compare.Tensors(f"{other}/{name}.safetensors")
                    for result in compare.compare(exact, theirs, number_format):
                        total[result.kind] = max(total[result.kind], result.error)
                        if result.incoming is not None:
                            growth[result.kind] = max(growth[result.kind], result.growth)
        found[number_format] = {}
        for kind in total:
            found[number_format][kind] = {
                "floor": rounded(floors[kind] or floors["other"]),
                "growth": rounded(MARGIN * max(growth[kind], 1)),
                "total": rounded(MARGIN * max(total[kind], floors[kind]))}
        largest = {key: max(tolerance[key] for tolerance in found[number_format].values())
                   for key in ("floor", "growth", "total")}
        found[number_format]["other"] = largest
    return found


def rounded(value):
    return float(f"{value:.2g}")


# ------------------------------------------------------------------------------ single operators

@torch.no_grad()
def operators():
    """{OPERATOR.NAME: tensor}: inputs, weights and the outputs in fp32 and in bf16."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):                                   # exact in bf16, the same on every machine
        return torch.randint(-200, 201, shape, generator=generator) / 128

    attn_mask = attention_mask(torch.arange(7) < torch.tensor([[3], [7]]))
    cases = {                                           # name -> layer or function, inputs by name
        "grn": (model.GlobalResponseNorm(6), {"x": draw(1, 3, 5, 6)}),
        "grn_near_zero": (model.GlobalResponseNorm(6), {"x": 1e-6 * draw(1, 3, 5, 6)}),
        "layer_norm": (model.LayerNorm(8), {"x": draw(1, 2, 3, 8)}),
        "layer_norm_near_zero": (model.LayerNorm(8), {"x": 1e-3 * draw(1, 2, 3, 8)}),
        "gelu": (F.gelu, {"x": torch.linspace(-6, 6, 49)}),
        "resize_up": (lambda x: model.resize(x, (9, 12)), {"x": draw(1, 5, 7, 4)}),
        "resize_down": (lambda x: model.resize(x, (3, 4)), {"x": draw(1, 5, 7, 4)}),
        "conv_transpose_2x2": (model.ConvTranspose2d(4, 6, 2, stride=2), {"x": draw(1, 3, 5, 4)}),
        "conv_transpose_4x4": (
            model.ConvTranspose2d(4, 6, 4, stride=2, padding=1), {"x": draw(1, 3, 5, 4)}),
        "pixel_unshuffle": (model.PixelUnshuffle(2), {"x": draw(1, 3, 4, 6)}),
        "pixel_shuffle": (model.PixelShuffle(2), {"x": draw(1, 2, 3, 12)}),
        "replicate_pad": (model.ReplicationPad2d(1), {"x": draw(1, 3, 4, 2)}),
        "attention": (
            AttentionWithCondition(64, 16), {"x": draw(1, 2, 3, 64), "cond": draw(1, 4, 16)}),
        "text_attention": (SelfAttention(64), {"x": draw(2, 7, 64), "attn_mask": attn_mask}),
        "time_embedding": (embed_time, {"r": torch.tensor([1.0, 0.35, 0.05])})}
    found = {}
    for name, (layer, inputs) in cases.items():
        if isinstance(layer, nn.Module):
            for key, value in layer.state_dict().items():
                found[f"{name}.{key}"] = value.copy_(draw(*value.shape) / 4).clone()
        found |= {f"{name}.{key}": value for key, value in inputs.items()}
        found[f"{name}.out"] = layer(*inputs.values()).contiguous()
        if name != "time_embedding":                    # always fp32
            layer = layer.bfloat16() if isinstance(layer, nn.Module) else layer
            inputs = [value.bfloat16() for value in inputs.values()]
            found[f"{name}.out_bf16"] = layer(*inputs).contiguous()
    return found


def embed_time(r):
    return model.UNet(CONFIGS["stage_c"]).embed_time(r, None, None)


class AttentionWithCondition(model.AttentionBlock):
    def forward(self, x, cond):
        return super().forward(x, None, cond, None)


# ------------------------------------------------------------------------------ constants

def hexadecimal(values):
    """The bits of fp32 numbers."""
    return [f"{bits:08x}" for bits in values.float().numpy().view("u4")]


def constants():
    times, embeddings, first = {}, {}, {}
    for steps in (20, 10):
        t = sampler.timesteps(steps)
        times[steps] = hexadecimal(t)
        rows = embed_time(t[:-1])[:, :model.TIME_DIM].tolist()
        embeddings[steps] = [[float(f"{value:.9g}") for value in row] for row in rows]
    for seed in (0, 1, 2 ** 32 - 1):
        drawn = sampler.draw_noise(sampler.generators(seed, 1), (4, 3, 7), "cpu")
        first[seed] = drawn.flatten().tolist()
    return {"frequencies": hexadecimal(model.FREQUENCIES), "times": times,
            "time_embeddings": embeddings, "noise_of_84_values": first}


def constants_section(found):
    """Frequencies, times and noise as PORTING.md prints them."""
    words = {"frequencies": found["frequencies"]}
    words |= {f"times of {steps} steps": values for steps, values in found["times"].items()}
    parts, rows = [], []
    for title, values in words.items():
        parts.append(title)
        parts += [" ".join(values[i:i + 12]) for i in range(0, len(values), 12)]
    for seed, values in found["noise_of_84_values"].items():
        rows.append([seed, *(f"{value:.5f}" for value in values[:8])])
    return "```text\n" + "\n".join(parts) + "\n```\n\n" + table(["seed", *range(8)], rows)


# ------------------------------------------------------------------------------ everything

def write_json(path, values):
    text = json.dumps(values, indent=1)
    text = re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", lambda match: " ".join(match[0].split()), text)
    cascade.write_file(path, (text + "\n").encode())


def weights_digest():
    """Of the tiny cascade's own networks, without what extends them."""
    files = sorted([*cascade.TINY.glob("*.safetensors"), *cascade.TINY.glob("*_encoder/*.safetensors")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def manifest(tolerances, recorded, vectors):
    made = {"command": "python tests/porting/golden.py", "torch": torch.__version__,
            "processor": torch.backends.cpu.get_cpu_capability(), "weights_sha256": weights_digest()}
    files = {}
    for name, (found, _) in recorded.items():
        files[f"{name}.safetensors"] = {
            key: [entry["kind"], *found.tensors[key].shape] for key, entry in found.graph.items()}
    files["operators.safetensors"] = {name: list(tensor.shape) for name, tensor in vectors.items()}
    return {"made": made, "tolerances": tolerances, "files": files}


def main():
    parser = compare.Parser(__doc__)
    parser.add_argument("--record", nargs=2, type=Path, metavar=("SOURCE", "FOLDER"), help="see above")
    options = parser.parse_args()
    if options.record:
        return run("fp32", *options.record)
    recorded = record_all("fp32", {name: draw_network(name) for name in CONFIGS})
    vectors = operators()
    write_all(recorded, "fp32", GOLDEN)
    tolerances = measure_tolerances(GOLDEN)
    write_json(trace.MANIFEST, manifest(tolerances, recorded, vectors))
    write_all(recorded, "fp32", GOLDEN)                 # with the new tolerances
    cascade.write_file(GOLDEN / "operators.safetensors", save(vectors))
    write_json(GOLDEN / "constants.json", constants())
    write_section(PORTING_PAGE, "constants", constants_section(constants()))
    print(f"{GOLDEN}: {sum(path.stat().st_size for path in GOLDEN.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(compare.exit_status("golden.py", main, CascadeError))
