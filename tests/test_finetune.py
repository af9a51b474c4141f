"""Fine-tuning: the losses are the original code's, a training resumes exactly, and its files load to the same numbers."""
from dataclasses import replace

import adapters
import distil_lcm
import finetune
import memory
import numpy as np
import pytest
import shapes
import torch
import training
from commands import contents
from helpers import TESTS, assert_same
from PIL import Image
from safetensors.torch import load_file, save_file

import model
from cascade import CONTROLS, Cascade

ORIGINAL = load_file(TESTS / "original" / "training.safetensors")


# ------------------------------------------------------------------------------ the original code's numbers
def test_the_noised_latents_the_time_and_the_loss_are_the_originals():
    def unet(x, r):
        assert_same(x, ORIGINAL["out.noised"], 1e-6)
        assert_same(r, ORIGINAL["out.noise_cond"], 3e-6)    # acos near 1 multiplies rounding errors
        return ORIGINAL["out.pred"]

    def weight(a, losses):
        assert_same(a, ORIGINAL["out.a"] ** 2, 1e-6)
        assert_same(losses, ORIGINAL["out.loss"], 1e-6)
        assert_same(training.p2_weight(a, losses), ORIGINAL["out.loss_weight_p2"], 1e-6)
        return training.p2_weight(a, losses)

    loss = training.noise_loss(unet, *(ORIGINAL[f"in.{name}"] for name in ("x0", "epsilon", "u")), weight)
    assert loss.item() == pytest.approx(ORIGINAL["out.loss_adjusted_p2"].item(), rel=1e-6)


def same_to_1e_6(ours, theirs):
    """What differs from 1 by little, compared without the 1."""
    assert (ours - theirs).abs().max() <= 1e-6 and theirs.abs().max() > 1e-3


def test_the_adaptive_weight_is_the_originals():
    weight = training.AdaptiveWeight()
    a = torch.sigmoid(ORIGINAL["out.logSNR"])
    weights, means = [], []
    for i in range(3):                                      # the first weights are all 1
        weights.append(weight(a, ORIGINAL[f"in.adaptive.loss.{i}"]))
        means.append(weight.means.clone())
    same_to_1e_6(torch.stack(weights) - 1, torch.stack([ORIGINAL[f"out.adaptive.weight.{i}"] for i in range(3)]) - 1)
    same_to_1e_6(torch.stack(means) - 1, torch.stack([ORIGINAL[f"out.adaptive.buckets.{i}"] for i in range(3)]) - 1)
    weight = training.AdaptiveWeight()                      # some of these losses are in one bucket
    weight(torch.sigmoid(ORIGINAL["in.adaptive.same_bucket.logSNR"]), ORIGINAL["in.adaptive.same_bucket.loss"])
    same_to_1e_6(weight.means - 1, ORIGINAL["out.adaptive.same_bucket.buckets"] - 1)


def test_the_pyramid_noise_is_the_originals():
    draws = iter([ORIGINAL[f"pyramid.in.draw.{i}"] for i in range(4)])

    def randn(*shape):
        draw = next(draws)
        assert draw.shape == shape
        return draw

    noise = training.pyramid_noise(ORIGINAL["pyramid.in.epsilon"], randn)
    assert_same(noise, ORIGINAL["pyramid.out.epsilon"], 1e-6)


# ------------------------------------------------------------------------------ whole trainings
@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "SAMPLES", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        pixels = torch.randint(256, (80, 96, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red [new] {i}")
    return folder


def train(data, weights, out, *options, status=0):
    small = ["--updates", 3, "--batch", 2, "--accumulate", 2, "--save-every", 2, "--lr", 0.01, "--device", "cpu"]
    arguments = [data, "--weights", weights, "--out", out, *small, *options]
    assert finetune.main(list(map(str, arguments))) == status
    return out


WAYS = {
    "lora": ["--what", "lora", "--layers", ".attn", "channelwise", "--token", "[new]=red"],
    "lora_b": ["--what", "lora", "--stage", "b", "--focus"],
    "full": ["--what", "full"],
    "full_b": ["--what", "full", "--stage", "b", "--checkpointing"],
    "canny": ["--what", "controlnet", "--kind", "canny", "--blocks", 0, 7],
    "inpainting": ["--what", "controlnet", "--kind", "inpainting", "--blocks", 1, 2, "--weight", "x0"],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_training_ends_as_one_that_was_not(data, weights, tmp_path, monkeypatch, way):
    whole = train(data, weights, tmp_path / "whole.safetensors", *WAYS[way])
    assert (tmp_path / "whole.png").exists() and not list(tmp_path.glob("*.checkpoint.*"))
    out = tmp_path / "resumed.safetensors"
    monkeypatch.setattr(finetune, "save", interrupt)        # after the last update, before the file is written
    train(data, weights, out, *WAYS[way], status=130)
    monkeypatch.undo()
    assert not out.exists() and (tmp_path / "resumed.checkpoint.safetensors").exists()
    train(data, weights, out, *WAYS[way])
    a, b = load_file(whole), load_file(out)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def interrupt(*_):
    raise KeyboardInterrupt


def test_distillation_teaches_the_student_the_guided_teacher(data, weights, tmp_path, monkeypatch):
    """The distance of one unguided step of the student from what the guided teacher draws falls."""
    out = tmp_path / "lcm.safetensors"
    small = ["--updates", 15, "--batch", 8, "--accumulate", 1, "--save-every", 15, "--lr", 0.03, "--device", "cpu"]
    losses = []
    monkeypatch.setattr(training.Training, "save", lambda self: losses.extend(self.losses))
    arguments = [data, "--weights", weights, "--out", out, *small, "--layers", "attn", "mapper"]
    assert distil_lcm.main(list(map(str, arguments))) == 0
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    plain, distilled = (Cascade(weights, "cpu", loras=given)("red", steps=2, decoder_steps=1, output="pt")
                        for given in ([], [(out, 1.0)]))
    assert not torch.equal(plain, distilled)


# ------------------------------------------------------------------------------ the files
def test_a_lora_loads_to_the_numbers_that_were_trained(weights, tmp_path):
    """For both networks, with the names that ComfyUI and OneTrainer read, q, k and v apart."""
    for stage, prefix in (("c", "lora_prior_unet"), ("b", "lora_decoder_unet")):
        path = weights / f"stage_{stage}.safetensors"
        trained = model.load(path)
        added = adapters.add_lora(trained, rank=3, layers=[".attn", "mapper", "clf"])
        for change in added.values():
            torch.nn.init.normal_(change.down)
        file = tmp_path / "lora.safetensors"
        save_file(adapters.lora_tensors(added, stage), file)
        names = set(load_file(file))
        for part in ("lora_up.weight", "lora_down.weight", "alpha"):
            assert f"{prefix}_up_blocks_0_2_attention_attn_to_k.{part}" in names
            assert f"{prefix}_up_blocks_0_2_attention_attn_out_proj.{part}" in names
        merged = model.load(path, loras=[(file, 1.0)]).state_dict()
        for name, layer in trained.named_modules():
            for key in ("weight", "in_proj_weight"):
                if torch.is_tensor(getattr(layer, key, None)):
                    assert_close(merged[f"{name}.{key}"], getattr(layer, key))
        plain = model.load(path).state_dict()
        assert sum(not torch.equal(plain[name], merged[name]) for name in plain) == len(added)


def assert_close(a, b):
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_trained_files_are_used(data, weights, tmp_path):
    """Each changes the image, and a full Stage C keeps its metadata."""
    def draw(folder=weights, **options):
        return Cascade(folder, "cpu", **options)

    prompt = {"steps": 2, "decoder_steps": 1, "output": "pt"}
    plain = draw()("red", **prompt)
    file = train(data, weights, tmp_path / "lora.safetensors", *WAYS["lora"])
    assert not torch.equal(draw(loras=[(file, 1.0)], tokens={"[new]": "red"})("red", **prompt), plain)
    file = train(data, weights, tmp_path / "b.safetensors", *WAYS["lora_b"])
    assert not torch.equal(draw(loras=[(file, 1.0)])("red", **prompt), plain)
    (weights / "controlnet/canny.safetensors").unlink()
    train(data, weights, weights / "controlnet/canny.safetensors", *WAYS["canny"])
    hint = {"control": "canny", "hint": data / "0.png", "width": 128, "height": 128}
    assert not torch.equal(draw()("red", **hint, **prompt), plain)
    full = train(data, weights, tmp_path / "full.safetensors", *WAYS["full"])
    (weights / "stage_c.safetensors").unlink()              # it may be a link
    full.rename(weights / "stage_c.safetensors")
    assert draw().size(None, None) == (128, 128)
    assert not torch.equal(draw()("red", **prompt), plain)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_the_weights_that_wire_has_set_stay(data, weights, tmp_path, what):
    options = WAYS["full"] if what == "full" else ["--what", "lora", "--layers", "embedding", "clf"]
    file = train(data, weights, tmp_path / "file.safetensors", *options, "--wired")
    before = load_file(weights / "stage_c.safetensors")
    if what == "full":
        after = load_file(file)
    else:
        after = model.load(weights / "stage_c.safetensors", loras=[(file, 1.0)]).state_dict()
    fixed = [*range(16), *range(32, 36)]                    # of the first layer: those for x and the constants
    free = [i for i in range(64) if i not in fixed]
    name = "embedding.1.weight"
    assert torch.equal(after[name][fixed], before[name][fixed]) and (after[name][free] != before[name][free]).any(1).all()
    assert torch.equal(after["clf.1.weight"], before["clf.1.weight"])


def test_a_new_controlnet_has_no_effect(weights):
    cascade = Cascade(weights, "cpu")
    for kind in CONTROLS:
        arguments = ["DATA", "--out", "x", "--what", "controlnet", "--kind", kind, "--blocks", "0", "1"]
        options = finetune.parse(finetune.make_parser(), arguments)
        if kind != "super_resolution":                      # that one has 204 million parameters
            controlnet = adapters.new_controlnet(options, cascade, [64, 64])
            maps = controlnet(torch.rand(1, CONTROLS[kind], 64, 64))
            assert sorted(maps) == [0, 1] and all(not value.any() for value in maps.values())


def test_the_memory_table_counts_sixteen_bytes_for_each_trained_weight(capsys, monkeypatch):
    monkeypatch.setattr(memory, "UNETS", ("stage_c",))
    assert finetune.main(["--plan"]) == 0
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    stage_c = {row[1]: list(map(float, row[2].split(" / "))) for row in rows[2:]}
    weights = 3.589e9 / 2 ** 30
    assert stage_c["full"][0] > stage_c["full"][1] > 16 * weights
    assert stage_c["lora"][0] > stage_c["lora"][1] > 2 * weights
    assert stage_c["controlnet"][1] > stage_c["lora"][1]


def test_the_evaluator_knows_what_is_new_where_it_is_asked_to():
    rng = np.random.default_rng(0)
    lists = {"shapes": shapes.SHAPES + shapes.NEW_SHAPES, "colours": shapes.COLOURS | shapes.NEW_COLOURS}
    for _ in range(20):
        scene = shapes.sample_scene(rng, two=0)
        item, = scene.objects
        for new in (item, replace(item, shape="hexagon"), replace(item, colour="cyan")):
            true = replace(scene, objects=(new,))
            found = shapes.detect(shapes.render(true), **lists)
            assert shapes.score(true, found)["all"] and shapes.is_intact(found)


# ------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("change, options, text", [
    (lambda data: [path.unlink() for path in data.glob("*.png")], [], "expected images"),
    (lambda data: (data / "1.txt").unlink(), [], "1.txt"),
    (lambda data: (data / "1.txt").write_bytes(b"\xff\xfe\xff"), [], "1.txt"),
    (lambda data: (data / "2.png").write_bytes(b"not an image"), [], "2.png"),
    (lambda data: (data.parent / "out.safetensors").write_text("mine"), [], "exists"),
    (lambda data: None, ["--layers", "nothing"], "nothing"),
    (lambda data: None, ["--what", "controlnet"], "--kind"),
    (lambda data: None, ["--stage", "b", "--token", "[new]=red"], "--stage b"),
    (lambda data: None, ["--token", "[new]"], "--token"),
    (lambda data: None, ["--lr", "nan"], "--lr"),
    (lambda data: None, ["--rank", "0"], "--rank"),
    (lambda data: None, ["--semantic-scale", "0", "1"], "--semantic-scale"),
    (lambda data: None, ["--weights", "nowhere"], "nowhere")])
def test_bad_input_gives_one_line_and_writes_nothing(data, weights, tmp_path, capsys, change, options, text):
    change(data)
    before = contents(tmp_path)
    train(data, weights, tmp_path / "out.safetensors", *options, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune.py: ")]
    assert text in line and contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(data, weights, tmp_path, capsys, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    train(data, weights, tmp_path / "out.safetensors", status=2)
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_checkpoint_of_other_options_is_refused(data, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "save", interrupt)
    train(data, weights, tmp_path / "out.safetensors", status=130)
    train(data, weights, tmp_path / "out.safetensors", "--rank", 2, status=2)
    assert "other options" in capsys.readouterr().err.splitlines()[-1]
