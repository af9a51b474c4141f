"""Makes tests/golden/*.safetensors: the peers' answers, so that exactness can be proven without installing them.

    python tests/make_golden.py                 # needs tests/parity/requirements.txt
    python tests/make_golden.py effnet_encoder  # needs torchvision only, beside torch

The weights are those of tests/tiny.py with seed 0. Every file holds the inputs, the peer's outputs and the sum of the
weights' absolute values, which tells other weights from other mathematics.
"""
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "parity")]

from helpers import noise
from tiny import networks, weight_sum, write_folder

from cascade import Cascade

if find_spec("diffusers"):
    from diffusers import DDPMWuerstchenScheduler
    from peers import (combined_pipeline, diffusers_stage_a, diffusers_unet, last_hidden,
                       normalised, transformers_image, transformers_text)


def run_unet(network, x, r, **condition):
    inputs = {"x": x, "r": torch.tensor(r), "clip_text_pooled": noise(2, 1, 64), **condition}
    condition = {name: value for name, value in inputs.items() if name not in ("x", "r")}
    return inputs, {"epsilon": diffusers_unet(network)(x, inputs["r"], **condition).sample}


def stage_c(network):
    condition = {"clip_text": noise(2, 77, 64), "clip_img": noise(2, 2, 24)}
    return run_unet(network, noise(2, 16, 5, 6), [0.9, 0.3], **condition)


def stage_b(network):
    condition = {"effnet": noise(2, 16, 4, 3), "pixels": noise(2, 3, 5, 5).sigmoid()}
    return run_unet(network, noise(2, 4, 22, 18), [0.8, 0.2], **condition)


def stage_a(network):
    peer = diffusers_stage_a(network)
    z, image = 30 * noise(1, 4, 7, 9), noise(1, 3, 24, 32).sigmoid()
    decoded, encoded = peer.decode(0.43 * z).sample, peer.encode(image).latents / 0.43
    return {"z": z, "image": image}, {"decoded": decoded, "encoded": encoded}


def text_encoder(network):
    ids, mask = torch.full((3, 77), 519), torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((2, 9, 77)):
        generator = torch.Generator().manual_seed(row)
        ids[row, :length - 1] = torch.randint(0, 518, (length - 1,), generator=generator)
        ids[row, 0], mask[row, :length] = 518, 1
    hidden, pooled = last_hidden(transformers_text(network), ids, mask)
    return {"ids": ids, "mask": mask}, {"hidden": hidden, "pooled": pooled.unsqueeze(1)}


def image_encoder(network):
    """Pixels in [0, 1]: the peer expects normalised ones; our network normalises them itself."""
    pixels = noise(2, 3, 30, 30).sigmoid()
    peer = transformers_image(network)
    return {"pixels": pixels}, {"embedding": peer(normalised(pixels)).image_embeds}


def scheduler(_):
    """Ten steps with given predictions and noise."""
    peer, generator, steps = DDPMWuerstchenScheduler(), torch.Generator("cpu").manual_seed(4), []
    peer.set_timesteps(10)
    t, eps, x = torch.linspace(0, 1, 101), noise(10, 2, 4, 4), noise(1, 2, 4, 4)
    inputs = {"t": t, "epsilon": eps, "start": x}
    for now, prediction in zip(peer.timesteps[:-1], eps):
        x = peer.step(prediction[None], now[None], x, generator=generator).prev_sample
        steps.append(x)
    alpha_bar = peer._alpha_cumprod(t, torch.device("cpu"))
    return inputs, {"alpha_bar": alpha_bar, "steps": torch.cat(steps)}


def pipeline(_):
    """Two prompts, guidance on both stages: Stage B's latents, and every fourth pixel of the images."""
    with tempfile.TemporaryDirectory() as folder:
        peer = combined_pipeline(Cascade(write_folder(folder, seed=0), "cpu"))
    latents, pixels = (
        peer(prompt=["a red circle", "three stars"], negative_prompt=["blue", "a wall"],
             width=128, height=128, prior_num_inference_steps=4, num_inference_steps=3,
             decoder_guidance_scale=1.5, output_type=output,
             generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]).images
        for output in ("latent", "pt"))
    return {}, {"latents": latents, "pixels": pixels[:, :, ::4, ::4]}


def effnet_encoder(network):
    """torchvision's EfficientNet with our settings, then a plain convolution and batch norm."""
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
    config, c, settings = network.config, network.config.stem, []
    for (fused, expansion, width, blocks), stride in zip(config.stages, (1, 2, 2, 2, 1, 2)):
        block = FusedMBConvConfig if fused else MBConvConfig
        settings.append(block(expansion, 3, stride, c, width, blocks))
        c = width
    backbone = EfficientNet(settings, dropout=0.0, norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
                            last_channel=config.head).features
    mapper = nn.Sequential(nn.Conv2d(config.head, config.latent_channels, 1, bias=False),
                           nn.BatchNorm2d(config.latent_channels, affine=False))
    both = nn.ModuleDict({"backbone": backbone, "mapper": mapper}).eval()
    both.load_state_dict(network.state_dict())
    image = noise(2, 3, 64, 96).sigmoid()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return {"image": image}, {"latent": mapper(backbone((image - mean) / std))}


def previewer(network):
    """Written out layer by layer: a convolution (a transposed one if 2 x 2), exact GELU, batch norm, and again."""
    state, latent = network.state_dict(), noise(2, 16, 4, 5)
    x = latent
    for i in range(0, 27, 3):
        weight, bias = state[f"blocks.{i}.weight"], state[f"blocks.{i}.bias"]
        if weight.shape[2] == 2:
            x = nn.functional.conv_transpose2d(x, weight, bias, stride=2)
        else:
            x = nn.functional.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
        if f"blocks.{i + 2}.weight" in state:
            x = 0.5 * x * (1 + torch.erf(x / 2 ** 0.5))
            names = ("weight", "bias", "running_mean", "running_var")
            weight, bias, mean, var = (state[f"blocks.{i + 2}.{name}"][:, None, None] for name in names)
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return {"latent": latent}, {"picture": x}


MAKERS = {maker.__name__: maker for maker in (
    stage_c, stage_b, stage_a, text_encoder, image_encoder, scheduler, pipeline, previewer, effnet_encoder)}


@torch.no_grad()
def main(names, folder=TESTS / "golden"):
    for name in names or [name for name in MAKERS if name != "effnet_encoder"]:
        network = networks().get(name)
        inputs, outputs = MAKERS[name](network)
        tensors = {f"in.{key}": value.contiguous() for key, value in inputs.items()}
        tensors |= {f"out.{key}": value.contiguous() for key, value in outputs.items()}
        if network is not None:
            tensors["weights"] = weight_sum(network)
        save_file(tensors, folder / f"{name}.safetensors")
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
