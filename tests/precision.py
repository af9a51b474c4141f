"""How far bf16 and fp16 drift from fp32, and what memory each takes: prints README's table.

    python tests/precision.py

Drift is the largest difference from fp32, by the largest value of fp32. It is measured on random networks (tiny.py, of
five seeds), on random UNets whose stream and hidden values pass 65504 by far (`hostile`), and on the small cascade, fed
with what it meets while it draws a picture. Memory is computed: the official networks run on the meta device.
"""

import copy
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import operators
from test_golden import RUNS, golden
from tiny import STAGE_B, STAGE_C, networks, randomise

import model
from cascade import Cascade, to_pillow

BF16, FP16 = torch.bfloat16, torch.float16
TIMES = ("r", "sca", "crp")
PROMPT = "a large red circle on a white background"
# title -> the network in tests/tiny.py, and what is fp32 in it beside fp16 weights
UNET = "stream, GRN, convolutions that are not 1×1"
STAGES = {"Text tower": ("text_encoder/model", ""), "Stage C lite": ("stage_c", UNET), "Stage C": ("stage_c", UNET),
          "Stage B lite": ("stage_b", UNET), "Stage B": ("stage_b", UNET), "Stage A, decoding": ("stage_a", ""),
          "Semantic encoder": ("effnet_encoder", ""), "Image tower": ("image_encoder/model", ""),
          "Previewer": ("previewer", "")}


def cast(value, dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def cast_all(given, dtype):
    """The inputs of a network in its type; times stay fp32."""
    return {name: value if name in TIMES else cast(value, dtype) for name, value in given.items()}


def drift(ours, exact):
    """nan where anything is not finite."""
    return ((ours.float() - exact).abs().max() / exact.abs().max()).item() if ours.isfinite().all() else float("nan")


@contextmanager
def naive():
    """fp16 as it is where nothing is done about it: the stream is not widened."""
    before, model.wide = model.wide, lambda x: x
    try:
        yield
    finally:
        model.wide = before


# ------------------------------------------------------------------------------------------------ random networks


def hostile(config, seed, factor=100):
    """A random UNet whose blocks answer, and whose GRNs are, so many times larger than those of `randomise`."""
    unet = randomise(model.UNet(config), seed)
    for block in unet.modules():
        if isinstance(block, model.ResidualBlock):
            block.channelwise[2].gamma.mul_(factor), block.channelwise[4].weight.mul_(factor)
        elif isinstance(block, model.AttentionBlock):
            block.attention.attn.out_proj.weight.mul_(factor)
    return unet


def inputs(config, seed, rows=2, height=6, width=5):
    source = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=source)

    given = {"x": randn(rows, config.latent, height * config.patch, width * config.patch),
             "r": torch.rand(rows, generator=source), "clip_text_pooled": randn(rows, 1, config.text)}
    if config.semantic:
        return given | {"effnet": randn(rows, 16, 3, 3), "pixels": randn(rows, 3, 9, 7)}
    return given | {"clip_text": randn(rows, 7, config.text), "clip_img": randn(rows, 2, config.image)}


@torch.inference_mode()
def random_drift(name, dtype, seeds=5):
    short, worst = name.removesuffix("/model"), 0.0
    given, _ = golden(short)
    for seed in range(seeds):
        network = networks(seed)[name]
        exact = RUNS[short](network, **given)
        ours = RUNS[short](copy.deepcopy(network).to(dtype), **cast_all(given, dtype))
        worst = max(worst, *(drift(ours[key], exact[key]) for key in exact))
    return worst


@torch.inference_mode()
def hostile_drift(config, dtype, seed, *size):
    unet, given = hostile(config, seed), inputs(config, seed, *size)
    return drift(copy.deepcopy(unet).to(dtype)(**cast_all(given, dtype)), unet(**given))


# ------------------------------------------------------------------------------------------------ the small cascade


@torch.inference_mode()
def met(steps=6, decoder_steps=4):
    """name -> what the small cascade's networks were given, positional and by name, and answered in fp32."""
    small, calls = Cascade(keep=True), {}
    for name in ("text_encoder", "stage_c", "stage_b", "effnet_encoder", "image_encoder"):
        calls[name] = found = []
        small.network(name).prepare = lambda **given: given             # whole conditions: another network gets them
        small.network(name).register_forward_hook(
            lambda network, args, given, out, found=found: found.append((args, given, out)), with_kwargs=True)
    z = small(PROMPT, steps=steps, decoder_steps=decoder_steps, output="latent")
    pixels = small.network("stage_a").decode(z)
    picture = to_pillow(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())
    latent = small.encode(picture)
    small.look([picture])
    calls["stage_a"] = [((z,), {}, pixels)]
    calls["previewer"] = [((latent,), {}, small.network("previewer")(latent))]
    return calls


@torch.inference_mode()
def small_drift(calls, name, dtype):
    network, worst = Cascade(dtype=dtype).network(name), 0.0
    for args, given, exact in calls[name]:
        args = [arg if i and name[:-1] == "stage_" else cast(arg, dtype) for i, arg in enumerate(args)]     # r stays
        ours = (network.decode if name == "stage_a" else network)(*args, **cast_all(given, dtype))
        pairs = zip(ours, exact) if isinstance(exact, tuple) else [(ours, exact)]
        worst = max(worst, *(drift(*pair) for pair in pairs))
    return worst


def pictures():
    """dtype -> how far the small cascade's pictures are from fp32's, of 255."""
    exact = Cascade()(PROMPT, images=2, output="np")
    return {dtype: 255 * abs(Cascade(dtype=dtype)(PROMPT, images=2, output="np") - exact).mean()
            for dtype in (BF16, FP16)}


# ------------------------------------------------------------------------------------------------ the table


def memory(title):
    """Weights and activations in fp32, bf16 and fp16, GB, of one call for a picture of 1024x1024."""
    cells = []
    for dtype in (torch.float32, BF16, FP16):
        network, record, _ = operators.run(title, dtype, model.STRIP)
        weights = sum(operators.size(tensor) for tensor in network.state_dict().values())
        cells.append(f"{weights / 1e9:.2f} + {record.peak / 1e9:.2f}")
    return cells


def table():
    calls, rows = met(), []
    for title, (name, kept) in STAGES.items():
        short, config = name.removesuffix("/model"), {"stage_c": STAGE_C, "stage_b": STAGE_B}.get(name)
        drifts = ["as below"] * 3 if "lite" in title else [
            *(f"{random_drift(name, dtype):.0e}, {small_drift(calls, short, dtype):.0e}" for dtype in (BF16, FP16)),
            f"{max(hostile_drift(config, FP16, seed) for seed in range(5)):.0e}" if config else ""]
        rows.append([title, kept or "nothing", *(cell.replace("e-0", "e-") for cell in drifts), *memory(title)])
    return operators.table(["network", "fp32 beside fp16 weights", "drift, bf16", "drift, fp16", "fp16, overflowing",
                            "GB, fp32", "GB, bf16", "GB, fp16"], rows)


if __name__ == "__main__":
    print(table())
    print({str(dtype): f"{far:.2f} of 255" for dtype, far in pictures().items()})
