"""Golden activations: everything that happens between a prompt and its image, for a port to check itself against.

    python tests/porting/trace.py "a large red circle" --out trace.safetensors          the tiny cascade: seconds, 10 MB
    python tests/porting/trace.py --compare trace.safetensors mine.safetensors          where does mine differ?
    python tests/porting/trace.py "an astronaut" --weights weights/official --lite --stages stage_c --steps-recorded 0
                                                                                        1.4 GB, all stages several times that
    python tests/porting/trace.py "a large red circle" --ranges                         a table of all tensors, and no file

`Cascade` draws one image while hooks record it. In the names, S is stage_c or stage_b; NNN counts its steps from 000;
PATH is the path of a module in model.py or text_encoder.py, the same as in the names of the official files.

    tokens.ids, tokens.mask                 (B, L), integers: the prompt and, if it differs, the negative prompt
    text_encoder.PATH.in, .out              in a layer, token i attends to the tokens j <= i where the mask is 1
    text_encoder.hidden, .pooled            the outputs of the text encoder
    S.timesteps, S.alpha_bar                (steps + 1,): step NNN goes from entry NNN to the next
    S.condition.NAME                        the UNet's arguments: clip_text_pooled, clip_text and clip_img, or effnet
    S.step-NNN.x                            the latent before the step; in step 000 it is pure noise
    S.step-NNN.embed_time.out               the time embedding; every block gets it as `t_emb`
    S.step-NNN.PATH.in, .out                of some steps, see below; every block gets clip_norm.out as `cond`
    S.step-NNN.PATH.skip                    of the blocks that read the skip of their level
    S.step-NNN.out                          the output of the network
    S.step-NNN.epsilon, .x0                 the noise after guidance; the predicted clean latent
    S.step-NNN.noise                        the noise that the step adds; zeros in the last step
    S.latent                                the latent after the last step
    stage_a.PATH.in, .out                   of its decoder
    picture                                 (1, 3, H, W) in [0, 1]

PATH is recorded in the steps of --steps-recorded (-1 is a stage's last step). It stands for every module that a network
itself calls or, with --blocks, for every module that matches a pattern, however deep: 'stage_c.down_blocks.0.0*' is a
block and everything inside it. A module that is called again in the same step, because its level repeats, is
PATH.pass-1, then PATH.pass-2. With guidance a network gets two rows: the conditional one, then the unconditional one.

Values are fp32, whatever the type of the run. Between the blocks of the UNets and of Stage A they are channels-last,
(B, H, W, C); latents, noise and pixels, and so embedding.in, clf.out and out_block.out, are channels-first. --compare
is compare.py: it expects the same names in the same layout (axes of length 1 do not count), in any floating-point type.
The other file may hold any part of the trace: one stage, or one block. The file's metadata hold the kind and the sources
of every tensor in the order of execution ("graph"), the tolerances, and how the image was made ("used").

Another implementation's Stage C, `port`, with our noise and conditions:

    trace = load_file("trace.safetensors")
    names = "clip_text_pooled", "clip_text", "clip_img"
    condition = {name: trace[f"stage_c.condition.{name}"] for name in names}
    mine, x, a = {}, trace["stage_c.step-000.x"], trace["stage_c.alpha_bar"]
    for i, r in enumerate(trace["stage_c.timesteps"][:-1]):
        step = f"stage_c.step-{i:03}"
        mine[f"{step}.out"] = port(torch.cat([x, x]), r.expand(2), **condition)
        cond, uncond = mine[f"{step}.out"].chunk(2)
        mine[f"{step}.epsilon"] = uncond + 4.0 * (cond - uncond)
        x = sampler.ddpm(x, mine[f"{step}.epsilon"], trace[f"{step}.noise"], a[i], a[i + 1])
    mine["stage_c.latent"] = x
    save_file({name: tensor.contiguous() for name, tensor in mine.items()}, "mine.safetensors")

One of its blocks: `block(trace[f"{name}.in"], trace[f"{step}.embed_time.out"], trace[f"{step}.clip_norm.out"])`. In the
other direction, `Cascade().decode(x, "a large red circle")` decodes the latents of the port.
"""
import sys

import compare

if __name__ == "__main__" and "--compare" in sys.argv:  # before PyTorch is imported: it need not be installed
    sys.exit(compare.main([argument for argument in sys.argv[1:] if argument != "--compare"]))

import hashlib
import json
import re
from collections import Counter
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save

PORTING = Path(__file__).resolve().parent
sys.path.insert(0, str(PORTING.parents[1]))

import cascade
import sampler
from model import CascadeError, UNet, require
from pages import table
from text_encoder import TextEncoder

STAGES = ("text_encoder", "stage_c", "stage_b", "stage_a")
MANIFEST = PORTING / "golden" / "manifest.json"
CHANNELS_FIRST = re.compile(
    r"(.*\.)?(embedding(\.0)?\.in|clf(\.2)?\.out|out_block(\.1)?\.out"
    r"|step-\d+\.\w+|condition\.\w+|latent|picture)")
OUTLIER = 10                                            # times the median channel


class Trace:
    """The recorded values, {name: tensor}, in the order of execution.

    graph       {name: {"kind": of the tensor, "sources": {name of a tensor that it is computed from: gain}, "inputs":
                of a block, {argument: name}, "same_as": name of an earlier tensor with the same values}}. The gain is
                how much larger a relative error of the source is in the tensor.
    """

    def __init__(self, stages, steps, patterns):
        self.stages, self.steps, self.patterns = stages, steps, patterns
        self.tensors, self.graph, self.first = {}, {}, {}

    def begin(self, prefix, record=True):
        """From here on names begin with this prefix, and the passes of every module are counted again."""
        self.prefix, self.stage = prefix, prefix.split(".")[0]
        self.record = record and self.stage in self.stages
        self.passes, self.open = Counter(), []
        self.unused = []                                # outputs that nothing has read so far

    def add(self, name, tensor, kind, sources=None, inputs=None):
        """`sources`: names, with their gains if these are not 1. By default the earlier tensor with the same values, else
        the outputs that nothing has read."""
        tensor = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # one's `out` is the next one's `in`
        name = self.full(name)
        key = tensor.dtype, hashlib.sha256(tensor.numpy().tobytes()).digest()
        same = self.first.setdefault(key, name)
        if sources is None:
            sources = [same] if same != name else self.unused
        gains = sources if isinstance(sources, dict) else dict.fromkeys(sources, 1.0)
        self.unused = [other for other in self.unused if other not in gains]
        if name.endswith(".x"):                         # a latent; outputs are appended by after_module
            self.unused.append(name)
        self.tensors[name] = tensor
        self.graph[name] = {"kind": kind, "sources": gains}
        if inputs:
            self.graph[name]["inputs"] = inputs
        if same != name and tensor.shape == self.tensors[same].shape:
            self.graph[name]["same_as"] = same

    def full(self, name):
        return f"{self.prefix}.{name}".lstrip(".")

    def watch(self, network, stage):
        self.begin(stage)
        network.register_forward_pre_hook(self.before_network)
        network.register_forward_hook(self.after_network)
        for path, module in network.named_modules():
            if path:
                module.register_forward_pre_hook(partial(self.before_module, path))
                module.register_forward_hook(partial(self.after_module, path))
        return network

    def before_network(self, network, args):
        if isinstance(network, UNet):
            x, r = args
            t_emb = network.embed_time(r, None, None).to(x.dtype)
            self.add("embed_time.out", t_emb, "embed_time", {f"{self.stage}.timesteps": 10000.0})
        elif isinstance(network, TextEncoder):
            self.begin("tokens")
            for name, tensor in zip(("ids", "mask"), args):
                self.add(name, tensor, "integers", [])
            self.begin("text_encoder")

    def after_network(self, network, args, output):
        self.output = output
        if torch.is_tensor(output):
            self.add("out", output, "out")
        else:
            for name, tensor in zip(("hidden", "pooled"), output):
                self.add(name, tensor, "out")

    def is_recorded(self, path):
        if not self.record or not self.patterns:
            return self.record and not self.open  # what a network itself calls; not what is called within that
        return any(fnmatchcase(f"{self.stage}.{path}", pattern) for pattern in self.patterns)

    def before_module(self, path, module, args):
        name, count = None, self.passes[path]
        if self.is_recorded(path):
            name = f"{path}.pass-{count}" if count else path
            sources = {"effnet_mapper": [f"{self.stage}.condition.effnet"],
                       "pixels_mapper": [f"{self.stage}.condition.pixels"], "up_blocks.0": ["stage_b.latent"]}
            self.add(f"{name}.in", args[0], "input", sources.get(path))
            if getattr(module, "reads_skip", False):
                self.add(f"{name}.skip", args[-1], "input")
        self.passes[path] += 1
        self.open.append(name)

    def after_module(self, path, module, args, output):
        name = self.open.pop()
        if not name:
            return
        kind = type(module).__name__
        if not kind.endswith(("Block", "Layer")):
            kind = path.split(".")[0]
        inputs = {"x": self.full(f"{name}.in")}
        if getattr(module, "reads_skip", False):
            inputs["skip"] = self.full(f"{name}.skip")
        if kind == "TimestepBlock":
            inputs["t_emb"] = self.full("embed_time.out")
        elif kind == "AttentionBlock":
            inputs["cond"] = self.full("clip_norm.out")
        elif kind == "TransformerLayer":
            inputs["mask"] = "tokens.mask"
        sources = [source for key, source in inputs.items() if key != "mask" and source in self.graph]
        self.add(f"{name}.out", output, kind, sources, inputs)
        if not name.startswith("clip_norm"):            # every attention block reads it
            self.unused.append(self.full(f"{name}.out"))

    def sample(self, unet, shape, condition, steps, guidance, noise_generators, recipe):
        """sampler.sample, recorded. The noise is drawn a second time, from copies of the generators."""
        stage, times = self.stage, sampler.timesteps(steps)
        a = sampler.alpha_bar(times)
        copies = [generator.clone_state() for generator in noise_generators]
        self.add("timesteps", times, "given", [])
        self.add("alpha_bar", a, "given", [])
        rows = len(copies) * (2 if guidance > 1 else 1)
        sources = {"clip_text": "text_encoder.hidden", "clip_text_pooled": "text_encoder.pooled",
                   "effnet": "stage_c.latent"}
        for name, value in condition.items():
            self.add(f"condition.{name}", value[:rows], "input", [sources[name]])
        if unet.config.image_dim:  # without an image it is zeros, which other implementations may need
            self.add("condition.clip_img", torch.zeros(rows, 1, unet.config.image_dim), "given", [])
        walk = sampler.sample(unet, shape, condition, steps, guidance, noise_generators, recipe)
        x = sampler.draw_noise(copies, shape, "cpu")
        sources = {}
        for i in range(steps):
            self.begin(f"{stage}.step-{i:03}", i in self.steps or i - steps in self.steps)
            self.add("x", x, "latent" if sources else "given", sources)
            before, (x, x0) = x, next(walk)
            eps = self.output.float()
            gain = 1.0
            if rows > len(copies):
                gain = (2 * guidance - 1) * eps.std()
                eps = sampler.guide(*eps.chunk(2), guidance, recipe.rescale)
                gain /= eps.std()
            noise = sampler.draw_noise(copies, shape, "cpu") * (i < steps - 1)
            self.add("epsilon", eps, "epsilon", {self.full("out"): float(gain)})
            values = {"x": before, "epsilon": eps, "noise": noise}
            gains = self.gains(values, x0, lambda x, eps, noise: sampler.predict_x0(x, eps, a[i]))
            self.add("x0", x0, "x0", gains)
            self.add("noise", noise, "given", [])
            sources = self.gains(values, x, lambda *terms: recipe.step(*terms, a[i], a[i + 1]))
            yield x, x0
        self.begin(stage)
        self.add("latent", x, "latent", sources)

    def gains(self, values, result, formula):
        """The gains of a linear formula from its terms to its result."""
        gains = {}
        for name, value in values.items():
            terms = [torch.tensor(float(other == name)) for other in values]
            gain = formula(*terms).abs() * value.std() / result.std()
            if gain:
                gains[self.full(name)] = float(gain)
        return gains

    def save(self, path, used, compact=False, state=None):
        """`compact`: tensors with the same values are stored once; see "same_as" in the graph. `state`: more tensors."""
        tensors = {name: tensor for name, tensor in self.tensors.items()
                   if not (compact and "same_as" in self.graph[name])}
        tolerances = json.loads(MANIFEST.read_text("utf-8"))["tolerances"]
        metadata = {"graph": json.dumps(self.graph), "tolerances": json.dumps(tolerances),
                    "used": json.dumps(used, default=str)}
        cascade.write_file(path, save(tensors | (state or {}), metadata))


class TracedCascade(cascade.Cascade):
    """Every network that it loads is recorded in its `trace`."""

    def network(self, name):
        return self.trace.watch(super().network(name), name)


@torch.no_grad()
def record(options):
    """The Trace of one image: Cascade.__call__, up to the last of the recorded stages."""
    where = options.weights, options.device, options.dtype, options.lite
    traced = TracedCascade(*where, progress=True)
    traced.trace = trace = Trace(options.stages, options.steps_recorded, options.blocks)
    last = max(map(STAGES.index, options.stages))
    text = traced.encode_prompt(options.prompt, options.negative)
    width, height = traced.size(options.width, options.height)
    size = {"width": width, "height": height, "seed": options.seed}
    with mock.patch.object(cascade, "sample", trace.sample):
        if last >= 1:
            latents = traced.prior(text, steps=options.steps, guidance=options.guidance, **size)
        if last >= 2:
            image = traced.decode(
                latents, text, steps=options.decoder_steps, guidance=options.decoder_guidance,
                prior_steps=options.steps, output="pt" if last == 3 else "latent", **size)
        if last == 3:
            trace.begin("")
            trace.add("picture", image, "picture", ["stage_a.out_block.out"])
    return trace


def outliers(name, tensor):
    """The channels whose largest value is over OUTLIER times the median channel's: how many, and the first four."""
    if tensor.dim() == 4 and CHANNELS_FIRST.fullmatch(name):
        tensor = tensor.movedim(1, -1)
    channels = tensor.shape[-1] if tensor.dim() > 1 else 1
    peaks = tensor.reshape(-1, channels).abs().amax(0)
    large = [channel for channel in peaks.argsort(descending=True, stable=True).tolist()
             if peaks[channel] > OUTLIER * peaks.median()]
    if not large:
        return ""
    listed = ", ".join(f"{channel} ({peaks[channel]:.4g})" for channel in large[:4])
    return f"{len(large)} of {channels}: {listed}"


def ranges(tensors):
    """A table of the floating-point tensors."""
    rows = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            values = tensor.min(), tensor.max(), tensor.std(correction=0)
            rows.append([name, *(f"{value:.4g}" for value in values), outliers(name, tensor)])
    return table(["tensor", "minimum", "maximum", "standard deviation", "outlier channels"], rows)


def run(options):
    out, most = options.out, max(options.steps, options.decoder_steps)
    valid = out.suffix == ".safetensors" and out.absolute().parent.is_dir() and not out.is_dir()
    message = f"--out {out}: expected a .safetensors file in an existing folder"
    require(valid or options.ranges, message)
    for step in options.steps_recorded:
        require(-most <= step < most, f"--steps-recorded {step}: expected {-most} to {most - 1}")
    trace = record(options)
    if options.ranges:
        print(ranges(trace.tensors), end="", flush=True)
        return
    trace.save(out, {**vars(options), "torch": torch.__version__})
    print(f"{out}: {len(trace.tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")


# ------------------------------------------------------------------------------ the command

def parse(arguments):
    parser = compare.Parser(__doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("prompt", nargs="?", default="a large red circle on a white background", help=default)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--out", default="trace.safetensors", type=Path, metavar="FILE", help=default)
    one.add_argument("--ranges", action="store_true", help="print the range of every tensor")
    add("--compare", nargs=2, metavar=("TRACE", "OTHER"), help="as compare.py, with its options")
    add("--stages", nargs="+", default=STAGES, choices=STAGES, help="the last one ends the run")
    add("--blocks", nargs="+", default=[], metavar="PATTERN", help="(default: see above)")
    add("--steps-recorded", nargs="+", type=int, default=[0, -1], metavar="N", help=default)
    add("--negative", default="", metavar="TEXT")
    for option, value in (("width", None), ("height", None), ("seed", 0), ("steps", 20),
                          ("decoder_steps", 10), ("guidance", 4.0), ("decoder_guidance", 0.0)):
        add(f"--{option.replace('_', '-')}", type=cascade.number(option), default=value, help=default)
    add("--weights", type=Path, default=cascade.TINY, metavar="FOLDER", help=default)
    add("--lite", action="store_true", help="as in cascade.py")
    add("--device", default="cpu", help=default)
    add("--dtype", default="fp32", choices=cascade.DTYPES, help="of the run, not of the file")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Returns the exit status: 0, or 2 after one line that says what went wrong."""
    return compare.exit_status("trace.py", lambda: run(parse(arguments)), CascadeError)


if __name__ == "__main__":
    sys.exit(main())
