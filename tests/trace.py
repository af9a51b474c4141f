"""Golden activations: all that happens between a prompt and its picture, for a port to check itself against.

    python tests/trace.py "a large red circle" --out trace.safetensors              the small cascade: seconds, 10 MB
    python tests/trace.py --compare trace.safetensors mine.safetensors              where does mine depart?
    python tests/trace.py --list --weights weights/official --lite                  names, shapes and size; no run
    python tests/trace.py "an astronaut" --weights weights/official --lite --stages stage_c --steps-recorded 0   1.4 GB

`Cascade` draws one picture and hooks look on. The names: S is stage_c or stage_b; NNN counts its steps from 000; PATH
is a module's path in model.py or text_encoder.py, the same as in its weights' names in the official files.

    tokens.ids, tokens.mask                 (rows, L), integers: the prompt and, where it differs, the negative prompt
    text_encoder.PATH.in, .out              in a layer, token i sees the tokens j up to i where the mask is 1
    text_encoder.hidden, .pooled            what the tower answers
    S.timesteps, S.alpha_bar                (steps + 1,): step NNN leads from entry NNN to the next
    S.condition.NAME                        the UNet's arguments: clip_text_pooled, clip_text and clip_img, or effnet
    S.step-NNN.x                            the latent before the step; that of step 000 is noise alone
    S.step-NNN.embed_time.out               the time's embedding; every block gets it as `t`
    S.step-NNN.PATH.in, .out                of some steps, see below; every block gets clip_norm.out as `cond`
    S.step-NNN.PATH.skip                    of the blocks that read their level's skip
    S.step-NNN.out                          what the network answers
    S.step-NNN.epsilon, .x0                 the noise after guidance; what is taken for the clean latent
    S.step-NNN.noise                        what the step adds; zeros in the last
    S.latent                                the latent after the last step
    stage_a.PATH.in, .out                   of its decoder
    picture                                 (1, 3, H, W) in [0, 1]

PATH, in the steps of --steps-recorded (-1 is a stage's last), is every module that a network itself calls or, with
--blocks, every one that a pattern names, however deep: 'stage_c.down_blocks.0.0*' is a block and all inside it. A
module that is called again in the same step, since its level repeats, is PATH.pass-1, then PATH.pass-2. With guidance a
network sees two rows: what is wanted, then what is not.

Values are fp32, whatever the run's type. Between the blocks of the UNets and of Stage A they are channels-last, (rows,
y, x, C); latents, noise, picture, and so embedding.in, clf.out and out_block.out, are channels-first. --compare wants
the same names in the same layout (axes of length 1 do not count), in any floating type, and takes what is there: `mine`
may hold one stage, or one block. The file's metadata say the order of execution ("order", a JSON list of the names:
safetensors sorts them), the layout, and how the picture was made.

Another implementation's Stage C, `port`, with our noise and conditions:

    trace = load_file("trace.safetensors")
    names = "clip_text_pooled", "clip_text", "clip_img"
    condition = {name: trace[f"stage_c.condition.{name}"] for name in names}
    mine, x, a = {}, trace["stage_c.step-000.x"], trace["stage_c.alpha_bar"]
    for i, r in enumerate(trace["stage_c.timesteps"][:-1]):
        step = f"stage_c.step-{i:03}"
        mine[f"{step}.out"] = port(torch.cat([x, x]), r.expand(2), **condition)
        mine[f"{step}.epsilon"] = sampler.guide(*mine[f"{step}.out"].chunk(2), 4.0, 0)
        x = sampler.ddpm(x, mine[f"{step}.epsilon"], trace[f"{step}.noise"], a[i], a[i + 1])
    mine["stage_c.latent"] = x
    save_file({name: tensor.contiguous() for name, tensor in mine.items()}, "mine.safetensors")

One block of it: `block(trace[f"{name}.in"], trace[f"{step}.embed_time.out"], trace[f"{step}.clip_norm.out"])`. And the
other way round, `Cascade().decode(x, "a large red circle")` draws what the port imagined.
"""

import argparse
import json
import os
import sys
import warnings
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from pathlib import Path
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cascade  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import text_encoder  # noqa: E402
from model import CascadeError, UNet, Weights  # noqa: E402

STAGES = ("text_encoder", "stage_c", "stage_b", "stage_a")
LAYOUT = (
    "channels-last, (rows, y, x, C), between the blocks of stage_c, stage_b and stage_a; channels-first are x, out, "
    "epsilon, x0, noise, latent, condition, picture, embedding.in, clf.out and out_block.out"
)


class Trace:
    """What was seen, {name: tensor} in the order of execution."""

    def __init__(self, stages, steps, patterns):
        self.stages, self.steps, self.patterns, self.unused = stages, steps, patterns, set(patterns)
        self.tensors = {}

    def begin(self, prefix, record=True):
        """From here on names start so, and every module counts its passes anew."""
        self.prefix, self.stage = prefix, prefix.split(".")[0]
        self.record, self.passes, self.open = record and self.stage in self.stages, Counter(), []

    def add(self, name, tensor):
        device, kind = tensor.device if tensor.is_meta else "cpu", tensor.dtype
        copy = tensor.to(device, torch.float32 if tensor.is_floating_point() else kind)
        copy = copy.clone(memory_format=torch.contiguous_format)        # one's `out` is the next one's `in`
        self.tensors[f"{self.prefix}.{name}".lstrip(".")] = copy

    def watch(self, network, stage):
        self.begin(stage)
        if isinstance(network, UNet):  # a step makes all of its condition anew, to be seen: the same numbers
            network.prepare = lambda **condition: condition
        network.register_forward_pre_hook(self.asked)
        network.register_forward_hook(self.answered)
        for path, module in network.named_modules():
            if path:
                module.register_forward_pre_hook(partial(self.enter, path))
                module.register_forward_hook(self.leave)
        return network

    def asked(self, network, args):
        if isinstance(network, UNet):
            x, r = args
            return self.add("embed_time.out", network.embed_time(r, None, None).to(x.dtype))
        self.begin("tokens")
        self.add("ids", args[0]), self.add("mask", args[1])
        self.begin("text_encoder")

    def answered(self, network, args, output):
        if isinstance(network, UNet):
            self.answer = output
            return self.add("out", output)
        self.add("hidden", output[0]), self.add("pooled", output[1])

    def wanted(self, path):
        if not self.record or not self.patterns:
            return self.record and not self.open  # what the network calls is a block, what a block calls is not
        hits = {pattern for pattern in self.patterns if fnmatchcase(f"{self.stage}.{path}", pattern)}
        self.unused -= hits
        return bool(hits)

    def enter(self, path, module, args):
        name, count = None, self.passes[path]
        if self.wanted(path):
            name = f"{path}.pass-{count}" if count else path
            self.add(f"{name}.in", args[0])
            if getattr(module, "c_skip", 0):
                self.add(f"{name}.skip", args[-1])
        self.passes[path] += 1
        self.open.append(name)

    def leave(self, module, args, output):
        if name := self.open.pop():
            self.add(f"{name}.out", output)

    def sample(self, unet, shape, condition, steps, guidance, sources, recipe, **start):
        """sampler.sample, with every step written down. The noise is drawn a second time, from twins of its sources."""
        stage, times, twins = self.stage, sampler.timesteps(steps), [torch.Generator() for _ in sources]
        for twin, source in zip(twins, sources):
            twin.set_state(source.get_state())
        self.add("timesteps", times), self.add("alpha_bar", sampler.alpha_bar(times))
        rows = len(sources) * (1 + (guidance > 1))
        for name, value in condition.items():
            self.add(f"condition.{name}", value[:rows])
        if unet.config.image:  # no picture is zeros; other implementations want to be given them
            self.add("condition.clip_img", value.new_zeros(rows, 1, unet.config.image))
        walk = sampler.sample(unet, shape, condition, steps, guidance, sources, recipe, **start)
        x = sampler.draw(twins, shape, "cpu")
        for i in range(steps):
            self.begin(f"{stage}.step-{i:03}", i in self.steps or i - steps in self.steps)
            self.add("x", x)
            x, x0 = next(walk)
            epsilon = self.answer.float()
            if len(epsilon) > len(sources):
                epsilon = sampler.guide(*epsilon.chunk(2), guidance, recipe.rescale)
            self.add("epsilon", epsilon), self.add("x0", x0)
            self.add("noise", sampler.draw(twins, shape, "cpu") * (i < steps - 1))
            # The pipeline looks whether a latent is finite; at a meta one it cannot look.
            yield (torch.zeros(x.shape), torch.zeros(x.shape)) if x.is_meta else (x, x0)
        self.begin(stage)
        self.add("latent", x)


class Traced(cascade.Cascade):
    """Every network that it opens is watched. On the meta device they are empty: all names and shapes come out of them,
    and no values."""

    def network(self, name):
        if self.device.type != "meta":
            return self.trace.watch(super().network(name), name)
        _, network, read_config = {**model.NETWORKS, **text_encoder.TOWERS}[name]
        weights = Weights(self.file(name))
        with self.device:
            network = network(read_config(weights)).eval()
        if isinstance(network, UNet):  # in a step of which no block is recorded only the shape of the answer counts
            answer = network.forward
            network.forward = lambda x, r, **given: answer(x, r, **given) if self.trace.record else x
        return self.trace.watch(network, name)


@torch.inference_mode()
def draw(traced, options):
    """Cascade.__call__ for one picture, as far as the last of the stages -> its Trace."""
    traced.trace = trace = Trace(options.stages, options.steps_recorded, options.blocks)
    last = max(map(STAGES.index, options.stages))
    with mock.patch.object(cascade, "sample", trace.sample):
        text = traced.read(options.prompt, options.negative)
        if last >= 1:
            width, height = traced.size(options.width, options.height)
            latents = traced.prior(text, "", width, height, options.steps, options.guidance, seed=options.seed)
        if last >= 2:
            given = options.decoder_steps, options.decoder_guidance, options.seed, options.steps, "latent"
            z = traced.decode(latents, text, "", width, height, *given)
    if last >= 3:
        stage_a = traced.network("stage_a")
        pixels = stage_a.decode(z.to(stage_a.out_block[0].weight)).float()
        trace.begin("")
        trace.add("picture", pixels[:, :, :height, :width].clamp(0, 1))
    return trace


def run(options):
    out, folder, most = options.out, options.out.absolute().parent, max(options.steps, options.decoder_steps)
    if out.suffix != ".safetensors" or out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CascadeError(f"{out}: cannot be written; wanted is a .safetensors in a folder that is there, and yours")
    for step in options.steps_recorded:
        if not -most <= step < most:
            raise CascadeError(f"--steps-recorded {step}: there are {most} steps, 0 to {most - 1}, or -1 for the last")
    traced = Traced(options.weights, options.device, options.dtype, options.lite, options.decoder_dtype)
    device, traced.device = traced.device, torch.device("meta")
    rehearsal = draw(traced, options)
    if rehearsal.unused:
        raise CascadeError(f"--blocks {min(rehearsal.unused)}: no such module runs; --list --blocks '*' shows them all")
    size = sum(tensor.nbytes for tensor in rehearsal.tensors.values())
    said = f"{len(rehearsal.tensors)} tensors, {size / 1e6:.1f} MB"
    if options.list:
        for name, tensor in rehearsal.tensors.items():
            print(name, *tensor.shape)
        return print(said)
    if size > 1e9 * options.limit:
        fewer = "record fewer --stages, --blocks or --steps-recorded, or a smaller picture; --list shows what is large"
        raise CascadeError(f"{out}: would be {said}, more than --limit {options.limit:g} GB; {fewer}")
    traced.device, traced.progress = device, True
    tensors = draw(traced, options).tensors
    used = {name: value for name, value in vars(options).items() if name not in ("compare", "list", "out", "limit")}
    used |= traced.used(*STAGES[: 1 + max(map(STAGES.index, options.stages))]) | {"torch": torch.__version__}
    metadata = {"order": json.dumps(list(tensors)), "layout": LAYOUT, "used": json.dumps(used, default=str)}
    part = out.with_name(out.name + ".part")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        raise CascadeError(f"{out}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {said}")


def errors_of(ours, theirs):
    """The largest error, of the largest value, and the error's L2 norm, of the value's; of integers, the share that
    differs."""
    ours, theirs = ours.squeeze(), theirs.squeeze()
    if ours.shape != theirs.shape:
        return inf, inf
    if not ours.is_floating_point():
        return ((ours != theirs).double().mean().item(),) * 2
    ours, off = ours.double(), theirs.double() - ours.double()
    pairs = (off.abs().max(), ours.abs().max()), (off.norm(), ours.norm())
    return tuple((wrong / right if right else wrong).nan_to_num(inf, inf).item() for wrong, right in pairs)


def compare(path, other, tolerance):
    """Prints where `other` departs from the trace at `path`, and returns whether it does."""
    ours, theirs = Weights(path), Weights(other)
    if "order" not in ours.metadata:
        raise CascadeError(f"{path}: not a trace, its metadata has no order; wanted is the trace, then the other file")
    order = json.loads(ours.metadata["order"])
    missing = [name for name in order if name not in theirs]
    if len(missing) == len(order):
        raise CascadeError(f"{other}: has none of the trace's names, such as {order[0]}")
    errors = {name: errors_of(ours.tensor(name), theirs.tensor(name)) for name in order if name in theirs}
    unknown = len(theirs.keys() - set(order))
    print(f"{len(errors)} of {len(order)} tensors compared, {len(missing)} missing, {unknown} that the trace has not")
    if missing:
        print("missing:", ", ".join(missing[:5]) + (", ..." if missing[5:] else ""))
    first = next((name for name, (largest, _) in errors.items() if largest > tolerance), None)
    if first is None:
        print(f"all agree: the largest error is {max(errors.values())[0]:.1e} of the largest value")
    else:
        largest, norm = errors[first]
        print(f"first departure: {first}: error {largest:.1e} of the largest value, {norm:.1e} in L2")
        if ours[first] != theirs[first]:
            hint = "; is one channels-first?" if sorted(ours[first]) == sorted(theirs[first]) else ""
            print(f"  its shape is {theirs[first]}, wanted is {ours[first]}{hint}")

    rows = defaultdict(dict)  # block -> in, skip, out -> errors
    for name, found in errors.items():
        block, _, side = name.rpartition(".")
        block, side = (block, side) if side in ("in", "skip", "out") else (name, "out")
        rows[block][side] = found
    ranked = sorted(rows.items(), key=lambda row: -max(row[1].values())[0])
    ranked = [(block, found) for block, found in ranked if max(found.values())[0]][:20]
    if ranked:
        print("   of in   of out   L2 of out")
    for block, found in ranked:
        pairs = found.get("in", (None,))[0], *found.get("out", (None, None))
        print(*(f"{'':9}" if value is None else f"{value:9.1e}" for value in pairs), f" {block}")
    return first is not None


def parse(arguments):
    parser = cascade.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", default="a large red circle on a white background", help="(default: %(default)s)")
    add("--out", default="trace.safetensors", type=Path, metavar="FILE", help="(default: %(default)s)")
    add("--list", action="store_true", help="only prints what would be recorded; takes seconds at any size")
    add("--compare", nargs=2, metavar=("TRACE", "OTHER"), help="only compares; exit status 1 where OTHER departs")
    add("--tolerance", type=float, default=1e-4, help="of --compare: of the largest value (default: %(default)s)")
    add("--stages", nargs="+", default=STAGES, choices=STAGES, help="whose blocks; stops after the last (default: all)")
    add("--blocks", nargs="+", default=[], metavar="PATTERN", help="(default: what each network itself calls)")
    add("--steps-recorded", nargs="+", type=int, default=[0, -1], metavar="N", help="whose blocks (default: 0 -1)")
    add("--limit", type=float, default=4, metavar="GB", help="writes no larger file (default: %(default)s)")
    add("--negative", default="", metavar="TEXT")
    add("--width", type=int)
    add("--height", type=int)
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=20, help="of Stage C (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="of Stage C (default: %(default)s)")
    add("--decoder-steps", type=int, default=10, help="of Stage B (default: %(default)s)")
    add("--decoder-guidance", type=float, default=0.0, help="of Stage B (default: none)")
    add("--weights", type=Path, default=cascade.TINY, metavar="FOLDER", help="(default: the small cascade)")
    add("--lite", nargs="?", const=True, default=False, choices=["prior", "decoder"], help="as of cascade.py")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--dtype", default="fp32", choices=cascade.DTYPES, help="of the run, not of the file (default: %(default)s)")
    add("--decoder-dtype", choices=cascade.DTYPES, help="of Stage B and A (default: as --dtype)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """The exit status: 0; 1 where --compare finds a departure; 2 after one line that says what the user can mend."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("once", "a prompt is cut")
    warnings.showwarning = lambda message, *_: print(f"trace.py: {message}", file=sys.stderr)
    try:
        options = parse(arguments)
        return int(bool(compare(*options.compare, options.tolerance) if options.compare else run(options)))
    except CascadeError as error:
        print(f"trace.py: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        print(
            "trace.py: out of memory; try fewer --stages or --steps-recorded, --lite or --dtype bf16", file=sys.stderr
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
