"""A trace holds what Cascade did, is consistent in itself, and finds where another implementation differs."""
import re
import textwrap

import compare
import pytest
import torch
import trace
from golden import torch_block
from helpers import assert_same
from safetensors.torch import load_file, save_file

import sampler
from cascade import Cascade

PROMPT, NEGATIVE = "a red circle", "blue"
SIZE = "--width 130 --height 88".split()                # odd sides, and an image that is cropped
FEW = "--steps 3 --decoder-steps 2 --decoder-guidance 1.5 --seed 7".split()
RUN = [PROMPT, "--negative", NEGATIVE, *FEW]
SAME = dict(steps=3, decoder_steps=2, seed=7)


def record(folder, out, *arguments):
    assert trace.main(["--weights", str(folder), "--out", str(out), *RUN, *arguments]) == 0
    return load_file(out)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("trace") / "trace.safetensors"


@pytest.fixture(scope="module")
def tensors(folder, path):
    return record(folder, path, *SIZE)


# ------------------------------------------------------------------------------ what is in it

def test_the_image_and_the_latents_are_cascades_bit_for_bit(folder, tensors):
    options = dict(decoder_guidance=1.5, width=130, height=88, **SAME)
    for name, output in ("stage_b.latent", "latent"), ("picture", "pt"):
        image = Cascade(folder)(PROMPT, NEGATIVE, output=output, **options)
        assert torch.equal(tensors[name], image)


def test_without_guidance_there_is_one_row_and_still_cascades_image(folder, tmp_path):
    guidance = "--guidance", "1", "--decoder-guidance", "0"
    tensors = record(folder, tmp_path / "one.safetensors", *guidance)
    image = Cascade(folder)(PROMPT, NEGATIVE, guidance=1.0, output="pt", **SAME)
    assert torch.equal(tensors["picture"], image)
    assert len(tensors["stage_c.step-000.out"]) == len(tensors["stage_b.step-000.out"]) == 1


UNET = r"(up|down)_(blocks|repeat_mappers)\.\d+\.\d+|(up|down)_\w+scalers\.\d+|(?!up_|down_)[a-z_]+"
BLOCKS = {
    "text_encoder": r"text_model\.(encoder\.layers\.\d+|embeddings\.token_embedding|final_layer_norm)"
                    r"|text_projection",
    "stage_c": UNET, "stage_b": UNET, "stage_a": r"up_blocks\.\d+|out_block"}


@pytest.mark.parametrize("prefix", [
    "text_encoder.", "stage_c.step-000.", "stage_c.step-002.", "stage_b.step-001.", "stage_a."])
def test_every_block_of_every_network_is_there_at_every_pass(folder, tensors, prefix):
    stage, expected = prefix.split(".")[0], set()
    network = Cascade(folder).network(stage)
    for path, _ in network.named_modules():
        if re.fullmatch(BLOCKS[stage], path):
            group, *rest = path.split(".")
            repeats = getattr(network.config, group.replace("_blocks", "_repeat"), None)
            passes = repeats[int(rest[0])] if repeats else 1
            expected |= {f"{path}.pass-{n}" if n else path for n in range(passes)}
    for side in (".in", ".out"):
        found = {name.removeprefix(prefix).removesuffix(side) for name in tensors
                 if name.startswith(prefix) and name.endswith(side)}
        assert found - {"embed_time", "out"} == expected


def test_a_block_given_its_traced_input_gives_its_traced_output(folder, path):
    block = torch_block({stage: Cascade(folder).network(stage) for stage in trace.STAGES})
    results = compare.teacher_force(compare.Trace(path), block)
    assert len(results) > 100 and max(result.maximum for result in results) <= 1e-6  # it depends on alignment


@pytest.mark.parametrize("stage, guidance, steps", [("stage_c", 4.0, 3), ("stage_b", 1.5, 2)])
def test_stepping_by_hand_gives_the_traced_latents(tensors, stage, guidance, steps):
    x, a = tensors[f"{stage}.step-000.x"], sampler.alpha_bar(tensors[f"{stage}.timesteps"])
    for i in range(steps):
        names = [f"{stage}.step-{i:03}.{name}" for name in ("out", "epsilon", "noise", "x0", "x")]
        out, eps, noise, x0, before = (tensors[name] for name in names)
        assert torch.equal(x, before) and torch.equal(eps, sampler.guide(*out.chunk(2), guidance))
        assert torch.equal(x0, sampler.predict_x0(x, eps, a[i]))
        x = sampler.ddpm(x, eps, noise, a[i], a[i + 1])
    assert torch.equal(x, tensors[f"{stage}.latent"])


def test_the_order_is_that_of_execution(path, tensors):
    names = list(compare.Trace(path).graph)
    assert sorted(names) == sorted(tensors)
    stages = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert stages == ["tokens", *trace.STAGES, "picture"]
    level = "stage_b.step-000.up_blocks.0"
    places = [names.index(f"{level}.{name}") for name in ("0.in", "0.out", "1.in", "0.pass-1.in")]
    assert places == sorted(places)


def test_values_are_fp32_whatever_the_type_of_the_run(folder, tmp_path):
    tensors = record(folder, tmp_path / "bf16.safetensors", "--dtype", "bf16", *SIZE)
    for name, tensor in tensors.items():
        is_ids = name.startswith("tokens.") or name.endswith("token_embedding.in")
        assert tensor.dtype == (torch.int64 if is_ids else torch.float32), name
    rounded = tensors["stage_c.step-000.embedding.out"]
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_ranges_are_those_of_the_trace(folder, tensors, capsys):
    assert trace.main(["--weights", str(folder), *RUN, "--ranges", "--stages", "text_encoder"]) == 0
    hidden = tensors["text_encoder.hidden"]
    least, most, std = hidden.min(), hidden.max(), hidden.std(correction=0)
    row = f"| text_encoder.hidden | {least:.4g} | {most:.4g} | {std:.4g} |"
    assert row in capsys.readouterr().out


def test_an_outlier_is_a_channel_far_above_the_median_channel():
    x = torch.ones(2, 3, 5, 3)
    x[1, 2, 4, 1] = -20
    assert trace.outliers("stage_c.step-000.x", x) == "1 of 3: 2 (20)"
    assert trace.outliers("stage_c.step-000.up_blocks.0.0.out", x) == "1 of 3: 1 (20)"


# ------------------------------------------------------------------------------ choosing

def test_only_the_chosen_stages_steps_and_blocks_are_recorded(folder, tmp_path):
    chosen = "--stages stage_c --steps-recorded 1 --blocks stage_c.up_blocks.1.0*".split()
    tensors = record(folder, tmp_path / "some.safetensors", *chosen)
    assert {name.split(".")[0] for name in tensors} == {"tokens", "text_encoder", "stage_c"}
    names = {name for name in tensors if name.endswith(".in")}
    block = "stage_c.step-001.up_blocks.1.0"
    assert {f"{block}.in", f"{block}.pass-1.in", f"{block}.channelwise.2.in"} <= names
    assert all(name.startswith(block) for name in names)


def test_the_example_in_the_docstring_runs_and_agrees(folder, path, tensors, tmp_path, monkeypatch):
    text = trace.__doc__.split("with our noise and conditions:\n\n")[1].split("\n\n")[0]
    monkeypatch.chdir(tmp_path)
    save_file(tensors, "trace.safetensors")
    exec(textwrap.dedent(text), globals() | {"port": Cascade(folder).network("stage_c")})
    assert_same(load_file("mine.safetensors")["stage_c.latent"], tensors["stage_c.latent"])
    assert compare.main([str(path), "mine.safetensors"]) == 0


# ------------------------------------------------------------------------------ what goes wrong

@pytest.mark.parametrize("arguments, message", [
    ("--out nowhere/new.safetensors", "an existing folder"),
    ("--ranges", "not allowed with argument"),
    ("--steps-recorded 0 3", "--steps-recorded 3: expected -3 to 2")])
def test_a_mistake_ends_in_one_line_without_a_file(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert trace.main([*RUN, "--out", "new.safetensors", *arguments.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trace.py: ") and message in last and not list(tmp_path.iterdir())
