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
    x, a = tensors[f"{stage}.step-000.x"], sampler.alpha_bar(tensors[f"{stage}.timesteps"])
    for i in range(steps):
        names = [f"{stage}.step-{i:03}.{name}" for name in ("out", "epsilon", "noise", "x0", "x")]
        out, eps, noise, x0, before = (tensors[name] for name in names)
        assert torch.equal(x, before) and torch.equal(eps, sampler.guide(*out.chunk(2), guidance))
        assert torch.equal(x0, sampler.predict_x0(x, eps, a[i]))
        x = sampler.ddpm(x, eps, noise, a[i], a[i + 1])
    assert torch.equal(x, tensors[f"{stage}.latent"])


def test_the_order_is_that_of_execution(path, tensors):
    names = json.loads(Weights(path).metadata["order"])
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


# ------------------------------------------------------------------------------ choosing

def test_only_the_chosen_stages_steps_and_blocks_are_recorded(folder, tmp_path):
    chosen = "--stages stage_c --steps-recorded 1 --blocks stage_c.up_blocks.1.0*".split()
    tensors = record(folder, tmp_path / "some.safetensors", *chosen)
    assert {name.split(".")[0] for name in tensors} == {"tokens", "text_encoder", "stage_c"}
    names = {name for name in tensors if name.endswith(".in")}
    block = "stage_c.step-001.up_blocks.1.0"
    assert {f"{block}.in", f"{block}.pass-1.in", f"{block}.channelwise.2.in"} <= names
    assert all(name.startswith(block) for name in names)


# ------------------------------------------------------------------------------ comparing

@pytest.fixture
def compared(path, tensors, tmp_path, capsys):
    """Compares with other tensors; returns the exit status and what is printed."""
    def run(others, *arguments):
        others = {name: tensor.clone().contiguous() for name, tensor in others.items()}
        save_file(others, tmp_path / "other.safetensors")
        capsys.readouterr()
        status = trace.main(["--compare", str(path), str(tmp_path / "other.safetensors"), *arguments])
        return status, capsys.readouterr().out

    return run


def test_the_first_difference_is_the_first_that_runs(compared, tensors):
    tolerated, first = "stage_c.step-000.embedding.out", "stage_c.step-000.up_blocks.0.1.out"
    larger, others = "stage_b.step-000.down_blocks.0.0.out", dict(tensors)
    for name, factor in (tolerated, 1 + 1e-6), (first, 1.01), (larger, 1.5):
        others[name] = factor * tensors[name]
    status, text = compared(others)
    assert status == 1 and f"first difference: {first}: maximum relative error 1.0e-02" in text
    status, text = compared({first: others[first].half(), "mine": others[larger]}, "--tolerance=0.1")
    assert status == 0 and f"1 of {len(tensors)} tensors compared, 1 unknown" in text


@pytest.mark.parametrize("name, change, hint", [("picture", lambda x: x * torch.nan, "error inf"),
    ("tokens.ids", lambda x: x + (torch.arange(77) == 5), ""),
    ("stage_b.step-000.embedding.out", lambda x: x.permute(0, 3, 1, 2), "channels-first?")])
def test_one_other_value_is_found(compared, tensors, name, change, hint):
    status, text = compared({**tensors, name: change(tensors[name])})
    assert status == 1 and f"first difference: {name}: " in text and hint in text


def test_the_example_in_the_docstring_runs_and_agrees(folder, path, tensors, tmp_path, monkeypatch):
    text = trace.__doc__.split("with our noise and conditions:\n\n")[1].split("\n\n")[0]
    monkeypatch.chdir(tmp_path)
    save_file(tensors, "trace.safetensors")
    exec(textwrap.dedent(text), globals() | {"port": Cascade(folder).network("stage_c")})
    assert_same(load_file("mine.safetensors")["stage_c.latent"], tensors["stage_c.latent"])
    assert trace.main(["--compare", str(path), "mine.safetensors", "--tolerance", "1e-5"]) == 0


# ------------------------------------------------------------------------------ what goes wrong

@pytest.mark.parametrize("arguments, message", [
    ("--out nowhere/new.safetensors", "an existing folder"),
    ("--steps-recorded 0 3", "--steps-recorded 3: expected -3 to 2"),
    ("--compare {weights}/stage_a.safetensors {trace}", "not a trace"),
    ("--compare {trace} {weights}/stage_a.safetensors", "none of the trace's names")])
def test_a_mistake_ends_in_one_line_and_leaves_no_file(
        folder, path, tensors, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(weights=folder, trace=path) for argument in arguments.split()]
    assert trace.main([*RUN, "--out", "new.safetensors", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trace.py: ") and message in last and not list(tmp_path.iterdir())
