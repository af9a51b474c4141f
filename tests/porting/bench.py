"""Time and memory compared with diffusers, on the same random networks of the lite pair's official sizes.

    python tests/porting/bench.py               all rows, ours and diffusers' in alternation: medians and their ratio
    python tests/porting/bench.py --memory      the peak of each way to keep networks in memory
    python tests/porting/bench.py --gains       what each optimisation gains: with it and without
    python tests/porting/bench.py --quick       tiny networks: shows that the benchmark runs; its times mean nothing

--write puts the table into PERFORMANCE.md. It runs on the CPU, with PyTorch's number of threads (OMP_NUM_THREADS changes
it), in bf16 where the CPU multiplies it and in fp32 elsewhere. The files, 9 GB in bf16, are written to a temporary
folder (--folder chooses its place). tests/parity/requirements.txt names the peers, which --memory and --gains do not need.
"""
import argparse
import json
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
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "parity")]

import model
import tiny
from cascade import DTYPES, tune_process
from helpers import OFFICIAL, on_meta, relative_error
from pages import PERFORMANCE_PAGE, table, write_section
from text_encoder import load as load_text_encoder

TITLES = {"stage_a": "Stage A", "stage_b_lite": "Stage B lite, a step", "stage_c_lite": "Stage C lite, a step with guidance",
          "text_encoder": "Text encoder, 2 prompts"}
FOLDERS = {"stage_c_lite": "prior_lite", "stage_b_lite": "decoder_lite", "stage_a": "vqgan"}
END = tiny.TEXT.end                                     # of the tiny tokenizer, which replaces CLIP's here


# ------------------------------------------------------------------------------ the networks, and their inputs

def network_on_meta(name, quick):
    network_class, config = tiny.NETWORKS[name.removesuffix("_lite")] if quick else OFFICIAL[name]
    return on_meta(network_class, replace(config, end=END) if name == "text_encoder" else config)


def random_state(network, dtype):
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            state[name] = torch.randn(tensor.shape, dtype=dtype) * (0.3 / max(1, tensor[:1].numel()) ** 0.5)
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    return state


def write_files(folder, quick, dtype, with_peers):
    """Random original files, and the same tensors in the diffusers layout beside them."""
    tiny.write_tokenizer(folder / "tokenizer")
    for name in TITLES:
        network = network_on_meta(name, quick)
        state = random_state(network, dtype)
        tiny.save(state, folder / tiny.file_name(name), dtype, {"format": "pt"})
        if name == "text_encoder":
            (folder / name / "config.json").write_text(json.dumps({"eos_token_id": END}))
        if with_peers:
            import peers
            makers = {"text_encoder": peers.transformers_text, "stage_a": peers.diffusers_stage_a}
            with torch.device("meta"):
                peer = makers.get(name, peers.diffusers_unet)(network)
            if name == "text_encoder":
                peer.config.save_pretrained(folder / name)
            else:
                peer.save_config(folder / FOLDERS[name])
                path = folder / FOLDERS[name] / "diffusion_pytorch_model.safetensors"
                tiny.save(tiny.to_diffusers(state), path, dtype, {"format": "pt"})


def inputs_of(name, quick, dtype):
    """For one image: a step with guidance of Stage C, one without of Stage B; a prompt and a negative prompt."""
    Hc, Hb, D, E = (3, 32, 64, 24) if quick else (24, 256, 1280, 768)

    def randn(*shape):
        return torch.randn(shape, dtype=dtype)

    if name == "text_encoder":
        ids, mask = torch.full((2, 77), END), torch.zeros(2, 77, dtype=torch.int64)
        ids[:, :8], mask[:, :9] = 65, 1
        return {"ids": ids, "mask": mask}
    if name == "stage_a":
        return {"z": randn(1, 4, Hb, Hb)}
    if name == "stage_b_lite":  # diffusers does not round a time of 0
        return {"x": randn(1, 4, Hb, Hb), "r": torch.zeros(1), "clip_text_pooled": randn(1, 1, D),
                "effnet": randn(1, 16, Hc, Hc)}
    return {"x": randn(2, 16, Hc, Hc), "r": torch.zeros(2), "clip_text_pooled": randn(2, 1, D),
            "clip_text": randn(2, 77, D), "clip_img": torch.zeros(2, 1, E, dtype=dtype)}


def our_call(name, folder, dtype, inputs, without=""):
    """A function that calls our network, in a process like that of the command, but for one optimisation."""
    if without == "attention by head":
        model.scaled_dot_product = F.scaled_dot_product_attention
    if without != "allocator tuning":
        tune_process()
    network = (load_text_encoder if name == "text_encoder" else model.load)(folder / tiny.file_name(name))
    if name == "text_encoder":
        return lambda: network(**inputs)[1]
    return partial(network.decode if name == "stage_a" else network, **inputs)


def peer_call(name, folder, dtype, inputs):
    """A function that calls diffusers' or transformers' network on the same inputs."""
    if name == "text_encoder":
        from transformers import CLIPTextModelWithProjection
        peer = CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=dtype).eval()
        return lambda: peer(inputs["ids"], attention_mask=inputs["mask"], output_hidden_states=True).text_embeds[:, None]
    if name == "stage_a":
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
        peer = PaellaVQModel.from_pretrained(folder / FOLDERS[name], torch_dtype=dtype).eval()
        return lambda: peer.decode(inputs["z"] * peer.config.scale_factor).sample
    from diffusers import StableCascadeUNet
    peer = StableCascadeUNet.from_pretrained(folder / FOLDERS[name], torch_dtype=dtype).eval()
    condition = {key: value for key, value in inputs.items() if key not in ("x", "r")}
    return lambda: peer(inputs["x"], inputs["r"].to(dtype), **condition, return_dict=False)[0]


# ------------------------------------------------------------------------------ measuring

def alternate(calls, rounds):
    """The results of every call, taken in turn."""
    results = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, results):
            found.append(call())
    return results


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def matrix_rate(dtype, n=2048):
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5))


@torch.inference_mode()
def serve(pipe, make, *arguments):
    """Runs in a process of its own: sends the output of a warm-up call, then the time of a call for every request."""
    call = make(*arguments)
    pipe.send(call().float().numpy())
    while pipe.recv():
        pipe.send(seconds(call))


def compare_calls(makers, arguments, rounds):
    """Median seconds of each, and the relative error between their outputs. Each has a process of its own."""
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for make in makers:
        pipe, end = spawn.Pipe()
        spawn.Process(target=serve, args=(end, make, *arguments), daemon=True).start()
        pipes.append(pipe)
    outputs = [torch.from_numpy(pipe.recv()) for pipe in pipes]
    calls = [lambda pipe=pipe: (pipe.send(True), pipe.recv())[1] for pipe in pipes]
    medians = list(map(median, alternate(calls, rounds)))
    for pipe in pipes:
        pipe.send(False)
    return *medians, relative_error(*outputs)


# Programs, ours and diffusers', for processes of their own.
BEGIN = """
import json, sys, time
folder, dtype, side, steps, decoder_steps = json.loads(sys.argv[1])
begin = time.perf_counter()
"""
FINISH = """
end = time.perf_counter()
import resource
print(json.dumps([end - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
IMPORT = "import cascade", "from diffusers import StableCascadeCombinedPipeline"
OURS = """
import cascade
cascade.tune_process()
pipeline = cascade.Cascade(folder, dtype=dtype, lite=True, keep={keep})
begin = time.perf_counter()
"""
LOAD = OURS.format(keep=True) + 'networks = pipeline.network("stage_c"), pipeline.network("stage_b")', """
import torch
from diffusers import StableCascadeUNet
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
begin = time.perf_counter()
prior, decoder = (StableCascadeUNet.from_pretrained(f"{folder}/{name}", torch_dtype=dtype)
                  for name in ("prior_lite", "decoder_lite"))
"""
COMMAND = """
import cascade
cascade.tune_process()
options = {"weights": folder, "dtype": dtype, "steps": steps, "decoder-steps": decoder_steps, "width": side, "height": side}
options = [f"--{name}={value}" for name, value in options.items()]
assert cascade.main([*PROMPTS, *options, "--lite", "--device=cpu", "-o", f"{folder}/{time.time_ns()}.png"]) == 0
"""
IMAGE = COMMAND.replace("*PROMPTS", '"a red circle"'), LOAD[1] + """
from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
text = CLIPTextModelWithProjection.from_pretrained(f"{folder}/text_encoder", dtype=dtype)
tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer", model_max_length=77)
pipeline = StableCascadeCombinedPipeline(
    tokenizer=tokenizer, text_encoder=text, decoder=decoder, scheduler=DDPMWuerstchenScheduler(),
    vqgan=PaellaVQModel.from_pretrained(f"{folder}/vqgan", torch_dtype=dtype),
    prior_tokenizer=tokenizer, prior_text_encoder=text, prior_prior=prior, prior_scheduler=DDPMWuerstchenScheduler())
pipeline("a red circle", width=side, height=side, prior_num_inference_steps=steps, prior_guidance_scale=4.0,
         num_inference_steps=decoder_steps, decoder_guidance_scale=0.0,
         generator=[torch.Generator("cpu").manual_seed(0)]).images[0].save(f"{folder}/theirs.png")
"""
PROMPT_FILE = """
from pathlib import Path
Path(folder, "prompts.txt").write_text("a red circle\\na star")
""" + COMMAND.replace("*PROMPTS", 'f"--prompt-file={folder}/prompts.txt"')
KEPT = OURS.format(keep=True) + 'pipeline("a red circle", width=side, height=side, steps=steps, decoder_steps=decoder_steps)'


def run_process(code, settings):
    """Seconds of the whole process, seconds since its `begin`, peak bytes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", BEGIN + code + FINISH, json.dumps(settings)], capture_output=True,
                         text=True, env=environment)
    whole = time.perf_counter() - begin
    if run.returncode:
        raise SystemExit(f"bench.py: a process failed\n{code}\n{run.stderr}")
    return whole, *json.loads(run.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ the tables

def compare_with_diffusers(folder, quick, dtype, settings, rounds):
    def row(title, ours, theirs, unit, error=""):
        return title, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{ours / theirs:.2f}", error

    yield "", "ours", "diffusers", "ratio", "relative error"
    for name, title in TITLES.items():
        arguments = name, folder, dtype, inputs_of(name, quick, dtype)
        longer = rounds * 5 if name == "text_encoder" else rounds
        ours, theirs, error = compare_calls((our_call, peer_call), arguments, longer)
        yield row(title, ours, theirs, "s", f"{error:.0e}")
    medians = {}
    for title, codes in ("import", IMPORT), ("load", LOAD), ("image", IMAGE):
        runs = alternate([partial(run_process, code, settings) for code in codes], rounds)
        medians[title] = [tuple(map(median, zip(*found))) for found in runs]
    yield row("Import and start", *(whole for whole, _, _ in medians["import"]), "s")
    yield row("Loading the lite pair", *(loading for _, loading, _ in medians["load"]), "s")
    yield row("Prompt to image, peak", *(peak / 1e9 for _, _, peak in medians["image"]), "GB")
    yield row(f"Prompt to image, {settings[-2]} + {settings[-1]} steps", *(whole for whole, *_ in medians["image"]), "s")


def gains(folder, quick, dtype, settings, rounds):
    yield "without", "network", "seconds with it", "without it", "ratio", "relative error"
    for without in "attention by head", "allocator tuning":
        for name, title in TITLES.items():
            if (without, name) != ("attention by head", "stage_a"):
                arguments = name, folder, dtype, inputs_of(name, quick, dtype)
                ours, other, error = compare_calls((our_call, partial(our_call, without=without)), arguments, rounds)
                yield without, title, f"{ours:.3g}", f"{other:.3g}", f"{ours / other:.2f}", f"{error:.0e}"


def memory(folder, quick, dtype, settings, rounds):
    yield "mode", "networks in memory", "peak, GB"
    for mode, kept, code in (("the command, `Cascade(folder)`", "one at a time", IMAGE[0]),
                             ("`--prompt-file FILE`", "one stage at a time, for all prompts", PROMPT_FILE),
                             ("`Cascade(folder, keep=True)`", "all, each from its first turn on", KEPT)):
        yield mode, kept, f"{run_process(code, settings)[2] / 1e9:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, has_bf16 = parser.add_argument, getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    for option in ("--quick", "--memory", "--gains", "--write"):
        add(option, action="store_true")
    add("--rounds", type=int, default=3, help="of which the median is taken (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16" if has_bf16 else "fp32", help="(default here: %(default)s)")
    add("--folder", type=Path, help="where the random files are written")
    options = parser.parse_args()
    dtype, rounds = DTYPES[options.dtype], 1 if options.quick else options.rounds
    name, measure = ("memory", memory) if options.memory else ("gains", gains) if options.gains else \
        ("benchmark", compare_with_diffusers)
    packages = [package for package in ("torch", "diffusers", "transformers", "accelerate") if find_spec(package)]
    head = (f"{', '.join(f'{package} {version(package)}' for package in packages)}; {torch.get_num_threads()} threads, "
            f"{options.dtype}, {matrix_rate(dtype) / 1e12:.2g} TFLOP/s in a matrix product.\n")
    print(head)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        torch.manual_seed(0)
        write_files(Path(folder), options.quick, dtype, with_peers=measure is compare_with_diffusers)
        steps = (2, 1) if options.quick or options.memory else (20, 10)
        settings = [folder, options.dtype, 128 if options.quick else 1024, *steps]
        rows = []
        for row in measure(Path(folder), options.quick, dtype, settings, rounds):
            print("| " + " | ".join(row) + " |" + "\n| ---" * (not rows), flush=True)
            rows.append(row)
    if options.write:
        write_section(PERFORMANCE_PAGE, name, f"{head}\n{table(rows[0], rows[1:])}")


if __name__ == "__main__":
    main()
