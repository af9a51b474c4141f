"""Time and memory compared with diffusers, on the same random networks of the lite pair's official sizes.

    python tests/porting/bench.py               all rows, ours and diffusers' in alternation: medians and their ratio
    python tests/porting/bench.py --gains       what each optimisation gains: with it and without
    python tests/porting/bench.py --quick       tiny networks: shows that the benchmark runs; its times mean nothing
    python tests/porting/bench.py --device cuda --batches 1 4 [--compile]       also images per second, networks loaded

--write puts the table into PERFORMANCE.md. It runs on a Linux machine, with PyTorch's number of threads (OMP_NUM_THREADS
changes it), in bf16 where the device multiplies it, else on a CPU in fp32 and on CUDA in fp16. The files, 9 GB in bf16,
are written to a temporary folder (TMPDIR chooses its place). tests/parity/requirements.txt names the peers.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "parity")]

import tiny
from compare import Parser, exit_status
from helpers import OFFICIAL, on_meta, relative_error
from operators import FOR_B, FOR_C
from pages import PERFORMANCE_PAGE, table, write_section

import model
from cascade import DTYPES, NETWORKS, accumulate_in_fp32, default_dtype, tune_process

TITLES = {"stage_a": "Stage A", "stage_b_lite": "Stage B lite, a step",
          "stage_c_lite": "Stage C lite, a step with guidance",
          "text_encoder": "Text encoder, 2 prompts"}
SHAPES = {"stage_a": {"z": (1, 4, 256, 256)}, "stage_b_lite": FOR_B, "stage_c_lite": FOR_C}
QUICK = {24: 3, 256: 32, 1280: 64, 768: 24}             # official size -> tiny one
FOLDERS = {"stage_c_lite": "prior_lite", "stage_b_lite": "decoder_lite", "stage_a": "vqgan"}
END = tiny.TEXT.end                                     # of the tiny tokenizer, which replaces CLIP's here


# ------------------------------------------------------------------------------ the networks, and their inputs

def network_on_meta(name, quick):
    network_class, config = tiny.NETWORKS[name.removesuffix("_lite")] if quick else OFFICIAL[name]
    return on_meta(network_class, replace(config, end=END) if name == "text_encoder" else config)


def write_files(folder, quick, dtype):
    """Random original files, and the same tensors in the diffusers layout beside them."""
    import peers
    tiny.write_tokenizer(folder / "tokenizer")
    makers = {"text_encoder": peers.transformers_text, "stage_a": peers.diffusers_stage_a}
    for name in TITLES:
        empty = network_on_meta(name, quick).to(dtype).to_empty(device="cpu")
        state = tiny.randomise(empty, 0).state_dict()
        tiny.save(state, folder / tiny.file_name(name), dtype, {"format": "pt"})
        with torch.device("meta"):
            peer = makers.get(name, peers.diffusers_unet)(network_on_meta(name, quick))
        if name == "text_encoder":
            peer.config.save_pretrained(folder / name)
        else:
            peer.save_config(folder / FOLDERS[name])
            path = folder / FOLDERS[name] / "diffusion_pytorch_model.safetensors"
            tiny.save(tiny.to_diffusers(state), path, dtype, {"format": "pt"})


def inputs_of(name, quick, dtype):
    """Of one image: a step with guidance of Stage C, one without of Stage B; a prompt and a negative prompt."""
    if name == "text_encoder":
        ids, mask = torch.full((2, 77), END), torch.zeros(2, 77, dtype=torch.int64)
        ids[:, :8], mask[:, :9] = 65, 1
        return {"ids": ids, "mask": mask}
    inputs = {}
    for key, shape in SHAPES[name].items():
        shape = [QUICK.get(side, side) for side in shape] if quick else shape
        inputs[key] = torch.randn(shape, dtype=dtype)
        if key == "r":                                  # diffusers does not round a time of 0
            inputs[key] = torch.zeros(shape)
    return inputs


def arguments_of(name, settings, quick):
    """Of `our_call` and `peer_call`."""
    dtype = DTYPES[settings["dtype"]]
    return name, Path(settings["folder"]), dtype, inputs_of(name, quick, dtype), settings["device"]


def our_call(name, folder, dtype, inputs, device, without=""):
    """A function that calls our network, in a process like that of the command, but for one optimisation."""
    if without == "attention by head":
        model.scaled_dot_product = F.scaled_dot_product_attention
    if without != "allocator tuning":
        tune_process()
    accumulate_in_fp32()
    network = model.load(folder / tiny.file_name(name), device, networks=NETWORKS)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    if name == "text_encoder":
        return lambda: network(**inputs)[1]
    return partial(network.decode if name == "stage_a" else network, **inputs)


def peer_call(name, folder, dtype, inputs, device):
    """A function that calls diffusers' or transformers' network on the same inputs."""
    import peers
    inputs = {key: value.to(device) for key, value in inputs.items()}
    if name == "text_encoder":
        text = peers.CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=dtype)
        text.to(device)
        return lambda: text(inputs["ids"], attention_mask=inputs["mask"]).text_embeds[:, None]
    network = peers.PaellaVQModel if name == "stage_a" else peers.StableCascadeUNet
    peer = network.from_pretrained(folder / FOLDERS[name], torch_dtype=dtype).eval().to(device)
    if name == "stage_a":
        return lambda: peer.decode(inputs["z"] * peer.config.scale_factor).sample
    arguments = {**inputs, "sample": inputs["x"], "timestep_ratio": inputs["r"].to(dtype)}
    del arguments["x"], arguments["r"]
    return lambda: peer(**arguments).sample


# ------------------------------------------------------------------------------ measuring

def seconds(call):
    begin = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matrix_rate(dtype, device, n=2048):
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5))


def prepare(make, *arguments):
    """Runs once in a process of its own, before its calls."""
    global call
    call = torch.inference_mode()(make(*arguments))


def first_output():
    return call().float().cpu().numpy()


def seconds_of_a_call():
    return seconds(call)


def compare_calls(makers, arguments, rounds):
    """Median seconds of each, and the relative error between their outputs. Each has a process of its own."""
    context = get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, prepare, (make, *arguments)) for make in makers]
    outputs = [torch.from_numpy(pool.submit(first_output).result()) for pool in pools]
    times = [[pool.submit(seconds_of_a_call).result() for pool in pools] for _ in range(rounds)]
    for pool in pools:
        pool.shutdown()
    return *map(median, zip(*times)), relative_error(*outputs)


# Programs for processes of their own: title -> ours, diffusers'.
BEGIN = """
import json, sys, time
globals().update(json.loads(sys.argv[1]))               # folder, dtype, device, …: see main
begin = time.perf_counter()
"""
FINISH = """
end = time.perf_counter()
import torch
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
if device != "cpu":
    peak = torch.cuda.max_memory_allocated()
print(json.dumps([end - begin, peak]))
"""
LOAD = """
import cascade
cascade.tune_process()
pipeline = cascade.Cascade(folder, device, dtype, lite=True)
begin = time.perf_counter()
networks = pipeline.network("stage_c"), pipeline.network("stage_b")
""", """
import torch
from diffusers import StableCascadeUNet
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
begin = time.perf_counter()
prior = StableCascadeUNet.from_pretrained(f"{folder}/prior_lite", torch_dtype=dtype).to(device)
decoder = StableCascadeUNet.from_pretrained(f"{folder}/decoder_lite", torch_dtype=dtype).to(device)
"""
DIFFUSERS = LOAD[1] + """
from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
text = CLIPTextModelWithProjection.from_pretrained(f"{folder}/text_encoder", dtype=dtype)
tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer", model_max_length=77)
vqgan = PaellaVQModel.from_pretrained(f"{folder}/vqgan", torch_dtype=dtype)
pipeline = StableCascadeCombinedPipeline(
    tokenizer, text, decoder, DDPMWuerstchenScheduler(), vqgan,
    prior, text, tokenizer, DDPMWuerstchenScheduler()).to(device)
def draw():
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(count)]
    return pipeline("a red circle", width=side, height=side, num_images_per_prompt=count, generator=generators,
                    prior_num_inference_steps=steps, num_inference_steps=decoder_steps).images
"""
IMAGE = """
import cascade
cascade.tune_process()
options = {"weights": folder, "dtype": dtype, "steps": steps, "decoder-steps": decoder_steps,
           "width": side, "height": side, "device": device, "output": f"{folder}/ours.png"}
options = [f"--{name}={value}" for name, value in options.items()]
assert cascade.main(["a red circle", "--lite", *options]) == 0
""", DIFFUSERS + 'draw()[0].save(f"{folder}/theirs.png")'
TWICE = """
for unet in unets if compiled else ():
    unet.compile()
draw()
begin = time.perf_counter()
draw()
"""
LOADED = """
import cascade
cascade.tune_process()
cascade.accumulate_in_fp32()
pipeline = cascade.Cascade(folder, device, dtype, lite=True, keep=True)
unets = pipeline.network("stage_c"), pipeline.network("stage_b")
def draw():
    pipeline("a red circle", width=side, height=side, images=count,
             steps=steps, decoder_steps=decoder_steps)
""" + TWICE, DIFFUSERS + "unets = prior, decoder" + TWICE
PROGRAMS = {"import": ("import cascade", "from diffusers import StableCascadeCombinedPipeline"),
            "load": LOAD, "image": IMAGE}


def run_process(code, settings):
    """Seconds of the whole process, seconds since its `begin`, peak bytes."""
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", BEGIN + code + FINISH, json.dumps(settings)]
    begin = time.perf_counter()
    output = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path})
    whole = time.perf_counter() - begin
    return whole, *json.loads(output.splitlines()[-1])


def medians_of(programs, settings, rounds):
    """Seconds, seconds since `begin`, and bytes: of ours and of diffusers' each."""
    runs = [[run_process(code, settings) for code in programs] for _ in range(rounds)]
    return torch.tensor(runs, dtype=torch.float64).median(dim=0).values.T.tolist()


# ------------------------------------------------------------------------------ the tables

def compare_with_diffusers(settings, quick, rounds, batches):
    def row(title, ours, theirs, unit="s", error=""):
        return title, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{ours / theirs:.2f}", error

    yield "", "ours", "diffusers", "ratio", "relative error"
    for name, title in TITLES.items():
        longer = rounds * 5 if name == "text_encoder" else rounds
        *times, error = compare_calls((our_call, peer_call), arguments_of(name, settings, quick), longer)
        yield row(title, *times, error=f"{error:.0e}")
    medians = {title: medians_of(programs, settings, rounds) for title, programs in PROGRAMS.items()}
    yield row("Import and start", *medians["import"][0])
    yield row("Loading the lite pair", *medians["load"][1])
    yield row("Prompt to image, peak", *(peak / 1e9 for peak in medians["image"][2]), "GB")
    steps = f"{settings['steps']} + {settings['decoder_steps']} steps"
    yield row(f"Prompt to image, {steps}", *medians["image"][0])
    for count in batches:
        _, times, peaks = medians_of(LOADED, settings | {"count": count}, rounds)
        compiled = ", UNets compiled" * settings["compiled"]
        title = f"Batch of {count}, networks loaded{compiled}"
        yield row(title, *(count / each for each in times), "images/s")
        yield row(f"{title}: peak", *(peak / 1e9 for peak in peaks), "GB")


def gains(settings, quick, rounds, batches):
    yield "without", "network", "seconds with it", "without it", "ratio", "relative error"
    for without in "attention by head", "allocator tuning":
        for name, title in TITLES.items():
            if (without, name) == ("attention by head", "stage_a"):
                continue                                # it has none
            makers = our_call, partial(our_call, without=without)
            ours, other, error = compare_calls(makers, arguments_of(name, settings, quick), rounds)
            yield without, title, f"{ours:.3g}", f"{other:.3g}", f"{ours / other:.2f}", f"{error:.0e}"


def fastest_dtype(device):
    if device == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "bf16" if default_dtype(torch.device(device)) == torch.bfloat16 else "fp16"


def main():
    parser = Parser(__doc__)
    for option in ("--quick", "--gains", "--write", "--compile"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="of images, networks loaded")
    options = parser.parse_args()
    device, dtype = options.device, options.dtype or fastest_dtype(options.device)
    chip = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    head = (f"{packages}; {chip}, {torch.get_num_threads()} threads, {dtype}, "
            f"{matrix_rate(DTYPES[dtype], device) / 1e12:.2g} TFLOP/s in a matrix product.\n")
    print(head)
    settings = {"dtype": dtype, "device": device, "count": 1, "compiled": options.compile}
    if options.quick:
        settings |= {"side": 128, "steps": 2, "decoder_steps": 1}
    else:
        settings |= {"side": 1024, "steps": 20, "decoder_steps": 10}
    measure = gains if options.gains else compare_with_diffusers
    rounds, rows = 1 if options.quick else options.rounds, []
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), options.quick, DTYPES[dtype])
        for row in measure(settings | {"folder": folder}, options.quick, rounds, options.batches):
            print("| " + " | ".join(row) + " |", flush=True)
            rows.append(row)
    if options.write:
        section = "gains" if options.gains else "benchmark" if device == "cpu" else "cuda"
        write_section(PERFORMANCE_PAGE, section, f"{head}\n{table(rows[0], rows[1:])}")


if __name__ == "__main__":
    sys.exit(exit_status("bench.py", main))
