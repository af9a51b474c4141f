"""A trace is enough to check another implementation: diffusers' UNet, given its inputs, agrees at every block."""
import re
from functools import partial

import compare
import pytest
import torch
import trace
from helpers import assert_same
from peers import diffusers_unet
from safetensors.torch import load_file, save_file

from cascade import Cascade

OPTIONS = "--steps 3 --decoder-steps 2 --decoder-guidance 1.5 --steps-recorded 1 --width 150 --height 100"


@pytest.fixture(scope="module")
def path(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    assert trace.main(["a red circle", *OPTIONS.split(), "--weights", str(folder), "--out", str(out)]) == 0
    return out


@torch.no_grad()
def run_peer(folder, tensors, stage, guidance):
    """diffusers' UNet on the latent and the conditions of step 1: the outputs of its modules, by the trace's names and in
    the trace's layout. Inside an attention block its names differ; everywhere else they are the same."""
    step, mine = f"{stage}.step-001", {}

    def keep(path, module, inputs, output):
        name = next(name for n in range(9) if (name := path + (f".pass-{n}" if n else "") + ".out") not in mine)
        channels_last = output.dim() == 4 and "clf" not in path
        mine[name] = (output.permute(0, 2, 3, 1) if channels_last else output).contiguous().clone()

    peer = diffusers_unet(Cascade(folder).network(stage))
    for path, module in peer.named_modules():
        if f"{step}.{path}.out" in tensors:
            module.register_forward_hook(partial(keep, f"{step}.{path}"))
    condition = {name.split(".")[2]: tensor for name, tensor in tensors.items() if f"{stage}.condition." in name}
    x, r = tensors[f"{step}.x"], tensors[f"{stage}.timesteps"][1]
    mine[f"{step}.out"] = peer(torch.cat([x, x]), r.expand(2), **condition).sample.contiguous()
    cond, uncond = mine[f"{step}.out"].chunk(2)
    mine[f"{step}.epsilon"] = uncond + guidance * (cond - uncond)
    return mine


@pytest.mark.parametrize("stage, guidance", [("stage_c", 4.0), ("stage_b", 1.5)])
def test_diffusers_unet_agrees_at_every_block(folder, path, tmp_path, stage, guidance, capsys):
    tensors, step = load_file(path), f"{stage}.step-001."
    mine = run_peer(folder, tensors, stage, guidance)
    assert_same(mine[f"{step}epsilon"], tensors[f"{step}epsilon"])
    blocks = {name for name in tensors if re.match(rf"{step}.*_blocks\..*\.out$", name)}
    assert len(blocks) > 20 and blocks <= set(mine)
    save_file(mine, tmp_path / "mine.safetensors")
    assert compare.main([str(path), str(tmp_path / "mine.safetensors")]) == 0
    assert capsys.readouterr().out.startswith(f"{len(mine)} of ")
