"""How fast and how large it is, beside diffusers, on the same random networks of the lite pair's official sizes.

    python tests/bench.py                       every row, ours and diffusers' in alternation: medians and their ratio
    python tests/bench.py --steps 2 1           the whole picture in fewer steps of Stage C and B
    python tests/bench.py --memory              the peak of each way to keep networks: lite measured, full computed
    python tests/bench.py --leads               each thing that is done for speed: with it and without
    python tests/bench.py --growth              time and memory against the picture's size and their number
    python tests/bench.py --quick [--memory]    tiny networks: proves that it runs; its times say nothing

On the CPU, with PyTorch's number of threads (OMP_NUM_THREADS changes it). The type is bf16 where the CPU multiplies it,
else fp32. The files, some 9 GB in bf16, go to a temporary folder (--folder chooses its place) and are read from the
system's cache. diffusers and transformers are needed for the first two, tests/parity/requirements.txt names them.
"""
import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "parity")]

import model
import tiny
from cascade import COMPRESSION, DTYPES, quicken
from model import StageA, UNet, load
from operators import Record
from test_official import OFFICIAL
from text_encoder import TextEncoder
from text_encoder import load as load_tower

TOKENIZER_END = 519                                     # the small tokenizer's, which stands for CLIP's here
QUICK = {"stage_c_lite": (UNet, tiny.STAGE_C), "stage_b_lite": (UNet, tiny.STAGE_B), "stage_a": (StageA, tiny.STAGE_A),
         "text_encoder": (TextEncoder, tiny.TEXT)}
FILES = {"text_encoder": "text_encoder/model"}
PEERS = {"stage_c_lite": "prior_lite", "stage_b_lite": "decoder_lite", "stage_a": "vqgan"}
TABLE = "| " + " | ".join(["{}"] * 8) + " |"


# ---- the networks ----------------------------------------------------------------------------------------------------

def on_meta(kinds, name):
    network, config = kinds[name]
    with torch.device("meta"):
        return network(replace(config, end=TOKENIZER_END) if name == "text_encoder" else config).eval()


def random_state(network, dtype):
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            state[name] = torch.randn(tensor.shape, dtype=dtype).mul_(0.3 / max(1, tensor[:1].numel()) ** 0.5)
        else:
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    return state


def write_files(folder, kinds, dtype, peers):
    """Random original files in one folder, and the same tensors in the diffusers layout beside them."""
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_folder(folder / "tiny")
    for name in kinds:
        network = on_meta(kinds, name)
        state = random_state(network, dtype)
        tiny.save(state, folder / f"{FILES.get(name, name)}.safetensors", dtype, {"format": "pt"})
        if name == "text_encoder":
            (folder / "text_encoder" / "config.json").write_text(json.dumps({"eos_token_id": TOKENIZER_END}))
        if not peers:
            continue
        from peers import diffusers_stage_a, diffusers_unet, transformers_text
        with torch.device("meta"):
            if name == "text_encoder":
                transformers_text(network).config.save_pretrained(folder / name)
                continue
            peer = (diffusers_stage_a if name == "stage_a" else diffusers_unet)(network)
        peer.save_config(folder / PEERS[name])
        path = folder / PEERS[name] / "diffusion_pytorch_model.safetensors"
        tiny.save(tiny.to_diffusers(state), path, dtype, {"format": "pt"})


def inputs(kinds, side, count, dtype, device="cpu"):
    """name -> (method, what it is given) for `count` pictures of side x side: a step with guidance of Stage C, one
    without of Stage B; Stage A draws one picture at a time, the text tower reads a prompt and what is not wanted."""
    h, y, text = math.ceil(side / COMPRESSION), 2 * math.ceil(side / 8), kinds["text_encoder"][1]
    with torch.device(device):
        def rand(*shape):
            return torch.randn(shape, dtype=dtype)

        ids, mask = torch.full((2, text.length), TOKENIZER_END), torch.zeros(2, text.length, dtype=torch.int64)
        ids[:, :8], mask[:, :9] = 65, 1
        def unet(rows, *shape):
            return {"x": rand(rows, *shape), "clip_text_pooled": rand(rows, 1, text.width),
                    "r": torch.zeros(rows)}         # the one time that diffusers does not round in bf16

        hidden, effnet = rand(2 * count, text.length, text.width), rand(count, 16, h, h)
        image = torch.zeros(2 * count, 1, kinds["stage_c_lite"][1].image, dtype=dtype)      # diffusers takes no None
        return {"stage_a": ("decode", {"z": rand(1, 4, y, y)}),
                "stage_b_lite": ("forward", {**unet(count, 4, y, y), "effnet": effnet}),
                "stage_c_lite": ("forward", {**unet(2 * count, 16, h, h), "clip_text": hidden, "clip_img": image}),
                "text_encoder": ("forward", {"ids": ids, "mask": mask})}


def prepared(network, given):
    """What a step of a UNet is given in the course of a run."""
    return network.prepare(**given) if isinstance(network, UNet) else given


def work(kinds, side, count, dtype):
    """name -> (FLOPs of one call, bytes of its weights, bytes of its activations at most), found without computing."""
    found = {}
    for name, (method, given) in inputs(kinds, side, count, dtype, "meta").items():
        network, record = on_meta(kinds, name).to(dtype), Record()
        given = prepared(network, given)
        record.held |= {tensor.untyped_storage()._cdata: 1 for tensor in network.state_dict().values()}
        for tensor in [*given.values(), *given.get("cond", {}).values()]:
            if torch.is_tensor(tensor):
                record.hold(tensor)
        with torch.inference_mode(), record:
            getattr(network, method)(**given)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        found[name] = sum(row.flops for row in record.rows.values()), weights, record.peak
    return found


# ---- processes of their own ------------------------------------------------------------------------------------------

BEGIN = """
import json, os, sys, time
folder, dtype, side, count, steps, decoder_steps, output = json.loads(sys.argv[1])
options = ["a red circle", "--weights", folder, "--lite", "--dtype", dtype, "--steps", str(steps), "--decoder-steps",
           str(decoder_steps), "--width", str(side), "--height", str(side), "--images", str(count), "--device", "cpu"]
begun = time.perf_counter()
"""
END = """
seconds, peak = time.perf_counter() - begun, 0
if os.path.exists("/proc/self/status"):
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, peak]))
"""
IMPORT = "import cascade", "from diffusers import StableCascadeCombinedPipeline"
LOAD = """
from cascade import Cascade, quicken
quicken()
begun = time.perf_counter()
cascade = Cascade(folder, dtype=dtype, lite=True, keep=True)
cascade.network("stage_c"), cascade.network("stage_b")
""", """
import torch
from diffusers import StableCascadeUNet
begun, dtype = time.perf_counter(), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
networks = [StableCascadeUNet.from_pretrained(f"{folder}/{name}", torch_dtype=dtype)
            for name in ("prior_lite", "decoder_lite")]
"""
PICTURE = """
import cascade
cascade.quicken()
begun = time.perf_counter()
assert cascade.main([*options, "-o", output]) == 0
""", """
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline, StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
text = CLIPTextModelWithProjection.from_pretrained(f"{folder}/text_encoder", dtype=dtype)
tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer", model_max_length=77)
prior, decoder = (StableCascadeUNet.from_pretrained(f"{folder}/{name}", torch_dtype=dtype)
                  for name in ("prior_lite", "decoder_lite"))
pipeline = StableCascadeCombinedPipeline(
    tokenizer=tokenizer, text_encoder=text, decoder=decoder, scheduler=DDPMWuerstchenScheduler(),
    vqgan=PaellaVQModel.from_pretrained(f"{folder}/vqgan", torch_dtype=dtype),
    prior_tokenizer=tokenizer, prior_text_encoder=text, prior_prior=prior, prior_scheduler=DDPMWuerstchenScheduler())
pipeline("a red circle", width=side, height=side, prior_num_inference_steps=steps, prior_guidance_scale=4.0,
         num_inference_steps=decoder_steps, decoder_guidance_scale=0.0,
         generator=[torch.Generator("cpu").manual_seed(0)]).images[0].save(output)
"""
KEPT = """
import cascade
cascade.quicken()
cascade.Cascade(folder, dtype=dtype, lite=True, keep=True)(
    "a red circle", "", side, side, steps, decoder_steps=decoder_steps, images=count)
"""
LINES = """
import cascade, pathlib
cascade.quicken()
pathlib.Path(folder, "prompts.txt").write_text("a red circle\\na star")
numbered = f"{folder}/{time.time_ns()}.png"
assert cascade.main([*options[1:], "--prompts", f"{folder}/prompts.txt", "-o", numbered]) == 0
"""
TINY = """
import cascade
cascade.quicken()
cascade.Cascade(f"{folder}/tiny", dtype=dtype)("a red circle", width=64, height=64, steps=1, decoder_steps=1)
"""


def child(code, *settings):
    """Runs code in a process of its own -> seconds from its start to its end, seconds since `begun`, peak bytes."""
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    begun = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", BEGIN + code + END, json.dumps(settings)], capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": path})
    whole = time.perf_counter() - begun
    if run.returncode:
        raise SystemExit(f"bench.py: a process failed\n{code}\n{run.stderr}")
    return whole, *json.loads(run.stdout.splitlines()[-1])


# ---- side by side ----------------------------------------------------------------------------------------------------

def alternate(pair, rounds):
    """-> all results of both, taken in turn."""
    results = [], []
    for _ in range(rounds):
        for one, found in zip(pair, results):
            found.append(one())
    return results


def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def matrix_rate(dtype, n):
    """FLOP/s of this machine's own matrix product in this type, at best."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: a @ b) for _ in range(5))


def our_call(name, folder, dtype, method, given, without=""):
    """What calls our network, in a process that is as the command makes it, but for what it is to do without."""
    if without == "heads apart":
        model.ATTENTION.clear()
    elif without == "strips":
        model.STRIP = 2 ** 30
    if without != "memory kept":
        quicken()
    network = (load_tower if name == "text_encoder" else load)(folder / f"{FILES.get(name, name)}.safetensors")
    given = prepared(network, given)
    if name == "text_encoder":
        return lambda: network(**given)[1]
    return lambda: getattr(network, method)(**given)


def peer_call(name, folder, dtype, method, given):
    """What calls diffusers' or transformers' network with what ours is given."""
    if name == "text_encoder":
        from transformers import CLIPTextModelWithProjection
        peer = CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=dtype).eval()
        return lambda: peer(given["ids"], attention_mask=given["mask"], output_hidden_states=True).text_embeds[:, None]
    if name == "stage_a":
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
        peer = PaellaVQModel.from_pretrained(folder / PEERS[name], torch_dtype=dtype).eval()
        return lambda: peer.decode(given["z"] * peer.config.scale_factor).sample
    from diffusers import StableCascadeUNet
    peer = StableCascadeUNet.from_pretrained(folder / PEERS[name], torch_dtype=dtype).eval()
    rest = {key: value for key, value in given.items() if key not in ("x", "r")}
    return lambda: peer(given["x"], given["r"].to(dtype), **rest, return_dict=False)[0]


@torch.inference_mode()
def serve(pipe, make, *settings):
    """Runs in a process of its own: sends a network's answer, which warms it up, then a time for every request."""
    call = make(*settings)
    pipe.send(call().float().numpy())
    while pipe.recv():
        pipe.send(timed(call))


def stage(makes, name, folder, dtype, method, given, rounds):
    """-> seconds of the first, of the second, and how far apart their results are, of the largest value. Each has a
    process of its own: how one uses memory does not change the other's."""
    spawn, sides = multiprocessing.get_context("spawn"), []
    for make in makes:
        pipe, end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(end, make, name, folder, dtype, method, given), daemon=True)
        process.start()
        sides.append((process, pipe, torch.from_numpy(pipe.recv())))

    def request(pipe):
        pipe.send(True)
        return pipe.recv()

    times = alternate([lambda pipe=pipe: request(pipe) for _, pipe, _ in sides], rounds)
    for process, pipe, _ in sides:
        pipe.send(False)
        process.join()
    a, b = (answer for *_, answer in sides)
    return *map(median, times), ((a - b).abs().max() / b.abs().max()).item()


def side_by_side(kinds, folder, name, dtype, side, steps, rounds, n):
    """Prints every row as soon as it is known."""
    def row(title, ours, theirs, unit, goal, share="", share_goal="", apart=""):
        print(TABLE.format(title, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{ours / theirs:.2f}", f"≤ {goal:.2f}",
                           share, share_goal, apart), flush=True)

    print(TABLE.format("", "ours", "diffusers", "ratio", "goal", "of the matrix rate", "goal", "apart"))
    print(TABLE.format(*["---"] * 8))
    costs = work(kinds, side, 1, dtype)
    goals = {"stage_a": (f"Stage A, {side}×{side}", 0.55, 70), "stage_b_lite": ("Stage B lite, a step", 0.70, 70),
             "stage_c_lite": ("Stage C lite, a step with guidance", 0.85, 85),
             "text_encoder": ("Text tower, 2 prompts", 0.90, None)}
    for key, (method, given) in inputs(kinds, side, 1, dtype).items():
        title, goal, share_goal = goals[key]
        rounds_here = rounds * 5 if key == "text_encoder" else rounds                   # a call is short there
        ours, theirs, apart = stage((our_call, peer_call), key, folder, dtype, method, given, rounds_here)
        share = costs[key][0] / ours / matrix_rate(dtype, n)
        row(title, ours, theirs, "s", goal, f"{share:.0%}", f"≥ {share_goal} %" if share_goal else "", f"{apart:.0e}")
    settings = str(folder), name, side, 1, *steps, str(folder / "picture.png")

    def both(codes):
        """Medians of seconds whole, seconds since begun, peak; ours and theirs."""
        found = alternate([lambda code=code: child(code, *settings) for code in codes], rounds)
        return [list(map(median, zip(*one))) for one in found]

    ours, theirs = both(IMPORT)
    row("Import and start", ours[0], theirs[0], "s", 0.35)
    ours, theirs = both(LOAD)
    row("Loading the lite pair", ours[1], theirs[1], "s", 0.40)
    ours, theirs = both(PICTURE)
    row("Prompt to picture, peak", ours[2] / 1e9, theirs[2] / 1e9, "GB", 0.50)
    row(f"Prompt to picture, {steps[0]} + {steps[1]} steps", ours[0], theirs[0], "s", 0.75)


# ---- ours alone ------------------------------------------------------------------------------------------------------

def peaks(costs):
    """The bytes that each way to keep networks needs at most, beside Python and PyTorch."""
    text, c, b, a = ((weights, live) for name in ("text", "stage_c", "stage_b", "stage_a")
                     for key, (_, weights, live) in costs.items() if key.startswith(name))
    stages = [text, c, b, a]
    return {"one at a time": max(map(sum, stages)),
            "--prompts": max(sum(text), sum(c), b[0] + a[0] + max(b[1], a[1])),
            "keep=True": max(sum(weights for weights, _ in stages[:i + 1]) + live
                             for i, (_, live) in enumerate(stages))}


def memory(kinds, folder, name, dtype, side, quick):
    full = kinds if quick else kinds | {"stage_c_lite": OFFICIAL["stage_c"], "stage_b_lite": OFFICIAL["stage_b"]}
    lite, large = (peaks(work(which, side, 1, dtype)) for which in (kinds, full))
    settings = str(folder), name, side, 1, 2, 1, str(folder / "picture.png")
    base = child(TINY, *settings)[2]
    print("The files mapped into memory are counted.\n\n| GB | lite, measured | lite, computed | full, computed |\n"
          f"| --- | --- | --- | --- |\n| tiny networks | {base / 1e9:.2f} | | |")
    for mode, code in (("one at a time", PICTURE[0]), ("--prompts", LINES), ("keep=True", KEPT)):
        print(f"| {mode} | {child(code, *settings)[2] / 1e9:.2f} | {(base + lite[mode]) / 1e9:.2f} | "
              f"{(base + large[mode]) / 1e9:.2f} |", flush=True)


def leads(kinds, folder, name, dtype, side, rounds):
    """What each thing that is done for speed is worth: seconds with all of them and without one."""
    print("| without | stage | seconds with | without | ratio | apart |\n" + "| --- " * 6 + "|")
    for without, keys in (("heads apart", ("stage_b_lite", "stage_c_lite", "text_encoder")), ("strips", ("stage_a",)),
                          ("memory kept", ("stage_a", "stage_b_lite", "stage_c_lite", "text_encoder"))):
        for key in keys:
            given = key, folder, dtype, *inputs(kinds, side, 1, dtype)[key], rounds
            ours, slower, apart = stage((our_call, partial(our_call, without=without)), *given)
            print(f"| {without} | {key} | {ours:.3g} | {slower:.3g} | {ours / slower:.2f} | {apart:.0e} |", flush=True)


def growth(kinds, folder, name, dtype, sides, steps):
    print("| size | pictures | TFLOP | seconds | TFLOP/s | GB at the peak | computed |\n" + "| --- " * 7 + "|")
    base = child(TINY, str(folder), name, sides[0], 1, 1, 1, "")[2]
    for side, count in [(side, 1) for side in sides] + [(sides[0], count) for count in (2, 4, 8)]:
        costs = work(kinds, side, count, dtype)
        calls = {"text_encoder": 1, "stage_c_lite": steps[0], "stage_b_lite": steps[1], "stage_a": count}
        flops = sum(costs[key][0] * n for key, n in calls.items())
        settings = str(folder), name, side, count, *steps, str(folder / "picture.png")
        _, seconds, peak = child(PICTURE[0], *settings)
        print(f"| {side}×{side} | {count} | {flops / 1e12:.3g} | {seconds:.3g} | {flops / seconds / 1e12:.3g} | "
              f"{peak / 1e9:.2f} | {(base + peaks(costs)['one at a time']) / 1e9:.2f} |", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, has_bf16 = parser.add_argument, getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    add("--quick", action="store_true")
    add("--memory", action="store_true")
    add("--growth", action="store_true")
    add("--leads", action="store_true")
    add("--steps", type=int, nargs=2, metavar=("C", "B"), help="(default: 20 10; 2 1 for --growth)")
    add("--rounds", type=int, default=3, help="of which the median is taken (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16" if has_bf16 else "fp32", help="(default here: %(default)s)")
    add("--folder", type=Path, help="where the random files go for the while")
    options = parser.parse_args(arguments)
    dtype, side = DTYPES[options.dtype], 128 if options.quick else 1024
    kinds = QUICK if options.quick else {name: OFFICIAL[name] for name in QUICK}
    steps = options.steps or ([2, 1] if options.growth or options.quick else [20, 10])
    rounds = 1 if options.quick else options.rounds
    packages = ("torch", "diffusers", "transformers", "accelerate")     # diffusers loads otherwise without the last
    print(", ".join(f"{package} {version(package) if find_spec(package) else 'not installed'}" for package in packages))
    print(f"{torch.get_num_threads()} threads, {options.dtype}, "
          f"{matrix_rate(dtype, 256 if options.quick else 2048) / 1e12:.3g} TFLOP/s in a matrix product\n", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        torch.manual_seed(0)
        write_files(Path(folder), kinds, dtype, peers=not (options.memory or options.growth or options.leads))
        given = kinds, Path(folder), options.dtype, dtype
        if options.memory:
            memory(*given, side, options.quick)
        elif options.leads:
            leads(*given, side, rounds)
        elif options.growth:
            growth(*given, [64, 128] if options.quick else [512, 1024, 1536, 2048], steps)
        else:
            side_by_side(*given, side, steps, rounds, 256 if options.quick else 2048)


if __name__ == "__main__":
    main()
