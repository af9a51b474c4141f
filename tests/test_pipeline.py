"""From a prompt to a picture, on tiny random weights: sizes, seeds, types, layouts, memory, the command."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import STAGE_C, save, write_diffusers_folder, write_folder

import cascade
import model
import sampler
import text_encoder
from cascade import Cascade

ROOT = Path(__file__).resolve().parent.parent
FEW = {"steps": 3, "decoder_steps": 2}


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, ROOT / "cascade.py", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


# ------------------------------------------------------------------------------------------------ the same picture


def test_a_batch_is_what_single_runs_are(pipeline):
    prompts, negative = ["a red circle", "two stars"], ["blue", ""]
    batch = pipeline(prompts, negative, images=2, seed=5, decoder_guidance=1.5, output="np", **FEW)
    for i in range(4):
        one = pipeline(prompts[i // 2], negative[i // 2], seed=5 + i, decoder_guidance=1.5, output="np", **FEW)
        assert np.abs(one[0] - batch[i]).max() <= 1e-5


def test_networks_kept_or_released_give_the_same_picture(folder, pipeline):
    kept, released = (one("a red circle", output="pt", **FEW) for one in (pipeline, Cascade(folder)))
    assert torch.equal(kept, released)


def test_the_two_halves_are_the_whole(pipeline):
    whole = pipeline("a red circle", "blue", images=2, seed=3, width=100, height=150, output="pt", **FEW)
    latents = pipeline.prior("a red circle", "blue", images=2, seed=3, width=100, height=150, steps=3)
    assert latents.shape == (2, 16, 4, 3) and latents.dtype == torch.float32
    halves = pipeline.decode(latents, "a red circle", "blue", 100, 150, steps=2, seed=3, prior_steps=3, output="pt")
    assert torch.equal(whole, halves)


def test_prompt_negative_seed_and_guidance_all_matter(pipeline):
    base = dict(prompts="a red circle", negative="", seed=0, guidance=4.0, decoder_guidance=2.0)
    pictures = [
        pipeline(**base | change, output="pt", **FEW)
        for change in (
            {},
            {"prompts": "a star"},
            {"negative": "blue"},
            {"seed": 1},
            {"guidance": 2.0},
            {"decoder_guidance": 0.0},
        )
    ]
    assert all((pictures[0] - other).abs().max() > 1e-3 for other in pictures[1:])


def test_without_guidance_the_negative_prompt_says_nothing(pipeline):
    plain, negative = (pipeline("a red circle", text, guidance=1.0, output="pt", **FEW) for text in ("", "blue"))
    assert torch.equal(plain, negative)


# ------------------------------------------------------------------------------------------------ sizes and outputs


@pytest.mark.parametrize(
    "width, height", [(64, 64), (65, 129), (100, 77), (131, 128), (171, 256), (200, 64), (67, 311)]
)
def test_a_picture_has_exactly_the_size_asked_for(pipeline, width, height):
    (picture,) = pipeline("a red circle", width=width, height=height, steps=1, decoder_steps=1)
    assert picture.size == (width, height)


def test_the_default_size_is_the_one_that_the_file_was_trained_for(folder, tmp_path):
    assert Cascade(folder).size(None, None) == (128, 128)
    assert Cascade(folder).size(200, None) == (200, 128)
    save(load_file(folder / "stage_c.safetensors"), tmp_path / "stage_c.safetensors")
    assert Cascade(tmp_path).size(None, None) == (1024, 1024)


def test_outputs(pipeline):
    run = {
        output: pipeline(["a red circle", "a star"], output=output, width=100, height=90, **FEW)
        for output in ("pil", "np", "pt", "latent")
    }
    assert [picture.size for picture in run["pil"]] == [(100, 90)] * 2
    assert run["np"].shape == (2, 90, 100, 3) and run["np"].dtype == np.float32
    assert run["np"].min() >= 0 and run["np"].max() <= 1
    assert np.array_equal(run["np"], run["pt"].permute(0, 2, 3, 1).numpy()) and run["pt"].dtype == torch.float32
    assert np.array_equal(np.asarray(run["pil"][1]), (run["np"][1] * 255).round().astype(np.uint8))
    assert run["latent"].shape == (2, 4, 24, 26)
    decoded = pipeline.network("stage_a").decode(run["latent"])[:, :, :90, :100].clamp(0, 1)
    assert torch.allclose(decoded, run["pt"], atol=1e-6)


# ------------------------------------------------------------------------------------------------ memory


def alive(monkeypatch):
    """Lists the networks that live whenever one is loaded."""
    loaded, log, real = [], [], model.Weights.fill

    def fill(*given):
        gc.collect()
        network = real(*given)
        loaded.append(weakref.ref(network))
        log.append(sum(one() is not None for one in loaded))
        return network

    monkeypatch.setattr(model.Weights, "fill", fill)  # every network comes through it
    return log


def test_one_network_is_in_memory_at_a_time(folder, monkeypatch):
    log = alive(monkeypatch)
    Cascade(folder)("a red circle", **FEW)
    assert log == [1, 1, 1, 1]


def test_all_networks_stay_if_asked_to(folder, monkeypatch):
    log = alive(monkeypatch)
    pipeline = Cascade(folder, keep=True)
    pipeline("a red circle", **FEW), pipeline("a star", **FEW)
    assert log == [1, 2, 3, 4]


def test_the_text_is_read_once_for_both_stages(folder, monkeypatch):
    calls, real = [], text_encoder.Tokenizer.__call__
    monkeypatch.setattr(text_encoder.Tokenizer, "__call__", lambda self, rows: calls.append(rows) or real(self, rows))
    Cascade(folder)(["a red circle", "a star"], decoder_guidance=2.0, images=2, **FEW)
    assert calls == [["a red circle", "a star", ""]]


MEMORY = """
import sys, torch
from model import load
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
load(sys.argv[2]), torch.ones(8, 8) @ torch.ones(8, 8)                  # what Python and PyTorch need once
before = anonymous()
network = load(sys.argv[1], dtype=eval(sys.argv[3]))
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_keeps_one_copy_of_the_weights_at_most(folder, tmp_path):
    with torch.device("meta"):
        shapes = model.UNet(
            replace(STAGE_C, widths=(768, 768), down=("RTA", "RTARTA"), up=("RTARTA", "RTA"))
        ).state_dict()
    file = tmp_path / "stage_c.safetensors"
    save_file({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, file)
    size = file.stat().st_size / 2**20
    assert size > 150
    grown = {
        dtype: float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, file, folder / "stage_a.safetensors", dtype],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            ).stdout
        )
        for dtype in ("None", "torch.bfloat16")
    }
    assert grown["None"] < 0.1 * size  # mapped: the file is the memory
    assert 0.4 * size < grown["torch.bfloat16"] < 0.65 * size  # the converted weights, and one tensor at most


# ------------------------------------------------------------------------------------------------ types and devices


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", ["fp32", "bf16", "fp16"])
def test_any_stored_type_runs_in_any_type(tmp_path, stored, run):
    folder = write_folder(tmp_path, seed=1, dtype=stored)
    loaded = model.load(folder / "stage_b.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {stored}
    picture = Cascade(folder, dtype=run)("a red circle", steps=1, decoder_steps=1, width=64, height=64, output="pt")
    exact = Cascade(folder)("a red circle", steps=1, decoder_steps=1, width=64, height=64, output="pt")
    assert picture.dtype == torch.float32 and (picture - exact).abs().mean() < 0.05


def test_stage_b_and_a_may_have_a_type_of_their_own(folder, monkeypatch):
    seen, real = {}, model.Weights.fill
    monkeypatch.setattr(
        model.Weights,
        "fill",
        lambda self, network, device, dtype: (
            seen.update({Path(self.path).stem: dtype}) or real(self, network, device, dtype)
        ),
    )
    size = dict(steps=1, decoder_steps=1, width=64, height=64, output="pt")
    picture = Cascade(folder, dtype=torch.bfloat16, decoder_dtype="fp16")("a red circle", **size)
    assert seen == {
        "stage_c": torch.bfloat16,
        "stage_b": torch.float16,
        "stage_a": torch.float16,
        "model": torch.bfloat16,
    }
    assert (picture - Cascade(folder)("a red circle", **size)).abs().mean() < 0.05


def test_latents_and_times_are_fp32_whatever_the_weights_are(folder):
    unet = model.load(folder / "stage_c.safetensors", dtype=torch.bfloat16)
    times, real = [], unet.embed_time
    unet.embed_time = lambda r, *rest: times.append(r) or real(r, *rest)
    condition = {"clip_text_pooled": torch.randn(2, 1, 64), "clip_text": torch.randn(2, 77, 64)}
    with torch.inference_mode():
        latents = list(sampler.sample(unet, (16, 3, 3), condition, 3, 4.0, sampler.generators(0, 1)))
    assert len(latents) == 3 and {x.dtype for pair in latents for x in pair} == {torch.float32}
    assert [t[0].item() for t in times] == sampler.timesteps(3)[:-1].tolist() and times[0].dtype == torch.float32


def test_networks_come_back_ready_to_run(folder):
    for name in ("stage_c", "stage_b", "stage_a", "effnet_encoder", "previewer"):
        network = model.load(folder / f"{name}.safetensors")
        assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


# ------------------------------------------------------------------------------------------------ folders


def test_original_diffusers_and_mixed_folders_give_the_same_picture(folder, tmp_path):
    diffusers = write_diffusers_folder(tmp_path / "diffusers", folder)
    mixed = tmp_path / "mixed"
    shutil.copytree(diffusers, mixed)
    shutil.rmtree(mixed / "prior")
    shutil.copy(folder / "stage_c.safetensors", mixed)
    pictures = [
        Cascade(one)("a red circle", width=128, height=128, output="pt", **FEW) for one in (folder, diffusers, mixed)
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-5) and torch.allclose(pictures[0], pictures[2], atol=1e-5)


def test_full_is_the_default_and_lite_is_asked_for(tmp_path):
    names = ("stage_c", "stage_c_lite", "decoder/diffusion_pytorch_model", "decoder_lite/diffusion_pytorch_model")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    for lite, c, b in ((False, 0, 2), (True, 1, 3), ("prior", 1, 2), ("decoder", 0, 3)):
        chosen = Cascade(tmp_path, lite=lite)
        assert chosen.file("stage_c") == tmp_path / f"{names[c]}.safetensors"
        assert chosen.file("stage_b") == tmp_path / f"{names[b]}.safetensors"


def test_a_bf16_file_is_taken_where_it_is_the_one_there(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    for name in ("stage_c_bf16", "stage_a", "stage_a_bf16", "text_encoder/model.bf16"):
        (tmp_path / f"{name}.safetensors").touch()
    chosen = Cascade(tmp_path)
    assert chosen.file("stage_c").name == "stage_c_bf16.safetensors"
    assert chosen.file("stage_a").name == "stage_a.safetensors"
    assert chosen.file("text_encoder").name == "model.bf16.safetensors"


# ------------------------------------------------------------------------------------------------ the command


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    few = ("--steps", 2, "--decoder-steps", 1, "--weights", folder)
    for name in ("a.png", "b.png", "a.safetensors", "b.safetensors"):
        assert command("a red circle", "-o", tmp_path / name, *few).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    run = command("--latents", tmp_path / "a.safetensors", "-o", tmp_path / "c.png", *few[2:])
    assert run.returncode == 0 and "Stage C" not in run.stderr and "Stage B" in run.stderr
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_several_pictures_are_numbered_and_say_what_they_were_made_with(folder, tmp_path):
    assert (
        cascade.main(
            [
                "a red circle",
                "a st\u00e4r",
                "--images",
                "2",
                "--seed",
                "9",
                "--steps",
                "1",
                "--decoder-steps",
                "1",
                "--negative",
                "blue",
                "--weights",
                str(folder),
                "--width",
                "70",
                "--height",
                "80",
                "-o",
                str(tmp_path / "x.png"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    for i in range(4):
        with Image.open(tmp_path / f"x-{i}.png") as picture:
            said = picture.info
            assert picture.size == (70, 80)
        assert said["prompt"] == ("a red circle", "a st\u00e4r")[i // 2] and said["seed"] == str(9 + i)
        assert (said["negative"], said["width"], said["height"], said["guidance"]) == ("blue", "70", "80", "4.0")
        assert (said["steps"], said["decoder_steps"], said["decoder_guidance"]) == ("1", "1", "0.0")
        for name in ("stage_c", "stage_b", "stage_a"):
            assert f"{name}.safetensors, cpu, torch.float32" in said[name]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        cascade.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "python cascade.py" in shown and "Stage C" in shown and "--guidance" in shown


def test_a_prompt_that_is_too_long_says_what_was_cut_and_is_drawn(folder, tmp_path, capsys):
    prompt = "red " * 75 + "circle star"
    assert (
        cascade.main(
            [
                prompt,
                "--weights",
                str(folder),
                "--steps",
                "1",
                "--decoder-steps",
                "1",
                "--device",
                "cpu",
                "-o",
                str(tmp_path / "x.png"),
            ]
        )
        == 0
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "77 tokens" in line]
    assert len(said) == 1 and "'circle star'" in said[0] and (tmp_path / "x.png").exists()
