"""What several tests and tools share: the official networks, golden files, random inputs, errors."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT / "weights"))

import official                                                                         # noqa: E402
from model import ControlNet, ControlNetConfig, SemanticEncoderConfig, UNet, Weights    # noqa: E402

# ------------------------------------------------------------------------------ the official networks

UNETS = {name: config for name, (network_class, config) in official.OFFICIAL.items() if network_class is UNet}
OFFICIAL = official.OFFICIAL | {
    "controlnet_canny": (ControlNet, ControlNetConfig(1, SemanticEncoderConfig())),
    "controlnet_inpainting": (ControlNet, ControlNetConfig(4, SemanticEncoderConfig())),
    "controlnet_super_resolution": (ControlNet, ControlNetConfig(16))}


def on_meta(network_class, config):
    """A network without values."""
    with torch.device("meta"):
        return network_class(config).eval().requires_grad_(False)


# ------------------------------------------------------------------------------ golden files

# How each network is run on the inputs of its golden file: {name of an output: tensor}.
RUNS = {"stage_c": lambda network, **inputs: {"epsilon": network(**inputs)},
    "stage_b": lambda network, **inputs: {"epsilon": network(**inputs)},
    "stage_a": lambda network, z, image: {"decoded": network.decode(z), "encoded": network.encode(image)},
    "text_encoder": lambda network, ids, mask: dict(zip(("hidden", "pooled"), network(ids, mask))),
    "image_encoder": lambda network, pixels: {"embedding": network(pixels)},
    "effnet_encoder": lambda network, image: {"latent": network(image)},
    "previewer": lambda network, latent: {"picture": network(latent)}}


def split(tensors, *prefixes):
    """For each prefix the tensors whose names begin with it, named without it."""
    return [{name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            for prefix in prefixes]


def golden(name):
    """The inputs and outputs, by name, in a golden file, and the sum of the peer's weights."""
    tensors = load_file(TESTS / "golden" / f"{name}.safetensors")
    return *split(tensors, "in.", "out."), tensors.get("weights")


def original(name, folder):
    """Numbers of the original code (tests/README.md): the path of a file with the network's weights, the inputs, and the
    outputs."""
    source, file = TESTS / "original" / f"{name}.safetensors", Path(folder) / f"{name}.safetensors"
    inputs, outputs, weights = split(load_file(source), "in.", "out.", "weights.")
    save_file(weights, file, Weights(source).metadata)
    return file, inputs, outputs


def original_stage_c(folder):
    """The same of Stage C alone: the path, the inputs, and eps."""
    file, inputs, outputs = original("stage_c", folder)
    names = "x", "r", "clip_text_pooled", "clip_text", "clip_img"
    return file, {name: inputs[name] for name in names}, outputs["eps"]


# ------------------------------------------------------------------------------ inputs and errors

# The shortest run of a Cascade.
SHORT = {"steps": 1, "decoder_steps": 1, "width": 64, "height": 64, "output": "pt"}


def random_image(width, height):
    """A PIL image, the same for the same size."""
    values = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def noise(*shape, seed=None):
    """Gaussian noise, the same for the same shape."""
    seed = sum(shape) if seed is None else seed
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(config, seed=0, rows=2, height=6, width=5, tokens=7, images=2):
    """Random arguments of a UNet; height and width are those of its outermost feature map."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    side = config.patch_size
    inputs = {"x": randn(rows, config.latent_channels, height * side, width * side),
        "r": torch.rand(rows, generator=generator),
        "clip_text_pooled": randn(rows, 1, config.text_dim)}
    if config.is_stage_b:
        return inputs | {"effnet": randn(rows, 16, 3, 3), "pixels": randn(rows, 3, 9, 7)}
    return inputs | {"clip_text": randn(rows, tokens, config.text_dim),
                     "clip_img": randn(rows, images, config.image_dim)}


def relative_error(ours, theirs):
    """The largest difference, relative to the largest value of `theirs`; inf where it is not finite."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return error.nan_to_num(torch.inf).item()


def assert_same(ours, theirs, tolerance=1e-5):
    """Equal up to a relative error, and not because there is nothing to compare."""
    assert theirs.isfinite().all() and theirs.std() > 1e-2, "the comparison would prove nothing"
    assert relative_error(ours, theirs) <= tolerance


def slow_except(values, *fast):
    """Values of a parametrised test, which is slow but for those in `fast`."""
    slow = pytest.mark.slow
    return [value if value in fast else pytest.param(value, marks=slow) for value in values]
