"""The operators of every network at its official size, and the numbers of the schedule, found by running the code.

    python tests/porting/operators.py       writes the tables in OPERATORS.md and the schedule in PORTING.md

The networks run on the meta device in bf16: nothing is computed; shapes and types are those of a real run. An operator
is what PyTorch's dispatcher sees in inference mode (a linear, an attention), not what it is made of. An operator whose
result is a view of its input (a permute, a chunk, most reshapes) moves nothing and is not listed.
"""
import sys
import weakref
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from helpers import OFFICIAL, on_meta
from pages import OPERATORS_PAGE, PORTING_PAGE, table, write_section

from sampler import alpha_bar, ddpm, timesteps

BF16 = torch.bfloat16
TOKENS = {"ids": (2, 77), "mask": (2, 77)}
FOR_C = {"x": (2, 16, 24, 24), "r": (2,), "clip_text_pooled": (2, 1, 1280),
         "clip_text": (2, 77, 1280), "clip_img": (2, 1, 768)}
FOR_B = {"x": (1, 4, 256, 256), "r": (1,), "clip_text_pooled": (1, 1, 1280),
         "effnet": (1, 16, 24, 24)}
TYPES = {"ids": torch.int64, "mask": torch.int64, "r": torch.float32}      # all others are bf16
# title -> official network, method, inputs, calls for one image of 1024x1024
NETWORKS = {"Text encoder": ("text_encoder", "forward", TOKENS, 1),
    "Stage C lite": ("stage_c_lite", "forward", FOR_C, 20),
    "Stage C": ("stage_c", "forward", FOR_C, 20),
    "Stage B lite": ("stage_b_lite", "forward", FOR_B, 10),
    "Stage B": ("stage_b", "forward", FOR_B, 10),
    "Stage A, decoding": ("stage_a", "decode", {"z": (1, 4, 256, 256)}, 1),
    "Stage A, encoding": ("stage_a", "encode", {"image": (1, 3, 1024, 1024)}, 0),
    "Semantic encoder": ("effnet_encoder", "forward", {"image": (1, 3, 768, 768)}, 0),
    "Image encoder": ("image_encoder", "forward", {"pixels": (1, 3, 224, 224)}, 0),
    "Previewer": ("previewer", "forward", {"latent": (1, 16, 24, 24)}, 0)}


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def size(tensor):
    return tensor.numel() * tensor.element_size()


def shape(tensor):
    return "×".join(map(str, tensor.shape)) or "1"


def type_name(tensor):
    return str(tensor.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def count_flops(name, args, out):
    """A multiplication and its addition are two FLOPs; only these operators count."""
    if name == "linear":
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("conv2d", "conv_transpose2d"):
        return conv_flop_count(args[0].shape, args[1].shape, out.shape, name == "conv_transpose2d")
    if name == "scaled_dot_product_attention":
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    return 0


def attention_trap(args):
    if args["attn_mask"] is not None:
        return "causal mask and padding mask"
    return args["query"].shape != args["key"].shape and "the condition's keys come after the image's"


def layer_norm_trap(args):
    eps = f"eps {args['eps']:g}"
    return eps if args["weight"] is not None else f"{eps}, no scale or shift"


SHUFFLED = "channel is c·p² + row·p + column"
# What a port gets wrong, read from an operator's arguments: (operator, function that returns it, or False).
TRAPS = (("gelu", lambda args: args["approximate"] == "none" and "exact, with erf"),
    ("upsample_bilinear2d", lambda args: args["align_corners"] and "corners aligned"),
    ("sum", lambda args: args["dim"] == [1, 2] and "GRN: over all positions, cannot be tiled"),
    ("pad", lambda args: args["mode"] == "replicate" and "edges replicated"),
    ("conv_transpose2d", lambda args: "transposed, weight is (C_in, C_out, k, k)"),
    ("conv2d", lambda args: args["groups"] > 1 and "depthwise"),
    ("conv2d", lambda args: args["stride"] != [1, 1] and f"stride {args['stride'][0]}"),
    ("batch_norm", lambda args: f"training={args['training']}: running statistics, eps {args['eps']:g}"),
    ("layer_norm", layer_norm_trap),
    ("scaled_dot_product_attention", attention_trap),
    ("pixel_shuffle", lambda args: args["upscale_factor"] > 1 and SHUFFLED),
    ("pixel_unshuffle", lambda args: args["downscale_factor"] > 1 and SHUFFLED),
    ("mul", lambda args: str(args["other"]) == "1.702" and "quick GELU: x·sigmoid(1.702x)"),
    ("argmax", lambda args: "the first of equals"))


class Record(TorchDispatchMode):
    """Records every operator that runs within it.

    rows        (operator, shapes, type, trap) -> how often it ran ("count"), "flops", and bytes "moved": every input
                read once, every output written once
    held        storage -> number of its tensors
    live        storage -> bytes and shape of an activation that is alive
    peak        the largest sum of these bytes; `peak_shapes`: {shape: bytes} then; `peak_at`: while this operator ran
    largest     bytes and shape of the largest result
    """

    def __init__(self):
        super().__init__()
        self.rows, self.held, self.live = defaultdict(Counter), Counter(), {}
        self.peak, self.peak_at, self.peak_shapes = 0, "", Counter()
        self.largest = 0, ""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        inputs, outs = tensors((args, kwargs)), tensors(result)
        name = operator._schema.name.removeprefix("aten::")
        for out in outs:
            self.hold(out, name)
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        if all(out.untyped_storage()._cdata in storages for out in outs):
            return result
        out = outs[0]
        arguments = {each.name: each.default_value for each in operator._schema.arguments}
        arguments |= dict(zip(arguments, args)) | kwargs
        traps = [trap(arguments) for other, trap in TRAPS if other == name]
        traps.append(out.dtype == torch.float32 and "stays fp32")
        shapes = ", ".join(shape(tensor) for tensor in inputs if tensor.dim() > 1)
        key = name, f"{shapes} → {shape(out)}", type_name(out), "; ".join(filter(None, traps))
        read = [out] if name == "embedding" else inputs  # only some rows of a table are read
        moved = sum(map(size, read)) + sum(map(size, outs))
        self.rows[key].update(count=1, flops=count_flops(name, args, out), moved=moved)
        self.largest = max(self.largest, (size(out), shape(out)))
        return result

    def hold(self, tensor, operator):
        """Counts a storage from its first tensor to the end of its last."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.held[key] += 1
        weakref.finalize(tensor, self.release, key)
        if self.held[key] > 1:                          # a view, or a weight
            return
        self.live[key] = storage.nbytes(), shape(tensor)
        if self.live_bytes > self.peak:
            self.peak, self.peak_at, self.peak_shapes = self.live_bytes, operator, Counter()
            for bytes, sizes in self.live.values():
                self.peak_shapes[sizes] += bytes

    def release(self, key):
        self.held[key] -= 1
        if not self.held[key]:
            del self.live[key]

    @property
    def live_bytes(self):
        return sum(bytes for bytes, _ in self.live.values())

    @property
    def total(self):
        return sum(self.rows.values(), Counter())


def run(title, dtype=BF16):
    """A network on the meta device, the Record of one call, and its first output. Weights are not activations."""
    name, method, shapes, _ = NETWORKS[title]
    network, record, inputs = on_meta(*OFFICIAL[name]).to(dtype), Record(), {}
    for tensor in network.state_dict().values():
        record.held[tensor.untyped_storage()._cdata] = 1
    for key, sizes in shapes.items():
        inputs[key] = torch.empty(sizes, dtype=TYPES.get(key, dtype), device="meta")
        record.hold(inputs[key], "")
    with torch.inference_mode(), record:
        outputs = getattr(network, method)(**inputs)
    return network, record, tensors(outputs)[0]


# ------------------------------------------------------------------------------ the pages

def detail_table(record):
    """The operators with at least 1 % of the FLOPs or of the bytes and the first of every trap, in order; then all else."""
    total, lines, traps = record.total, [], {""}
    rest, names, types = Counter(), set(), set()
    for (name, shapes, type, trap), row in record.rows.items():
        large = row["flops"] > total["flops"] / 100 or row["moved"] > total["moved"] / 100
        if large or trap not in traps:
            lines.append([f"`{name}`", shapes, type, *numbers(row), trap])
            traps.add(trap)
        else:
            rest += row
            names.add(f"`{name}`")
            types.add(type)
    names, types = ", ".join(sorted(names)), ", ".join(sorted(types))
    lines.append([f"all else: {names}", "", types, *numbers(rest), ""])
    head = ["operator", "inputs, weights → result", "type", "count", "GFLOP", "MB moved", "trap"]
    return table(head, lines)


def numbers(row):
    return row["count"], f"{row['flops'] / 1e9:.2f}", f"{row['moved'] / 1e6:.1f}"


def operators_page():
    summary, peaks, details, images = [], [], "", []
    totals = {}                                         # title -> FLOPs, bytes moved and weights of one image
    for title, (_, _, shapes, calls) in NETWORKS.items():
        network, record, out = run(title)
        flops, moved = record.total["flops"], record.total["moved"]
        parameters = sum(parameter.numel() for parameter in network.parameters())
        totals[title] = calls * flops, calls * moved, bool(calls) * parameters * 2
        first = next(iter(shapes.values()))
        summary.append([title, "×".join(map(str, first)), shape(out), f"{parameters / 1e6:.1f} M",
            f"{parameters * 2 / 1e6:.0f}", f"{flops / 1e9:.1f}", f"{moved / 1e6:.0f}",
            record.largest[1], f"{record.peak / 1e6:.0f}", calls])
        largest = record.peak_shapes.most_common(3)
        alive = ", ".join(f"{sizes} ({bytes / 1e6:.1f})" for sizes, bytes in largest)
        peaks.append([title, f"`{record.peak_at}`", f"{record.peak / 1e6:.1f}", alive])
        if title not in ("Stage C", "Stage B"):
            details += f"\n## {title}\n\n{detail_table(record)}"
    others = {"lite": ("Stage C", "Stage B"), "full": ("Stage C lite", "Stage B lite")}
    for pair in others:
        used = [total for title, total in totals.items() if title not in others[pair]]
        flops, moved, weights = map(sum, zip(*used))
        images.append([pair, f"{flops / 1e12:.1f}", f"{moved / 1e9:.0f}", f"{weights / 1e9:.2f}"])
    head = ["network", "input", "output", "parameters", "weights, MB", "GFLOP per call",
            "MB moved per call", "largest result", "peak, MB", "calls"]
    images_head = ["one image in 20 and 10 steps", "TFLOP", "GB moved", "weights, GB"]
    peaks_head = ["network", "peak in", "peak, MB", "the largest shapes alive then (MB together)"]
    tables = table(head, summary), table(images_head, images), table(peaks_head, peaks)
    return "\n".join(tables) + details


def schedule():
    """alpha_bar at the times of 20 steps, every other one a time of 10 steps, and the coefficients of
    x' = X x + E eps + N noise, in fp64."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    t = timesteps(20).double().mul(20).round() / 20
    a, rows = alpha_bar(t), []
    for i in range(21):
        row = [i, f"{t[i]:.2f}", f"{a[i]:.8f}"]
        for stride in (1, 2):
            if i % stride or i == 20:
                row += [""] * 3
                continue
            X = ddpm(one, zero, zero, a[i], a[i + stride])
            E = ddpm(zero, one, zero, a[i], a[i + stride])
            N = ddpm(zero, zero, one, a[i], a[i + stride]) * (i + stride < 20)
            row += [f"{number:.8f}" for number in (X, E, N)]
        rows.append(row)
    return table(["i", "t", "alpha_bar", *"XEN", *(f"{name}, 10 steps" for name in "XEN")], rows)


if __name__ == "__main__":
    write_section(OPERATORS_PAGE, "operators", operators_page())
    write_section(PORTING_PAGE, "schedule", schedule())
