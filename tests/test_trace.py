"""A trace holds what Cascade did, is consistent in itself, and finds where another implementation differs."""
import json
import re
import textwrap

import pytest
import torch
import trace
from helpers import assert_same
from safetensors.torch import load_file, save_file
from tiny import write_folder

import sampler
from cascade import Cascade
from model import Weights

PROMPT, NEGATIVE = "a red circle", "blue"
SIZE = "--width 130 --height 88".split()                # odd sides, and an image that is cropped
RUN = [PROMPT, "--negative", NEGATIVE, *"--steps 3 --decoder-steps 2 --decoder-guidance 1.5 --seed 7".split()]
SAME = dict(steps=3, decoder_steps=2, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=4)


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
    size = dict(width=130, height=88)
    latents = Cascade(folder).prior(PROMPT, NEGATIVE, steps=3, seed=7, **size)
    assert torch.equal(tensors["stage_c.latent"], latents)
    for name, output in ("stage_b.latent", "latent"), ("picture", "pt"):
        ours = Cascade(folder)(
            PROMPT, NEGATIVE, output=output, decoder_guidance=1.5, **SAME, **size)
        assert torch.equal(tensors[name], ours)


def test_without_guidance_there_is_one_row_and_still_cascades_image(folder, tmp_path):
    tensors = record(
        folder, tmp_path / "one.safetensors", "--guidance", "1", "--decoder-guidance", "0")
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


def test_a_block_given_its_traced_input_gives_its_traced_output(folder, tensors):
    visible = torch.ones(77, 77).tril().bool() & tensors["tokens.mask"].bool()[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    networks = {stage: Cascade(folder).network(stage) for stage in trace.STAGES}
    names = [name.removesuffix(".in") for name in tensors if name.endswith(".in")]
    assert len(names) > 100
    for name in names:
        stage, step, path = re.fullmatch(r"(\w+)(\.step-\d+)?\.(.*?)(?:\.pass-\d)?", name).groups()
        x, out, rest = tensors[f"{name}.in"], tensors[f"{name}.out"], ()
        if step and "_blocks." in path:
            given = tensors[f"{stage}{step}.embed_time.out"], tensors[f"{stage}{step}.clip_norm.out"]
            rest = *given, tensors.get(f"{name}.skip")
        elif ".layers." in path:
            rest = [mask]
        ours = networks[stage].get_submodule(path)(x, *rest)
        assert (ours - out).abs().max() <= 1e-6 * out.abs().max(), name  # it depends on alignment


@pytest.mark.parametrize("stage, guidance, steps", [("stage_c", 4.0, 3), ("stage_b", 1.5, 2)])
def test_stepping_by_hand_gives_the_traced_latents(tensors, stage, guidance, steps):
    a = tensors[f"{stage}.alpha_bar"]
    assert torch.equal(a, sampler.alpha_bar(tensors[f"{stage}.timesteps"])) and len(a) == steps + 1
    for i in range(steps):
        x, out, eps, noise, x0 = (
            tensors[f"{stage}.step-{i:03}.{name}"] for name in ("x", "out", "epsilon", "noise", "x0"))
        cond, uncond = out.chunk(2)
        assert torch.equal(eps, uncond + guidance * (cond - uncond))
        assert torch.equal(x0, sampler.predict_x0(x, eps, a[i]))
        after = tensors.get(f"{stage}.step-{i + 1:03}.x", tensors[f"{stage}.latent"])
        assert torch.equal(sampler.ddpm(x, eps, noise, a[i], a[i + 1]), after)
        assert noise.any() == (i < steps - 1)


def test_the_order_is_that_of_execution(path, tensors):
    names = json.loads(Weights(path).metadata["order"])
    assert sorted(names) == sorted(tensors)
    stages = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert stages == ["tokens", *trace.STAGES, "picture"]
    place = {name: i for i, name in enumerate(names)}
    assert all(place[name] < place[name[:-2] + "out"] for name in names if name.endswith(".in"))
    level = "stage_b.step-000.up_blocks.0"
    assert place[f"{level}.0.out"] < place[f"{level}.1.in"] < place[f"{level}.0.pass-1.in"]


def test_values_are_fp32_whatever_the_type_of_the_run(folder, tmp_path):
    tensors = record(folder, tmp_path / "bf16.safetensors", "--dtype", "bf16", *SIZE)
    for name, tensor in tensors.items():
        is_ids = name.startswith("tokens.") or name.endswith("token_embedding.in")
        assert tensor.dtype == (torch.int64 if is_ids else torch.float32), name
    rounded = tensors["stage_c.step-000.embedding.out"]
    assert torch.equal(rounded, rounded.bfloat16().float())


# ------------------------------------------------------------------------------ choosing

def test_a_run_stops_after_the_last_of_its_stages_and_records_the_chosen_steps(folder, tmp_path):
    tensors = record(
        folder, tmp_path / "some.safetensors", "--stages", "stage_c", "--steps-recorded", "1")
    assert {name.split(".")[0] for name in tensors} == {"tokens", "text_encoder", "stage_c"}
    assert {name.split(".")[1] for name in tensors if "blocks." in name} == {"step-001"}


def test_patterns_choose_modules_however_deep(folder, tmp_path):
    tensors = record(folder, tmp_path / "some.safetensors", "--blocks", "stage_c.up_blocks.1.0*")
    names = [name.replace("step-000.", "") for name in tensors if name.endswith(".in")]
    level = "stage_c.up_blocks.1.0"
    assert {f"{level}.in", f"{level}.pass-1.in", f"{level}.channelwise.2.in"} <= set(names)
    assert all(level in name for name in names if "step-002" not in name)


# ------------------------------------------------------------------------------ comparing

@pytest.fixture
def compared(path, tensors, tmp_path, capsys):
    """Compares with other tensors; returns the exit status and the printed lines."""
    def run(others, *arguments):
        others = {name: tensor.clone().contiguous() for name, tensor in others.items()}
        save_file(others, tmp_path / "other.safetensors")
        capsys.readouterr()
        status = trace.main(["--compare", str(path), str(tmp_path / "other.safetensors"), *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_the_first_difference_is_the_first_that_runs_and_the_list_begins_with_the_largest(
        compared, tensors):
    largest = "stage_b.step-000.down_blocks.0.0.out"
    first = "stage_c.step-000.up_blocks.0.1.out"
    tolerated = "stage_c.step-000.embedding.out"
    others = dict(tensors)
    for name, factor in (largest, 1.5), (first, 1.01), (tolerated, 1 + 1e-6):
        others[name] = factor * tensors[name]
    status, lines = compared(others)
    assert status == 1
    assert lines[1].startswith(f"first difference: {first}: maximum relative error 1.0e-02")
    assert [line.split()[-1] for line in lines[3:6]] == [largest, first, tolerated]
    status, lines = compared(others, "--tolerance", "0.6")
    count = len(tensors)
    assert status == 0 and lines[1].startswith("all agree")
    assert lines[0].startswith(f"{count} of {count} tensors compared, 0 missing, 0 ")


@pytest.mark.parametrize("name, change, hint", [
    ("picture", lambda x: torch.where(torch.arange(x.shape[-1]) == 3, torch.nan, x), "error inf"),
    ("tokens.ids", lambda x: x + (torch.arange(77) == 5), ""),
    ("stage_b.step-000.embedding.out", lambda x: x.permute(0, 3, 1, 2), "channels-first?")],
    ids=["nan", "another token", "another layout"])
def test_one_other_value_is_found(compared, tensors, name, change, hint):
    status, lines = compared({**tensors, name: change(tensors[name])})
    assert status == 1 and lines[1].startswith(f"first difference: {name}: ")
    assert hint in "".join(lines[1:3])


def test_a_file_with_one_block_is_compared_there(compared, tensors):
    name, count = "stage_c.step-000.embedding.out", len(tensors)
    block = tensors[name].half()                        # in any type
    status, lines = compared({name: block, "mine": block}, "--tolerance", "1e-3")
    assert lines[0].startswith(f"1 of {count} tensors compared, {count - 1} missing, 1 unknown")
    assert status == 0 and lines[1].endswith("tokens.ids")


def test_the_example_in_the_docstring_runs_and_agrees(folder, path, tensors, tmp_path, monkeypatch):
    text = trace.__doc__.split("with our noise and conditions:\n\n")[1].split("\n\n")[0]
    code = textwrap.dedent(text)
    monkeypatch.chdir(tmp_path)
    save_file(tensors, "trace.safetensors")
    port = Cascade(folder).network("stage_c")
    exec(code, globals() | {"port": port})
    assert_same(load_file("mine.safetensors")["stage_c.latent"], tensors["stage_c.latent"])
    assert trace.main(["--compare", str(path), "mine.safetensors", "--tolerance", "1e-5"]) == 0


# ------------------------------------------------------------------------------ what goes wrong

@pytest.mark.parametrize("arguments, message", [
    ("--weights nowhere", "nowhere: "),
    ("--out nowhere/new.safetensors", "an existing folder"),
    ("--out new.pt", ".safetensors"),
    ("--steps 0", "--steps: expected an integer from 1"),
    ("--steps-recorded 0 3", "--steps-recorded: expected 0 to 2"),
    ("--stages stage_d", "invalid choice"),
    ("--stages stage_c --blocks stage_b.embedding", "--blocks stage_b.embedding: no such module"),
    ("--compare nowhere.safetensors {trace}", "nowhere.safetensors: "),
    ("--compare {weights}/stage_a.safetensors {trace}", "not a trace"),
    ("--compare {trace} {weights}/stage_a.safetensors", "none of the trace's names"),
    ("--compare {trace}", "expected 2 arguments")])
def test_a_mistake_ends_in_one_line_and_leaves_no_file(
        folder, path, tensors, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(weights=folder, trace=path) for argument in arguments.split()]
    command = [*RUN, "--weights", str(folder), "--out", "new.safetensors", *arguments]
    assert trace.main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trace.py: ") and message in last and not list(tmp_path.iterdir())
