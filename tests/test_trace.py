"""A trace holds what Cascade did, is consistent in itself, and finds where another implementation differs."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trace
from helpers import assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_folder

import sampler
from cascade import Cascade

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
def path(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    record(folder, out, *SIZE)
    return out


@pytest.fixture(scope="module")
def tensors(path):
    return load_file(path)


def order(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["order"])


# ------------------------------------------------------------------------------ what is in it

def test_the_image_and_the_latents_are_cascades_bit_for_bit(folder, tensors):
    size = dict(width=130, height=88)
    image, z = (Cascade(folder)(PROMPT, NEGATIVE, output=output, decoder_guidance=1.5, **SAME, **size)
                for output in ("pt", "latent"))
    assert torch.equal(tensors["picture"], image) and torch.equal(tensors["stage_b.latent"], z)
    assert torch.equal(tensors["stage_c.latent"], Cascade(folder).prior(PROMPT, NEGATIVE, steps=3, seed=7, **size))


def test_without_guidance_there_is_one_row_and_still_cascades_image(folder, tmp_path):
    tensors = record(folder, tmp_path / "one.safetensors", "--guidance", "1", "--decoder-guidance", "0")
    assert torch.equal(tensors["picture"], Cascade(folder)(PROMPT, NEGATIVE, guidance=1.0, output="pt", **SAME))
    assert len(tensors["stage_c.step-000.out"]) == len(tensors["stage_b.step-000.out"]) == 1


def blocks_of(network, stage):
    """What a network consists of, read from its modules: {path: how often it is called}."""
    if stage == "text_encoder":
        layers = [f"encoder.layers.{i}" for i in range(network.config.layers)]
        others = ["embeddings.token_embedding", "final_layer_norm"]
        return {f"text_model.{path}": 1 for path in layers + others} | {"text_projection": 1}
    if stage == "stage_a":
        return {f"up_blocks.{i}": 1 for i in range(len(network.up_blocks))} | {"out_block": 1}
    repeats = {"down_blocks": network.config.down_repeat, "up_blocks": network.config.up_repeat}
    depths = {"blocks": 2, "repeat_mappers": 2, "scalers": 1}
    found = {}
    for name, module in network.named_modules():
        first, *rest = name.split(".")
        depth = next((depth for ending, depth in depths.items() if first.endswith(ending)), 0)
        if first and len(rest) == depth:
            found[name] = repeats[first][int(rest[0])] if first in repeats else 1
    return found


@pytest.mark.parametrize("stage, last", [("text_encoder", ""), ("stage_c", 2), ("stage_b", 1), ("stage_a", "")])
def test_every_block_of_every_network_is_there_at_every_pass(folder, tensors, stage, last):
    blocks = blocks_of(Cascade(folder).network(stage), stage)
    expected = {f"{path}.pass-{n}" if n else path for path, passes in blocks.items() for n in range(passes)}
    for prefix in [f"{stage}.step-{i:03}." for i in (0, last)] if last else [f"{stage}."]:
        for side in (".in", ".out"):
            found = {name.removeprefix(prefix).removesuffix(side) for name in tensors
                     if name.startswith(prefix) and name.endswith(side)}
            assert found - {"embed_time", "out"} == expected


def test_a_block_given_its_traced_input_gives_its_traced_output(folder, tensors):
    visible = torch.ones(77, 77).tril().bool() & tensors["tokens.mask"].bool()[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    modules = {stage: dict(Cascade(folder).network(stage).named_modules()) for stage in trace.STAGES}
    names = [name.removesuffix(".in") for name in tensors if name.endswith(".in")]
    assert len(names) > 100
    for name in names:
        stage, _, path = name.partition(".")
        step, rest = f"{stage}.{path.split('.')[0]}", ()
        if ".step-" in name:
            path = path.partition(".")[2]
            if "_blocks." in path:
                rest = [tensors[f"{step}.embed_time.out"], tensors[f"{step}.clip_norm.out"],
                        tensors.get(f"{name}.skip")]
        elif ".layers." in path:
            rest = [mask]
        ours, out = modules[stage][path.split(".pass-")[0]](tensors[f"{name}.in"], *rest), tensors[f"{name}.out"]
        assert (ours - out).abs().max() <= 1e-6 * out.abs().max(), name  # rounding may depend on memory alignment


@pytest.mark.parametrize("stage, guidance, steps", [("stage_c", 4.0, 3), ("stage_b", 1.5, 2)])
def test_stepping_by_hand_gives_the_traced_latents(tensors, stage, guidance, steps):
    a = tensors[f"{stage}.alpha_bar"]
    assert torch.equal(a, sampler.alpha_bar(tensors[f"{stage}.timesteps"])) and len(a) == steps + 1
    for i in range(steps):
        x, out, eps, noise, x0 = (tensors[f"{stage}.step-{i:03}.{name}"] for name in "x out epsilon noise x0".split())
        cond, uncond = out.chunk(2)
        assert torch.equal(eps, uncond + guidance * (cond - uncond))
        assert torch.equal(x0, sampler.predict_x0(x, eps, a[i]))
        after = tensors.get(f"{stage}.step-{i + 1:03}.x", tensors[f"{stage}.latent"])
        assert torch.equal(sampler.ddpm(x, eps, noise, a[i], a[i + 1]), after)
        assert noise.any() == (i < steps - 1)


def test_the_order_is_that_of_execution(path, tensors):
    names = order(path)
    assert sorted(names) == sorted(tensors)
    assert list(dict.fromkeys(name.split(".")[0] for name in names)) == ["tokens", *trace.STAGES, "picture"]
    place = {name: i for i, name in enumerate(names)}
    assert all(place[name] < place[name[:-2] + "out"] for name in names if name.endswith(".in"))
    level = "stage_b.step-000.up_blocks.0"
    assert place[f"{level}.0.out"] < place[f"{level}.1.in"] < place[f"{level}.1.out"] < place[f"{level}.0.pass-1.in"]


def test_values_are_fp32_whatever_the_type_of_the_run(folder, tmp_path):
    tensors = record(folder, tmp_path / "bf16.safetensors", "--dtype", "bf16", *SIZE)
    for name, tensor in tensors.items():
        is_ids = name.startswith("tokens.") or name.endswith("token_embedding.in")
        assert tensor.dtype == (torch.int64 if is_ids else torch.float32), name
    rounded, exact = tensors["stage_c.step-000.embedding.out"], tensors["stage_c.latent"]
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, exact.bfloat16().float())


# ------------------------------------------------------------------------------ choosing

def test_list_prints_names_and_shapes_and_writes_nothing(folder, path, tensors, tmp_path, capsys):
    out = tmp_path / "none.safetensors"
    assert trace.main([*RUN, *SIZE, "--weights", str(folder), "--out", str(out), "--list"]) == 0
    *lines, size = capsys.readouterr().out.splitlines()
    assert lines == [" ".join(map(str, (name, *tensors[name].shape))) for name in order(path)]
    assert size == f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.1f} MB"
    assert not out.exists()


def test_patterns_choose_modules_however_deep(folder, tmp_path):
    tensors = record(folder, tmp_path / "some.safetensors", "--stages", "stage_c", "--blocks", "stage_c.up_blocks.1.0*")
    paths = {name.split(".", 2)[2].rpartition(".")[0] for name in tensors if name.startswith("stage_c.step-000.up")}
    assert {"up_blocks.1.0", "up_blocks.1.0.pass-1", "up_blocks.1.0.channelwise.2"} <= paths
    assert all(path.startswith("up_blocks.1.0") for path in paths)
    assert "stage_c.step-000.embedding.in" not in tensors


def test_a_run_stops_after_the_last_of_its_stages(folder, tmp_path):
    tensors = record(folder, tmp_path / "some.safetensors", "--stages", "stage_c", "--steps-recorded", "1")
    assert not any(name.startswith(("stage_b", "stage_a", "picture", "text_encoder.text_model")) for name in tensors)
    assert {name.split(".")[1] for name in tensors if ".down_blocks." in name} == {"step-001"}
    assert "text_encoder.hidden" in tensors and "stage_c.latent" in tensors


# ------------------------------------------------------------------------------ comparing

@pytest.fixture
def compared(path, tensors, tmp_path, capsys):
    """Compares with other tensors; returns the exit status and the printed lines."""
    def run(changes, *arguments, only=False):
        others = changes if only else {**tensors, **changes}
        others = {name: tensor.clone().contiguous() for name, tensor in others.items()}
        save_file(others, tmp_path / "other.safetensors")
        capsys.readouterr()
        status = trace.main(["--compare", str(path), str(tmp_path / "other.safetensors"), *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_equal_files_agree_in_two_lines(compared, tensors):
    status, lines = compared({})
    assert status == 0 and len(lines) == 2
    assert lines[0].startswith(f"{len(tensors)} of {len(tensors)} tensors compared, 0 missing, 0 ")
    assert lines[1].startswith("all agree")


def test_the_first_difference_is_the_first_that_runs_and_the_table_begins_with_the_largest(compared, tensors):
    names = ("stage_b.step-000.down_blocks.0.0", "stage_c.step-000.up_blocks.0.1", "stage_c.step-000.embedding")
    largest, first, within_tolerance = (tensors[f"{name}.out"] for name in names)
    first = first.clone()
    first[0] += 1e-2 * first.abs().max()
    changes = dict(zip((f"{name}.out" for name in names), (1.5 * largest, first, (1 + 1e-6) * within_tolerance)))
    status, lines = compared(changes)
    assert status == 1
    assert lines[1].startswith(f"first difference: {names[1]}.out: maximum relative error 1.0e-02")
    assert [line.split()[-1] for line in lines[3:]] == list(names)
    assert lines[3].split()[:3] == ["0.0e+00", "5.0e-01", "5.0e-01"]
    status, lines = compared(changes, "--tolerance", "0.6")
    assert status == 0 and lines[1].startswith("all agree")


@pytest.mark.parametrize("name, change, hint", [
    ("picture", lambda x: torch.where(torch.arange(x.shape[-1]) == 3, torch.nan, x), "error inf"),
    ("picture", lambda x: torch.where(torch.arange(x.shape[-1]) == 3, torch.inf, x), "error inf"),
    ("tokens.ids", lambda x: x + (torch.arange(77) == 5), ""),
    ("stage_b.step-000.embedding.out", lambda x: x.permute(0, 3, 1, 2), "channels-first?")],
    ids=["nan", "inf", "another token", "another layout"])
def test_one_other_value_is_found(compared, tensors, name, change, hint):
    status, lines = compared({name: change(tensors[name])})
    assert status == 1 and lines[1].startswith(f"first difference: {name}: ") and hint in "".join(lines[1:3])


def test_a_file_with_one_block_is_compared_there(compared, tensors):
    block = tensors["stage_c.step-000.embedding.out"].half()  # in any type
    status, lines = compared({"stage_c.step-000.embedding.out": block, "mine": block}, "--tolerance", "1e-3", only=True)
    count = len(tensors)
    assert status == 0 and lines[0].startswith(f"1 of {count} tensors compared, {count - 1} missing, 1 unknown")
    assert lines[1].startswith("missing: tokens.ids, tokens.mask, ") and lines[1].endswith(", ...")


def test_the_example_in_the_docstring_runs_and_agrees(folder, path, tensors, tmp_path, monkeypatch, capsys):
    text = trace.__doc__.split("with our noise and conditions:\n\n")[1].split("\n\n")[0]
    code = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    monkeypatch.chdir(tmp_path)
    save_file(tensors, "trace.safetensors")
    port = Cascade(folder).network("stage_c")
    exec(code, {"port": port, "torch": torch, "sampler": sampler, "load_file": load_file, "save_file": save_file})
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
    ("--blocks stage_c.nothing*", "--blocks stage_c.nothing*: no such module"),
    ("--stages stage_c --blocks stage_b.embedding", "--blocks stage_b.embedding"),
    ("--limit 0.0001", "more than --limit 0.0001 GB; record fewer"),
    ("--guidance -1", "--guidance"),
    ("--width 1", "--width: expected an integer from"),
    ("--compare nowhere.safetensors {trace}", "nowhere.safetensors: "),
    ("--compare {weights}/stage_a.safetensors {trace}", "not a trace"),
    ("--compare {trace} {weights}/stage_a.safetensors", "none of the trace's names"),
    ("--compare {trace}", "expected 2 arguments")])
def test_a_mistake_is_one_line_and_leaves_no_file(folder, path, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(weights=folder, trace=path) for argument in arguments.split()]
    assert trace.main([*RUN, "--weights", str(folder), "--out", "new.safetensors", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("trace.py: ") and message in lines[0], lines
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shell_traces_the_tiny_cascade_and_compares(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(Path(trace.__file__).resolve()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    made = run("a large red circle", "--steps", "2", "--decoder-steps", "1")
    assert made.returncode == 0 and made.stdout.startswith("trace.safetensors: ") and made.stdout.endswith(" MB\n")
    assert run("--compare", "trace.safetensors", "trace.safetensors").returncode == 0
    assert run("--compare", "trace.safetensors", "nowhere").returncode == 2
