"""A trace is enough to check another implementation: diffusers and transformers, fed with it, agree at every block."""

from functools import partial

import pytest
import torch
import trace
from peers import assert_same, diffusers_stage_a, diffusers_unet, last_hidden, transformers_text
from safetensors.torch import load_file, save_file
from tiny import write_folder

from model import load
from text_encoder import load as load_tower

GUIDANCE = {"stage_c": 4.0, "stage_b": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def path(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    run = ["a red circle", "--steps", "3", "--decoder-steps", "2", "--decoder-guidance", "1.5", "--steps-recorded", "1"]
    assert trace.main([*run, "--width", "150", "--height", "100", "--weights", str(folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def tensors(path):
    return load_file(path)


def drive(folder, tensors, stage, change=lambda peer: None):
    """diffusers' UNet on the latent and the conditions of step 1: what its modules answer, under the trace's names and
    in the trace's layout. Inside an attention block it has other names; everywhere else they are the same."""
    step, mine = f"{stage}.step-001", {}

    def keep(path, module, inputs, output):
        name = next(name for n in range(9) if (name := path + (f".pass-{n}" if n else "") + ".out") not in mine)
        if output.dim() == 4 and "clf" not in path:
            output = output.permute(0, 2, 3, 1)
        mine[name] = output.contiguous().clone()

    with torch.no_grad():
        peer = diffusers_unet(load(folder / f"{stage}.safetensors"))
        change(peer)
        for path, module in peer.named_modules():
            if f"{step}.{path}.out" in tensors:
                module.register_forward_hook(partial(keep, f"{step}.{path}"))
        condition = {name.split(".")[2]: tensor for name, tensor in tensors.items() if f"{stage}.condition." in name}
        x, r = tensors[f"{step}.x"], tensors[f"{stage}.timesteps"][1]
        mine[f"{step}.out"] = peer(torch.cat([x, x]), r.expand(2), **condition).sample.contiguous()
    wanted, unwanted = mine[f"{step}.out"].chunk(2)
    mine[f"{step}.epsilon"] = unwanted + GUIDANCE[stage] * (wanted - unwanted)
    return mine


@pytest.mark.parametrize("stage", GUIDANCE)
def test_diffusers_unet_fed_with_our_latent_and_conditions_agrees_at_every_block(
    folder, path, tensors, tmp_path, stage, capsys
):
    mine, step = drive(folder, tensors, stage), f"{stage}.step-001"
    assert_same(mine[f"{step}.epsilon"], tensors[f"{step}.epsilon"])
    blocks = {name for name in tensors if name.startswith(f"{step}.") and "_blocks." in name and name.endswith(".out")}
    assert len(blocks) > 20 and blocks <= set(mine)

    save_file(mine, tmp_path / "mine.safetensors")
    assert trace.main(["--compare", str(path), str(tmp_path / "mine.safetensors"), "--tolerance", "1e-5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(mine)} of ") and ", 0 that the trace has not" in said and "all agree" in said


@pytest.mark.parametrize("stage", GUIDANCE)
def test_a_departure_put_into_one_block_of_diffusers_is_found_there(folder, path, tensors, tmp_path, stage, capsys):
    mine = drive(folder, tensors, stage, lambda peer: peer.up_blocks[0][1].mapper.bias.add_(0.1))
    save_file(mine, tmp_path / "mine.safetensors")
    assert trace.main(["--compare", str(path), str(tmp_path / "mine.safetensors")]) == 1
    assert f"first departure: {stage}.step-001.up_blocks.0.1.out" in capsys.readouterr().out


def test_diffusers_stage_a_fed_with_our_latent_draws_our_picture(folder, tensors):
    peer = diffusers_stage_a(load(folder / "stage_a.safetensors"))
    with torch.no_grad():
        pixels = peer.decode(tensors["stage_b.latent"] * peer.config.scale_factor).sample
    assert_same(pixels, tensors["stage_a.out_block.out"])
    assert_same(pixels[:, :, :100, :150].clamp(0, 1), tensors["picture"])


def test_transformers_tower_fed_with_our_tokens_says_our_embeddings(folder, tensors):
    peer = transformers_text(load_tower(folder / "text_encoder" / "model.safetensors"))
    hidden, pooled = last_hidden(peer, tensors["tokens.ids"], tensors["tokens.mask"])
    assert_same(hidden, tensors["text_encoder.hidden"])
    assert_same(pooled[:, None], tensors["text_encoder.pooled"])
    assert_same(hidden, tensors["stage_c.condition.clip_text"])
