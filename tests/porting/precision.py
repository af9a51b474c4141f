"""How far bf16 and fp16 drift from fp32, the memory of each, and linear layers in 8 bits: writes tables in PERFORMANCE.md.

    python tests/porting/precision.py           formats and memory
    python tests/porting/precision.py 100       weights in 8 bits, scored by the evaluator on 100 images each

Drift is the largest difference from fp32, relative to the largest value in fp32. It is measured on random networks
(tests/tiny.py, five seeds), on random UNets whose activations go far beyond 65504 (`overflowing`), and on the tiny
cascade while it draws an image. Memory is computed: the official networks run on the meta device. For 8 bits the
weights are rounded and multiplied by their scale again; the computation stays in fp32.
"""
import copy
import sys
from pathlib import Path
from unittest import mock

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "weights")]

import evaluate
import operators
from helpers import RUNS, golden, relative_error, unet_inputs
from pages import PERFORMANCE_PAGE, table, write_section
from tiny import STAGE_B, STAGE_C, networks, randomise

import model
from cascade import Cascade, to_pillow

BF16, FP16 = torch.bfloat16, torch.float16
TIMES = ("r", "sca", "crp")
PROMPT = "a large red circle on a white background"


def cast(value, dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def cast_inputs(inputs, dtype):
    """A network's inputs in its type; times stay fp32."""
    return {name: value if name in TIMES else cast(value, dtype) for name, value in inputs.items()}


def without_upcast():
    """Plain fp16 in its context: feature maps are not upcast to fp32."""
    return mock.patch.object(model, "upcast_fp16", lambda x: x)


# ------------------------------------------------------------------------------ random networks

@torch.inference_mode()
def random_drift(name, dtype, seeds=5):
    (inputs, _, _), errors = golden(name), []
    for seed in range(seeds):
        network = networks(seed)[name]
        exact = RUNS[name](network, **inputs)
        ours = RUNS[name](copy.deepcopy(network).to(dtype), **cast_inputs(inputs, dtype))
        errors += [relative_error(ours[key], exact[key]) for key in exact]
    return max(errors)


def overflowing(config, seed, factor=100):
    """A random UNet whose blocks' outputs and GRNs are `factor` times larger than those of `randomise`."""
    unet = randomise(model.UNet(config), seed)
    for block in unet.modules():
        if isinstance(block, model.ResidualBlock):
            block.channelwise[2].gamma.mul_(factor)
            block.channelwise[4].weight.mul_(factor)
        elif isinstance(block, model.AttentionBlock):
            block.attention.attn.out_proj.weight.mul_(factor)
    return unet


@torch.inference_mode()
def overflowing_drift(config, dtype, seed, factor=100, **sizes):
    """inf if anything is not finite."""
    unet, inputs = overflowing(config, seed, factor), unet_inputs(config, seed, **sizes)
    exact = unet(**inputs)
    return relative_error(unet.to(dtype)(**cast_inputs(inputs, dtype)), exact)


# ------------------------------------------------------------------------------ the tiny cascade

@torch.inference_mode()
def calls_of_the_tiny_cascade():
    """name -> [(positional inputs, inputs by name, fp32 output)] of its networks while they draw an image."""
    cascade, calls = Cascade(device="cpu", keep=True), {}
    for name in ("text_encoder", "stage_c", "stage_b", "effnet_encoder", "image_encoder", "previewer"):
        calls[name] = []
        cascade.network(name).register_forward_hook(
            lambda network, *call, name=name: calls[name].append(call), with_kwargs=True)
    z = cascade(PROMPT, steps=6, decoder_steps=4, output="latent")
    pixels = cascade.network("stage_a").decode(z)
    calls["stage_a"] = [((z,), {}, pixels)]
    image = to_pillow(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())
    cascade.network("previewer")(cascade.encode_semantic(image))
    cascade.encode_image([image])
    return calls


@torch.inference_mode()
def tiny_cascade_drift(calls, name, dtype):
    network, errors = Cascade(device="cpu", dtype=dtype).network(name), []
    run = network.decode if name == "stage_a" else network
    for (x, *args), inputs, exact in calls[name]:  # args: the time, which stays fp32, or the mask
        ours = run(cast(x, dtype), *args, **cast_inputs(inputs, dtype))
        ours, exact = ([y] if torch.is_tensor(y) else y for y in (ours, exact))
        errors += map(relative_error, ours, exact)
    return max(errors)


def image_drift(dtype):
    """How far the tiny cascade's images are from fp32's, of 255."""
    ours, exact = (
        Cascade(device="cpu", dtype=kind)(PROMPT, images=2, output="np") for kind in (dtype, "fp32"))
    return 255 * abs(ours - exact).mean()


# ------------------------------------------------------------------------------ weights in 8 bits

def fp8(values):
    return values.to(torch.float8_e4m3fn).float()


EIGHT_BITS = {"int8": (torch.round, 127), "fp8 e4m3": (fp8, 448)}      # rounding, largest value


@torch.no_grad()
def round_linears(network, rounding, largest):
    """Rounds the weights of all linear layers, with one scale for each output channel."""
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
        elif isinstance(module, model.Attention):
            weight = module.in_proj_weight
        else:
            continue
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
        weight.copy_(rounding(weight / scale) * scale)


def eight_bit_table(count):
    prompts, images, rows = evaluate.mixed_prompts(count), {}, []
    scenes = [scene for _, scene in prompts]
    for title in ("fp32", *EIGHT_BITS):
        cascade = Cascade(device="cpu", dtype="fp32", keep=True)
        if title in EIGHT_BITS:
            for name in ("text_encoder", "stage_c", "stage_b", "stage_a"):
                round_linears(cascade.network(name), *EIGHT_BITS[title])
        images[title] = evaluate.draw(cascade, prompts)
        scores = evaluate.accuracy(scenes, evaluate.detect(images[title]))
        right = scores[evaluate.PARTS.index("right")]
        difference = 255 * abs(images[title] - images["fp32"]).mean()
        rows.append([title, f"{right:.1f}", f"{difference:.1f}"])
    head = "linear layers", f"percent right, of {count} images", "mean difference from fp32, of 255"
    return table(head, rows)


# ------------------------------------------------------------------------------ the tables

def memory(title, dtype):
    """Weights + activations of one call for an image of 1024x1024, in GB."""
    network, record, _ = operators.run(title, dtype)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    return f"{weights / 1e9:.2f} + {record.peak / 1e9:.2f}"


def rounded(value):
    return f"{value:.0e}".replace("e-0", "e-")


def precision_table():
    calls, rows = calls_of_the_tiny_cascade(), []
    for title, (name, *_) in operators.NETWORKS.items():
        drifts = ["as below"] * 3
        if "lite" not in title:
            drifts = []
            for dtype in BF16, FP16:
                pair = random_drift(name, dtype), tiny_cascade_drift(calls, name, dtype)
                drifts.append(", ".join(map(rounded, pair)))
            config = {"stage_c": STAGE_C, "stage_b": STAGE_B}.get(name)
            large = [overflowing_drift(config, FP16, seed) for seed in range(5)] if config else []
            drifts.append(rounded(max(large)) if large else "")
        memories = [memory(title, dtype) for dtype in (torch.float32, BF16, FP16)]
        rows.append([title, *drifts, *memories])
    head = ["network", "drift, bf16", "drift, fp16", "fp16, overflowing",
            "GB, fp32", "GB, bf16", "GB, fp16"]
    images = ", ".join(f"{image_drift(dtype):.1f} in {dtype}" for dtype in ("bf16", "fp16"))
    return f"{table(head, rows)}\nImages of the tiny cascade, mean difference from fp32, of 255: {images}.\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        write_section(PERFORMANCE_PAGE, "eight-bit", eight_bit_table(int(sys.argv[1])))
    else:
        write_section(PERFORMANCE_PAGE, "precision", precision_table())
