"""tests/trace.py: that a trace is what Cascade did, holds together by itself, and finds where another one departs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trace
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_folder

import sampler
from cascade import Cascade

PROMPT, NEGATIVE = "a red circle", "blue"
SIZE = ["--width", "130", "--height", "88"]  # odd grids, and a picture that is cut
RUN = [
    PROMPT,
    "--negative",
    NEGATIVE,
    "--steps",
    "3",
    "--decoder-steps",
    "2",
    "--decoder-guidance",
    "1.5",
    "--seed",
    "7",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=4)


@pytest.fixture(scope="module")
def path(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    assert trace.main([*RUN, *SIZE, "--weights", str(folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def tensors(path):
    return load_file(path)


def traced(folder, out, *arguments):
    assert trace.main(["--weights", str(folder), "--out", str(out), *RUN, *arguments]) == 0
    return load_file(out)


def order(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["order"])


def steps_of(tensors, stage):
    return range(len(tensors[f"{stage}.timesteps"]) - 1)


# ------------------------------------------------------------------------------------------------ what is in it


def test_the_picture_and_the_latents_are_cascades_bit_for_bit(folder, tensors):
    given = dict(width=130, height=88, steps=3, decoder_steps=2, decoder_guidance=1.5, seed=7)
    picture, z = (Cascade(folder)(PROMPT, NEGATIVE, output=kind, **given) for kind in ("pt", "latent"))
    assert torch.equal(tensors["picture"], picture) and torch.equal(tensors["stage_b.latent"], z)
    latents = Cascade(folder).prior(PROMPT, NEGATIVE, width=130, height=88, steps=3, seed=7)
    assert torch.equal(tensors["stage_c.latent"], latents)


def test_without_guidance_there_is_one_row_and_still_cascades_picture(folder, tmp_path):
    tensors = traced(folder, tmp_path / "one.safetensors", "--guidance", "1", "--decoder-guidance", "0")
    picture = Cascade(folder)(PROMPT, NEGATIVE, steps=3, guidance=1.0, decoder_steps=2, seed=7, output="pt")
    assert torch.equal(tensors["picture"], picture)
    assert len(tensors["stage_c.step-000.out"]) == len(tensors["stage_b.step-000.out"]) == 1


def blocks_of(network, stage):
    """What a network consists of, read off its modules: {path: how often it is passed}."""
    if stage == "text_encoder":
        layers = [f"text_model.encoder.layers.{i}" for i in range(network.config.layers)]
        return dict.fromkeys(
            ["text_model.embeddings.token_embedding", *layers, "text_model.final_layer_norm", "text_projection"], 1
        )
    if stage == "stage_a":
        return dict.fromkeys([*(f"up_blocks.{i}" for i in range(len(network.up_blocks))), "out_block"], 1)
    repeats = {"down_blocks": network.config.down_repeat, "up_blocks": network.config.up_repeat}
    found = {}
    for name, child in network.named_children():
        if name in repeats:
            for i, level in enumerate(child):
                found |= {f"{name}.{i}.{j}": repeats[name][i] for j in range(len(level))}
        elif name.endswith("repeat_mappers"):
            found |= {f"{name}.{i}.{j}": 1 for i, level in enumerate(child) for j in range(len(level))}
        elif name.endswith("scalers"):
            found |= {f"{name}.{i}": 1 for i in range(len(child))}
        else:
            found[name] = 1
    return found


@pytest.mark.parametrize("stage", trace.STAGES)
def test_every_block_of_every_network_is_there_at_every_pass(folder, tensors, stage):
    blocks = blocks_of(Cascade(folder).network(stage), stage)
    prefixes = [stage]
    if stage in ("stage_c", "stage_b"):
        prefixes = [f"{stage}.step-{i:03}" for i in (0, steps_of(tensors, stage)[-1])]
        assert max(blocks.values()) > 1
    for prefix in prefixes:
        wanted = {f"{path}.pass-{n}" if n else path for path, passes in blocks.items() for n in range(passes)}
        for side in ("in", "out"):
            found = {
                name[len(prefix) + 1 : -len(side) - 1]
                for name in tensors
                if name.startswith(f"{prefix}.") and name.endswith(f".{side}") and ".step-" not in name[len(prefix) :]
            }
            assert found - {"embed_time"} - {""} == wanted


def test_a_block_fed_with_its_traced_input_gives_its_traced_output(folder, tensors):
    visible = torch.ones(77, 77).tril().bool() & tensors["tokens.mask"].bool()[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    tried = 0
    for stage in trace.STAGES:
        modules = dict(Cascade(folder).network(stage).named_modules())
        for name in (name for name in tensors if name.startswith(f"{stage}.") and name.endswith(".in")):
            name = name.removesuffix(".in")
            step = ".".join(name.split(".")[:2])
            path = name.removeprefix(step if ".step-" in name else stage)[1:].split(".pass-")[0]
            rest = ()
            if "_blocks." in path and ".step-" in name:
                rest = [
                    tensors[f"{step}.embed_time.out"],
                    tensors[f"{step}.clip_norm.out"],
                    tensors.get(f"{name}.skip"),
                ]
            elif ".layers." in path:
                rest = [mask]
            out = tensors[f"{name}.out"]  # a product's rounding may depend on where its input lies in memory
            error = (modules[path](tensors[f"{name}.in"], *rest) - out).abs().max()
            assert error <= 1e-6 * out.abs().max(), name
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("stage, guidance", [("stage_c", 4.0), ("stage_b", 1.5)])
def test_stepping_by_hand_from_what_is_traced_gives_the_traced_latents(tensors, stage, guidance):
    a = tensors[f"{stage}.alpha_bar"]
    assert torch.equal(a, sampler.alpha_bar(tensors[f"{stage}.timesteps"]))
    for i in steps_of(tensors, stage):
        x, out, epsilon, noise, x0 = (
            tensors[f"{stage}.step-{i:03}.{name}"] for name in ("x", "out", "epsilon", "noise", "x0")
        )
        wanted, unwanted = out.chunk(2)
        assert torch.equal(epsilon, unwanted + guidance * (wanted - unwanted))
        assert torch.equal(x0, sampler.clean(x, epsilon, a[i]))
        then = tensors.get(f"{stage}.step-{i + 1:03}.x", tensors[f"{stage}.latent"])
        assert torch.equal(sampler.ddpm(x, epsilon, noise, a[i], a[i + 1]), then)
        assert noise.any() == (i < steps_of(tensors, stage)[-1])


def test_a_step_of_which_no_block_is_recorded_still_says_what_a_sampler_needs(tensors):
    found = {name.removeprefix("stage_c.step-001.") for name in tensors if "stage_c.step-001" in name}
    assert found == {"x", "embed_time.out", "out", "epsilon", "x0", "noise"}


def test_the_order_is_that_of_execution(path, tensors):
    names = order(path)
    assert sorted(names) == sorted(tensors) and names[0] == "tokens.ids" and names[-1] == "picture"
    places = {name: i for i, name in enumerate(names)}
    for name, place in places.items():
        if name.endswith(".in"):
            assert place < places[name[:-2] + "out"]
    stages = [name.split(".")[0] for name in names]
    assert list(dict.fromkeys(stages)) == ["tokens", *trace.STAGES, "picture"]
    step = "stage_b.step-000"
    assert places[f"{step}.up_blocks.0.0.out"] < places[f"{step}.up_blocks.0.1.in"]
    assert places[f"{step}.up_blocks.0.1.out"] < places[f"{step}.up_blocks.0.0.pass-1.in"]


def test_values_are_fp32_whatever_the_run_is(folder, tmp_path):
    tensors = traced(folder, tmp_path / "bf16.safetensors", "--dtype", "bf16", *SIZE)
    for name, tensor in tensors.items():
        ids = name.startswith("tokens.") or name.endswith("token_embedding.in")
        assert tensor.dtype == (torch.int64 if ids else torch.float32), name
    rounded, kept = tensors["stage_c.step-000.embedding.out"], tensors["stage_c.latent"]
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(kept, kept.bfloat16().float())


# ------------------------------------------------------------------------------------------------ choosing


def test_list_says_the_names_and_shapes_and_runs_nothing(folder, path, tensors, tmp_path, capsys):
    out = tmp_path / "none.safetensors"
    assert trace.main([*RUN, *SIZE, "--weights", str(folder), "--out", str(out), "--list"]) == 0
    *lines, size = capsys.readouterr().out.splitlines()
    assert lines == [" ".join(map(str, (name, *tensors[name].shape))) for name in order(path)]
    assert size == f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.1f} MB"
    assert not out.exists()


def test_patterns_choose_modules_however_deep(folder, tmp_path):
    tensors = traced(folder, tmp_path / "some.safetensors", "--stages", "stage_c", "--blocks", "stage_c.up_blocks.1.0*")
    paths = {name.split(".", 2)[2].rsplit(".", 1)[0] for name in tensors if name.startswith("stage_c.step-000.up")}
    assert {"up_blocks.1.0", "up_blocks.1.0.pass-1", "up_blocks.1.0.channelwise.2"} <= paths
    assert all(path.startswith("up_blocks.1.0") for path in paths)
    assert "stage_c.step-000.embedding.in" not in tensors


def test_a_run_stops_after_the_last_of_its_stages(folder, tmp_path):
    tensors = traced(folder, tmp_path / "some.safetensors", "--stages", "stage_c", "--steps-recorded", "1")
    assert not any(name.startswith(("stage_b", "stage_a", "picture")) for name in tensors)
    assert not any(name.startswith("text_encoder.text_model") for name in tensors) and "text_encoder.hidden" in tensors
    assert {name.split(".")[1] for name in tensors if ".down_blocks." in name} == {"step-001"}
    assert "stage_c.latent" in tensors


# ------------------------------------------------------------------------------------------------ comparing


@pytest.fixture
def compared(path, tensors, tmp_path, capsys):
    """Changes a copy of the tensors and returns the exit status and what is printed."""

    def run(edit, *arguments):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        edit(changed)
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "other.safetensors")
        capsys.readouterr()
        status = trace.main(["--compare", str(path), str(tmp_path / "other.safetensors"), *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_equal_files_agree_in_two_lines(compared, tensors):
    status, said = compared(lambda changed: None)
    assert status == 0 and len(said) == 2
    assert said[0].startswith(f"{len(tensors)} of {len(tensors)} tensors compared, 0 missing, 0 ")
    assert said[1].startswith("all agree")


def test_the_first_departure_is_the_first_that_runs_and_the_table_begins_with_the_largest(compared):
    first, largest = "stage_c.step-000.up_blocks.0.1.out", "stage_b.step-000.down_blocks.0.0.out"

    def edit(changed):
        changed[largest] *= 1.5
        changed[first][0] += 1e-2 * changed[first].abs().max()
        changed["stage_c.step-000.embedding.out"] *= 1 + 1e-6  # within tolerance

    status, said = compared(edit)
    assert status == 1
    assert said[1].startswith(f"first departure: {first}: error 1.0e-02 of the largest value")
    assert [line.split()[-1] for line in said[3:]] == [
        name.removesuffix(".out") for name in (largest, first, "stage_c.step-000.embedding.out")
    ]
    assert said[3].split()[:3] == ["0.0e+00", "5.0e-01", "5.0e-01"]
    status, said = compared(edit, "--tolerance", "0.6")
    assert status == 0 and said[1].startswith("all agree")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_departs(compared, value):
    status, said = compared(lambda changed: changed["picture"][0, 0, 0].fill_(value), "--tolerance", "1e9")
    assert status == 1 and said[1].startswith("first departure: picture: error inf")


def test_one_other_token_departs(compared):
    def edit(changed):
        changed["tokens.ids"][0, 5] += 1

    status, said = compared(edit)
    assert status == 1 and said[1].startswith("first departure: tokens.ids")


def test_another_layout_is_told(compared):
    name = "stage_b.step-000.embedding.out"
    status, said = compared(lambda changed: changed.update({name: changed[name].permute(0, 3, 1, 2)}))
    assert status == 1 and said[1].startswith(f"first departure: {name}") and "is one channels-first?" in said[2]


def test_axes_of_length_one_do_not_count(compared):
    name = "text_encoder.pooled"
    assert compared(lambda changed: changed.update({name: changed[name].squeeze(1)}))[0] == 0


def test_a_file_with_one_block_is_compared_there(compared, tensors):
    def edit(changed):
        kept = changed["stage_c.step-000.embedding.out"].half()  # in any type
        changed.clear()
        changed.update({"stage_c.step-000.embedding.out": kept, "mine": kept.clone()})

    status, said = compared(edit, "--tolerance", "1e-3")
    assert status == 0
    assert said[0] == f"1 of {len(tensors)} tensors compared, {len(tensors) - 1} missing, 1 that the trace has not"
    assert said[1].startswith("missing: tokens.ids, tokens.mask, ") and said[1].endswith(", ...")


def test_the_example_of_the_docstring_runs_and_agrees(folder, path, tensors, tmp_path, monkeypatch, capsys):
    text = trace.__doc__.split("with our noise and conditions:\n\n")[1].split("\n\n")[0]
    code = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    monkeypatch.chdir(tmp_path)
    save_file(tensors, "trace.safetensors")
    port = Cascade(folder).network("stage_c")
    names = {"port": port, "torch": torch, "sampler": sampler, "load_file": load_file, "save_file": save_file}
    exec(code, names)
    assert trace.main(["--compare", str(path), "mine.safetensors", "--tolerance", "1e-5"]) == 0
    assert "all agree" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--weights", "nowhere"], "there is no such weights folder"),
        (["--out", "nowhere/new.safetensors"], "a folder that is there"),
        (["--out", "new.pt"], ".safetensors"),
        (["--steps", "0"], "steps is 0"),
        (["--steps-recorded", "0", "3"], "--steps-recorded 3: there are 3 steps"),
        (["--stages", "stage_d"], "invalid choice"),
        (["--blocks", "stage_c.nothing*"], "--blocks stage_c.nothing*: no such module"),
        (["--stages", "stage_c", "--blocks", "stage_b.embedding"], "--blocks stage_b.embedding"),
        (["--limit", "0.0001"], "more than --limit 0.0001 GB; record fewer"),
        (["--guidance", "-1"], "guidance is -1.0"),
        (["--width", "1"], "width is 1"),
        (["--compare", "nowhere.safetensors", "{trace}"], "nowhere.safetensors: there is no such file"),
        (["--compare", "{weights}/stage_a.safetensors", "{trace}"], "not a trace"),
        (["--compare", "{trace}", "{weights}/stage_a.safetensors"], "none of the trace's names"),
        (["--compare", "{trace}"], "expected 2 arguments"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_leaves_no_file(folder, path, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(weights=folder, trace=path) for argument in arguments]
    assert trace.main([*RUN, "--weights", str(folder), "--out", "new.safetensors", *given]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("trace.py: ") and said in shown[0], shown
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_what_was_there(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kept.safetensors"
    out.write_bytes(b"an older trace")

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(trace, "save_file", fail)
    assert trace.main([*RUN, "--weights", str(folder), "--out", str(out), "--stages", "text_encoder"]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert out.read_bytes() == b"an older trace" and list(tmp_path.iterdir()) == [out]


def test_the_shell_traces_the_small_cascade_and_compares(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(Path(trace.__file__).resolve()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    made = run("a large red circle", "--steps", "2", "--decoder-steps", "1")
    assert made.returncode == 0 and made.stdout.startswith("trace.safetensors: ") and made.stdout.endswith(" MB\n")
    assert run("--compare", *["trace.safetensors"] * 2).returncode == 0
    assert run("--compare", "trace.safetensors", "nowhere").returncode == 2
