"""The networks of the official files and their configs."""
import torch

from model import (
    Previewer, PreviewerConfig, SemanticEncoder, SemanticEncoderConfig, StageA, StageAConfig, UNet, UNetConfig)
from text_encoder import ImageConfig, ImageEncoder, TextConfig, TextEncoder

STAGE_C = dict(latent_channels=16, patch_size=1, time_conditions=("sca", "crp"), image_dim=768, up_repeat=(1, 1))
STAGE_B = dict(latent_channels=4, patch_size=2, time_conditions=("sca",), semantic_channels=16, c_cond=1280)


def symmetric(widths, down, **config):
    """A UNet whose levels have the same blocks on the way down and up."""
    return UNet, UNetConfig(widths, down, down[::-1], down_repeat=(1,) * len(widths), **config)


OFFICIAL = {
    "stage_c": symmetric((2048, 2048), ("RTA" * 8, "RTA" * 24), c_cond=2048, **STAGE_C),
    "stage_c_lite": symmetric((1536, 1536), ("RTA" * 4, "RTA" * 12), c_cond=1536, **STAGE_C),
    "stage_b": symmetric(
        (320, 640, 1280, 1280), ("RT" * 2, "RT" * 6, "RTA" * 28, "RTA" * 6), up_repeat=(3, 3, 2, 2), **STAGE_B),
    "stage_b_lite": symmetric(
        (320, 576, 1152, 1152), ("RT" * 2, "RT" * 4, "RTA" * 14, "RTA" * 4), up_repeat=(2, 2, 2, 2), **STAGE_B),
    "stage_a": (StageA, StageAConfig()),
    "text_encoder": (TextEncoder, TextConfig()),
    "image_encoder": (ImageEncoder, ImageConfig()),
    "effnet_encoder": (SemanticEncoder, SemanticEncoderConfig()),
    "previewer": (Previewer, PreviewerConfig())}


def official(name):
    """An official network without numbers: enough to count its parameters and operations."""
    network_class, config = OFFICIAL[name]
    with torch.device("meta"):
        return network_class(config)
