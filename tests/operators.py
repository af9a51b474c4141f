"""The operators of every network at its official size, and the schedule's numbers: found by running, not by hand.

    python tests/operators.py                       writes tests/OPERATORS.md, and the tables inside tests/PORTING.md
    python tests/operators.py --detail "Stage C"    prints every operator of one network, none left out
    python tests/operators.py --schedule            prints the schedule's tables

The networks run on the meta device in bf16: nothing is computed, shapes and types are those of a real run. An operator
is what PyTorch's dispatcher sees in inference mode (a linear, an attention), not what it is made of there. One whose
result is its input seen differently (a permute, a chunk, a reshape in place) moves nothing and is not listed.
"""

import argparse
import sys
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import model
from sampler import alpha_bar, ddpm, timesteps
from test_official import on_meta

PAGE, PORTING = TESTS / "OPERATORS.md", TESTS / "PORTING.md"
MARK, END = "<!-- python tests/operators.py writes from here -->\n", "<!-- to here -->\n"
BF16 = torch.bfloat16
TOKENS = {"ids": (2, 77), "mask": (2, 77)}
FOR_C = {"x": (2, 16, 24, 24), "r": (2,), "clip_text_pooled": (2, 1, 1280), "clip_text": (2, 77, 1280),
         "clip_img": (2, 1, 768)}
FOR_B = {"x": (1, 4, 256, 256), "r": (1,), "clip_text_pooled": (1, 1, 1280), "effnet": (1, 16, 24, 24)}
TYPES = {"ids": torch.int64, "mask": torch.int64, "r": torch.float32}      # all else is bf16
# title -> official network, its method, inputs, calls for one picture of 1024 x 1024, is every operator on the page?
STAGES = {"Text tower": ("text_encoder", "forward", TOKENS, 1, True),
          "Stage C lite": ("stage_c_lite", "forward", FOR_C, 20, True),
          "Stage C": ("stage_c", "forward", FOR_C, 20, False),
          "Stage B lite": ("stage_b_lite", "forward", FOR_B, 10, True),
          "Stage B": ("stage_b", "forward", FOR_B, 10, False),
          "Stage A, decoding": ("stage_a", "decode", {"z": (1, 4, 256, 256)}, 1, True),
          "Stage A, encoding": ("stage_a", "encode", {"image": (1, 3, 1024, 1024)}, 0, True),
          "Semantic encoder": ("effnet_encoder", "forward", {"image": (1, 3, 768, 768)}, 0, True),
          "Image tower": ("image_encoder", "forward", {"pixels": (1, 3, 224, 224)}, 0, True),
          "Previewer": ("previewer", "forward", {"latent": (1, 16, 24, 24)}, 0, True)}


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def size(tensor):
    return tensor.numel() * tensor.element_size()


def flops(name, args, out):
    """A multiplication and its addition are two; only these operators count."""
    if name == "linear":
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("conv2d", "conv_transpose2d"):
        return conv_flop_count(args[0].shape, args[1].shape, out.shape, transposed=name == "conv_transpose2d")
    if name == "scaled_dot_product_attention":
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    return 0


def trap(name, args, given, out):
    """What a port gets wrong here, read off the operator's own arguments. given: all of them, by name."""
    traps = []
    if name == "gelu" and given["approximate"] == "none":
        traps.append("exact, with erf")
    if name == "upsample_bilinear2d" and given["align_corners"]:
        traps.append("corners aligned")
    if name == "sum" and given["dim"] == [1, 2]:
        traps.append("GRN: over all positions, cannot be tiled")
    if name == "pad" and given["mode"] == "replicate":
        traps.append("edges replicated")
    if name == "conv_transpose2d":
        traps.append("transposed, weight is (C_in, C_out, k, k)")
    if name == "conv2d" and given["groups"] > 1:
        traps.append("depthwise")
    if name == "conv2d" and given["stride"] != [1, 1]:
        traps.append(f"stride {given['stride'][0]}")
    if name == "batch_norm":
        traps.append(f"training={given['training']}: running statistics, eps {given['eps']:g}")
    if name == "layer_norm":
        traps.append(f"eps {given['eps']:g}" + (", no scale or shift" if given["weight"] is None else ""))
    if name == "scaled_dot_product_attention" and given["attn_mask"] is not None:
        traps.append("causal mask and padding mask")
    elif name == "scaled_dot_product_attention" and given["query"].shape != given["key"].shape:
        traps.append("the condition's keys come after the picture's")
    if name in ("pixel_shuffle", "pixel_unshuffle") and args[1] > 1:
        traps.append("channel is c·p² + row·p + column")
    if name == "mul" and isinstance(args[1], float) and args[1] == 1.702:
        traps.append("quick GELU: x·sigmoid(1.702x)")
    if name == "argmax":
        traps.append("the first of equals")
    if out.dtype == torch.float32:
        traps.append("stays fp32")
    return "; ".join(traps)


@dataclass
class Row:
    """Calls of one operator with the same shapes and types."""
    count: int = 0
    flops: int = 0
    moved: int = 0                                      # bytes: every input read once, every output written once


@dataclass
class Record(TorchDispatchMode):
    """Writes down every operator that runs within it."""
    rows: dict = field(default_factory=lambda: defaultdict(Row))    # (operator, shapes, type, trap) -> Row
    held: dict = field(default_factory=lambda: defaultdict(int))    # storage -> tensors that hold it
    live: int = 0                                       # bytes that are held now, weights left out
    peak: int = 0                                       # and at most
    largest: tuple = (0, "")                            # bytes and shape of the largest result

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        inputs, outs = tensors((args, kwargs)), tensors(result)
        for out in outs:
            self.hold(out)
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        if all(out.untyped_storage()._cdata in storages for out in outs):
            return result
        out, name = outs[0], operator._schema.name.removeprefix("aten::")
        given = {a.name: a.default_value for a in operator._schema.arguments}
        given |= dict(zip(given, args)) | kwargs
        shapes = ", ".join(shape(tensor) for tensor in inputs if tensor.dim() > 1)
        row = self.rows[name, f"{shapes} → {shape(out)}", kind(out), trap(name, args, given, out)]
        row.count += 1
        row.flops += flops(name, args, out)
        inputs = [out] if name == "embedding" else inputs               # of a table only the rows that are asked for
        row.moved += sum(map(size, inputs)) + sum(map(size, outs))
        self.largest = max(self.largest, (size(out), shape(out)))
        return result

    def hold(self, tensor):
        """Counts a storage from its first tensor to the end of its last."""
        storage = tensor.untyped_storage()
        key, bytes = storage._cdata, storage.nbytes()
        if not self.held[key]:
            self.live += bytes
            self.peak = max(self.peak, self.live)
        self.held[key] += 1
        weakref.finalize(tensor, self.release, key, bytes)

    def release(self, key, bytes):
        self.held[key] -= 1
        if not self.held[key]:
            self.live -= bytes


def shape(tensor):
    return "×".join(map(str, tensor.shape)) or "1"


def kind(tensor):
    return {"bfloat16": "bf16", "float32": "fp32"}.get(name := str(tensor.dtype).removeprefix("torch."), name)


def run(title, dtype=BF16, strip=2 ** 30):
    """-> the network, what its run recorded, and its first output. Stage A runs whole unless strip says how it is cut."""
    name, method, inputs, _, _ = STAGES[title]
    network = on_meta(name).to(dtype).eval().requires_grad_(False)
    given = {key: torch.empty(s, dtype=TYPES.get(key, dtype), device="meta") for key, s in inputs.items()}
    record = Record()
    record.held |= {tensor.untyped_storage()._cdata: 1 for tensor in network.state_dict().values()}
    for tensor in given.values():
        record.hold(tensor)
    with torch.inference_mode(), record, mock.patch.object(model, "STRIP", strip):
        out = getattr(network, method)(**given)
    return network, record, tensors(out)[0]


# ---- the pages -------------------------------------------------------------------------------------------------------

HEAD = """# The operators

Written by `python tests/operators.py`; a test fails when it is stale. The official networks at the sizes of one picture
of 1024×1024, run on the meta device in bf16. Stage C has two rows (guidance), Stage B one. A line's figures are those
of all its calls together.

- A FLOP is a multiplication or an addition of a linear, a convolution or an attention; nothing else counts.
- *Moved*: every operator reads its inputs and weights once and writes its result once, nothing is fused. It is what a
  port saves by fusing. What only looks at its input differently (permute, chunk, most reshapes) is free and not listed;
  a `flatten` that is listed copies.
- *Peak*: the activations alive at one time, inputs included; weights, and what an operator needs inside, left out.
- Weights and peak are those of bf16; twice that in fp32.
- Stage A is listed whole. `model.py` takes its blocks over the picture in strips of rows (`STRIP`), which gives the same
  numbers and needs a quarter of the peak. Attention is one operator here, as on a GPU; on a CPU `by_head` spells it out.
- *Mind*: what a port gets wrong here, read off the operator's arguments and the type of its result.
"""


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def details(record, whole):
    """The operators in their order. Small ones, below 1 % of the FLOPs and of the bytes, are put together, one line for
    each trap that no large one shows."""
    flops, moved = (sum(getattr(row, name) for row in record.rows.values()) for name in ("flops", "moved"))
    large, small = [], defaultdict(list)
    for (name, shapes, type, trap), row in record.rows.items():
        if whole or row.flops > flops / 100 or row.moved > moved / 100:
            large.append((f"`{name}`", shapes, type, row, trap))
        else:
            small[trap].append((name, type, row))
    shown = {line[-1] for line in large}
    for trap in [trap for trap in small if trap in shown]:
        small[""] += small.pop(trap)
    for trap, rows in sorted(small.items(), key=lambda item: not item[0]):
        total = Row(*(sum(getattr(row, name) for _, _, row in rows) for name in ("count", "flops", "moved")))
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for name, _, _ in rows))
        large.append((names if trap else "all else", "", ", ".join(sorted({type for _, type, _ in rows})), total, trap))
    return table(["operator", "inputs, weights → result", "type", "count", "GFLOP", "MB moved", "mind"],
                 [[name, shapes, type, row.count, f"{row.flops / 1e9:.2f}", f"{row.moved / 1e6:.1f}", trap]
                  for name, shapes, type, row, trap in large])


def operators():
    """The whole page."""
    summary, parts, picture = [], [], defaultdict(float)
    for title, (_, _, inputs, calls, detailed) in STAGES.items():
        network, record, out = run(title)
        flops, moved = (sum(getattr(row, name) for row in record.rows.values()) for name in ("flops", "moved"))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        summary.append([title, "×".join(map(str, next(iter(inputs.values())))), shape(out), f"{parameters / 1e6:.1f} M",
                        f"{parameters * 2 / 1e6:.0f}", f"{flops / 1e9:.1f}", f"{moved / 1e6:.0f}", record.largest[1],
                        f"{record.peak / 1e6:.0f}", calls])
        for pair in ("lite", "full"):
            if title not in {"lite": ("Stage B", "Stage C"), "full": ("Stage B lite", "Stage C lite")}[pair]:
                picture[pair, "flops"] += calls * flops
                picture[pair, "moved"] += calls * moved
                picture[pair, "weights"] += bool(calls) * parameters * 2
        if detailed:
            parts.append(f"\n## {title}\n\n{details(record, whole=False)}")
    head = ["network", "input", "output", "parameters", "weights, MB", "GFLOP a call", "MB moved a call",
            "largest result", "peak, MB", "calls"]
    total = [[pair, *(f"{picture[pair, name] / 10 ** power:.{digits}f}"
                      for name, power, digits in (("flops", 12, 1), ("moved", 9, 0), ("weights", 9, 2)))]
             for pair in ("lite", "full")]
    return (f"{HEAD}\n{table(head, summary)}\nOne picture, 20 and 10 steps, from the text tower to the pixels:\n\n"
            f"{table(['pair', 'TFLOP', 'GB moved', 'weights, GB'], total)}"
            "\nBelow: what makes at least 1 % of a network's FLOPs or bytes, and every trap. All operators, those of "
            "the full pair too:\n`python tests/operators.py --detail 'Stage C'`.\n" + "".join(parts))


def schedule():
    """alpha_bar at the times of 20 and of 10 steps, and what a step does: x' = X x + E epsilon + N noise. In fp64."""
    one, parts = torch.ones((), dtype=torch.float64), []
    for steps, stage in ((20, "Stage C"), (10, "Stage B")):
        t = timesteps(steps).double().mul(steps).round() / steps
        a, rows = alpha_bar(t), []
        for i in range(steps + 1):
            numbers = [a[i]]
            if i < steps:
                zero = one * 0
                numbers += [ddpm(*given, a[i], a[i + 1]) for given in ((one, zero, zero), (zero, one, zero))]
                numbers += [ddpm(zero, zero, one, a[i], a[i + 1]) * (i < steps - 1)]
            rows.append([i, f"{t[i]:.2f}", *(f"{number:.8f}" for number in numbers), *[""] * (4 - len(numbers))])
        parts.append(f"{stage}, {steps} steps:\n\n" + table(["i", "t", "alpha_bar", "X", "E", "N"], rows))
    return "\n".join(parts)


def with_schedule(page):
    """PORTING.md with the tables between its two marks made anew."""
    before, rest = page.split(MARK, 1)
    return f"{before}{MARK}\n{schedule()}\n{END}{rest.split(END, 1)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detail", choices=STAGES)
    parser.add_argument("--schedule", action="store_true")
    options = parser.parse_args()
    if options.detail:
        print(details(run(options.detail)[1], whole=True))
    elif options.schedule:
        print(schedule())
    else:
        PAGE.write_text(operators(), encoding="utf-8")
        PORTING.write_text(with_schedule(PORTING.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
