"""Makes tests/golden/*.safetensors: what the peers answer, so that exactness can be proven without installing them.

    python tests/make_golden.py                 # needs tests/parity/requirements.txt
    python tests/make_golden.py effnet_encoder  # needs torchvision alone, beside torch

The weights are those of tests/tiny.py, drawn from a seed; every file holds the inputs, the peer's outputs and the sum
of the weights' absolute values, which tells other weights from other mathematics.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "parity")]

import tiny  # noqa: E402

GOLDEN = TESTS / "golden"


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def stage_c(network):
    from peers import diffusers_unet

    given = {
        "x": noise(2, 16, 5, 6),
        "r": torch.tensor([0.9, 0.3]),
        "clip_text_pooled": noise(2, 1, 64),
        "clip_text": noise(2, 77, 64),
        "clip_img": noise(2, 2, 24),
    }
    x, r = given["x"], given["r"]
    return given, {"epsilon": diffusers_unet(network)(x, r, *list(given.values())[2:]).sample}


def stage_b(network):
    from peers import diffusers_unet

    given = {
        "x": noise(2, 4, 22, 18),
        "r": torch.tensor([0.8, 0.2]),
        "clip_text_pooled": noise(2, 1, 64),
        "effnet": noise(2, 16, 4, 3),
        "pixels": noise(2, 3, 5, 5).sigmoid(),
    }
    rest = {name: given[name] for name in ("clip_text_pooled", "effnet", "pixels")}
    return given, {"epsilon": diffusers_unet(network)(given["x"], given["r"], **rest).sample}


def stage_a(network):
    from peers import diffusers_stage_a

    peer, given = diffusers_stage_a(network), {"z": 30 * noise(1, 4, 7, 9), "image": noise(1, 3, 24, 32).sigmoid()}
    return given, {
        "decoded": peer.decode(0.43 * given["z"]).sample,
        "encoded": peer.encode(given["image"]).latents / 0.43,
    }


def text_encoder(network):
    from peers import last_hidden, transformers_text

    ids, mask = torch.full((3, 77), 519), torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((2, 9, 77)):
        ids[row, : length - 1] = torch.randint(0, 518, (length - 1,), generator=torch.Generator().manual_seed(row))
        ids[row, 0], mask[row, :length] = 518, 1
    hidden, pooled = last_hidden(transformers_text(network), ids, mask)
    return {"ids": ids, "mask": mask}, {"hidden": hidden, "pooled": pooled.unsqueeze(1)}


def image_encoder(network):
    """In [0, 1]: the peer wants its mean and deviation taken off before, our network does it itself."""
    from peers import transformers_image

    pixels = noise(2, 3, 30, 30).sigmoid()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return {"pixels": pixels}, {"embedding": transformers_image(network)((pixels - mean) / std).image_embeds}


def scheduler(_):
    """Ten steps with predictions and noise given."""
    from peers import scheduler

    peer = scheduler()
    peer.set_timesteps(10)
    t = torch.linspace(0, 1, 101)
    epsilon, x = noise(10, 2, 4, 4), noise(1, 2, 4, 4)
    source, steps = torch.Generator("cpu").manual_seed(4), []
    given = {"t": t, "epsilon": epsilon, "start": x}
    for now, prediction in zip(peer.timesteps[:-1], epsilon):
        x = peer.step(prediction[None], now[None], x, generator=source).prev_sample
        steps.append(x)
    return given, {"alpha_bar": peer._alpha_cumprod(t, torch.device("cpu")), "steps": torch.cat(steps)}


def pipeline(_):
    """Two prompts, guidance on both stages: Stage B's latents, and every fourth pixel of the pictures."""
    import tempfile

    from peers import combined_pipeline

    with tempfile.TemporaryDirectory() as folder:
        peer = combined_pipeline(tiny.write_folder(folder, seed=0))
        outputs = [
            peer(
                prompt=["a red circle", "three stars"],
                negative_prompt=["blue", "a wall"],
                width=128,
                height=128,
                prior_num_inference_steps=4,
                prior_guidance_scale=4.0,
                num_inference_steps=3,
                decoder_guidance_scale=1.5,
                output_type=kind,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)],
            ).images
            for kind in ("latent", "pt")
        ]
    return {}, {"latents": outputs[0], "pixels": outputs[1][:, :, ::4, ::4]}


def effnet_encoder(network):
    """torchvision's EfficientNet with our settings, then a plain convolution and batch norm."""
    from functools import partial

    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    config, c, settings = network.config, network.config.stem, []
    for (fused, expansion, width, blocks), stride in zip(config.stages, (1, 2, 2, 2, 1, 2)):
        settings.append((FusedMBConvConfig if fused else MBConvConfig)(expansion, 3, stride, c, width, blocks))
        c = width
    backbone = EfficientNet(
        settings, dropout=0.0, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), last_channel=config.head
    ).features
    mapper = nn.Sequential(
        nn.Conv2d(config.head, config.latent, 1, bias=False), nn.BatchNorm2d(config.latent, affine=False)
    )
    peer = nn.ModuleDict({"backbone": backbone, "mapper": mapper}).eval()
    peer.load_state_dict(network.state_dict())
    image = noise(2, 3, 64, 96).sigmoid()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image - mean[None, :, None, None]) / std[None, :, None, None]
    return {"image": image}, {"latent": mapper(backbone(normalised))}


def previewer(network):
    """Written out layer by layer: a convolution (2 x 2 ones transposed), exact GELU, batch norm, and again."""
    state, latent = network.state_dict(), noise(2, 16, 4, 5)
    x = latent
    for i in range(0, 27, 3):
        weight, bias = state[f"blocks.{i}.weight"], state[f"blocks.{i}.bias"]
        if weight.shape[2] == 2:
            x = nn.functional.conv_transpose2d(x, weight, bias, stride=2)
        else:
            x = nn.functional.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
        if f"blocks.{i + 2}.weight" in state:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            norm = {
                name: state[f"blocks.{i + 2}.{name}"][:, None, None]
                for name in ("weight", "bias", "running_mean", "running_var")
            }
            x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return {"latent": latent}, {"picture": x}


MAKERS = {
    "stage_c": stage_c,
    "stage_b": stage_b,
    "stage_a": stage_a,
    "text_encoder": text_encoder,
    "image_encoder": image_encoder,
    "scheduler": scheduler,
    "pipeline": pipeline,
    "previewer": previewer,
    "effnet_encoder": effnet_encoder,
}

if __name__ == "__main__":
    networks = tiny.networks(seed=0)
    networks = {name.removesuffix("/model"): network for name, network in networks.items()}
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [name for name in MAKERS if name != "effnet_encoder"]:
        with torch.no_grad():
            given, answers = MAKERS[name](networks.get(name))
        tensors = {f"in.{key}": value for key, value in given.items()} | {
            f"out.{key}": value for key, value in answers.items()
        }
        if name in networks:
            tensors["weights"] = tiny.weight_sum(networks[name])
        save_file({key: value.contiguous() for key, value in tensors.items()}, GOLDEN / f"{name}.safetensors")
        print(name, ", ".join(f"{key} {tuple(value.shape)} std {value.std():.3f}" for key, value in answers.items()))
