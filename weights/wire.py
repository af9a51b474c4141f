"""Initial weights for Stage B and C that compute the noise from x and a prediction of x0, so that training only has to
learn x0."""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from sampler import alpha_bar

CONSTANT = 60.0                                         # the magnitude of the four constant channels


def freeze_rows(layer, rows):
    """These rows of a layer keep their values in training."""
    for parameter in (layer.weight, layer.bias):
        transposed = isinstance(layer, nn.ConvTranspose2d) and parameter.dim() > 1
        mask = torch.ones_like(parameter).index_fill_(1 if transposed else 0, rows, 0)
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def output_layers(block):
    """The layers whose output a block adds to the stream; of a timestep block, its mappers."""
    if hasattr(block, "channelwise"):
        return [block.channelwise[4]]
    if hasattr(block, "mapper"):
        return list(block.children())
    return [block.attention.attn.out_proj]


def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def fit_time_factors(unet, k):
    """The formula's two factors as linear functions of the time embedding: (65, 2), the bias last.

    The factors 1 / sqrt(1 - a) and sqrt(a) / sqrt(1 - a), smoothed near t = 0, are fitted to the
    sines and cosines of t. They also undo the last norm, which divides by the constant channels (now
    twice as large) and by what X and E themselves add to it.
    """
    c = unet.config.widths[0]
    t = torch.linspace(0, 1, 4001)
    a = alpha_bar(t)
    x_factor = (1 - a + 0.03 * a ** 2).rsqrt()
    factors = torch.stack([x_factor, a.sqrt() * x_factor], dim=1).double()              # (4001, 2)
    norm = 4 * CONSTANT / math.sqrt(c)
    power = (factors ** 2 * torch.tensor([1, 2])).sum(1, keepdim=True)                  # (4001, 1)
    target = factors * (1 + k * power / c / norm ** 2).sqrt() - 1                       # (4001, 2)
    waves = unet.embed_time(t, None, None)[:, :64].double()                             # (4001, 64)
    waves = F.pad(waves, (0, 1), value=1)                                               # (4001, 65)
    weighted = waves * (1 / factors[:, 1:] ** 2).clamp(max=2000)
    gram = weighted.T @ waves + 1e-4 * torch.eye(65)                                    # (65, 65)
    return torch.linalg.solve(gram, weighted.T @ target).float()                        # (65, 2)


def fixed_rows(unet):
    """The rows that `wire` has set, as {layer: numbers of the rows}."""
    k = unet.config.latent_channels * unet.config.patch_size ** 2
    XE = torch.arange(2 * k)
    XK = torch.cat([torch.arange(k), torch.arange(2 * k, 2 * k + 4)])
    XEK = torch.arange(2 * k + 4)
    c = unet.config.widths[0]
    up = unet.up_blocks[-1]
    time_block = [block for block in up if hasattr(block, "mapper")][-1]
    fixed = {}
    for block in [*unet.down_blocks[0], *up]:
        for layer in output_layers(block):
            rows = XEK if block is time_block else XK
            parts = len(layer.bias) // c                # scale and shift, or one
            fixed[layer] = torch.cat([rows + part * c for part in range(parts)])
    widen = unet.up_upscalers[-2][1]
    widen = widen.blocks[1] if hasattr(widen, "blocks") else widen
    layers = [unet.embedding[1], widen]
    if unet.config.semantic_channels:
        layers += [unet.effnet_mapper[2], unet.pixels_mapper[2]]
    for layer in layers:
        fixed[layer] = XK
    fixed[up[0].channelwise[0]] = XE
    fixed[unet.clf[1]] = torch.arange(k)
    return fixed


def fix(unet):
    """The weights that `wire` has set keep their values in training, as long as there is no weight decay."""
    for layer, rows in fixed_rows(unet).items():
        freeze_rows(layer, rows)
    k = unet.config.latent_channels * unet.config.patch_size ** 2
    response = unet.up_blocks[-1][0].channelwise[2]
    for parameter in (response.gamma, response.beta):
        parameter.register_hook(lambda gradient: F.pad(gradient[..., 2 * k:], (2 * k, 0)))
    unet.clf[1].requires_grad_(False)
    return unet


def wire(unet):
    """A noisy latent is x = sqrt(a) x0 + sqrt(1 - a) epsilon, with a = alpha_bar(t), so

        epsilon = x / sqrt(1 - a) - x0 sqrt(a) / sqrt(1 - a)

    and only x0 has to be learned. Near t = 1, where the sampler decides what the image will show, the
    x0 term is a hundredth of epsilon: any jitter in the path of x through the network drowns it, and
    learning takes many times as long. So the formula is written into weights that stay fixed:

        X   channels that carry x through the outermost level
        E   channels into which the network writes its prediction of x0
        K   four large constant channels, which keep the norms from dividing the scale of x away

    The last timestep block scales X and E as the formula says, and the last layer subtracts. All
    other channels and weights are free to learn; every block starts as the identity.
    """
    c = unet.config.widths[0]
    k = unet.config.latent_channels * unet.config.patch_size ** 2
    X = torch.arange(k)
    E = torch.arange(k, 2 * k)
    K = torch.arange(2 * k, 2 * k + 4)
    XE = torch.arange(2 * k)
    XK = torch.cat([X, K])
    eye = torch.eye(k)
    constants = CONSTANT * torch.tensor([1.0, -1.0, 1.0, -1.0])

    down = unet.down_blocks[0]
    up = unet.up_blocks[-1]
    first, _, _, _, second = up[0].channelwise                                          # reads the skip
    time_block = [block for block in up if hasattr(block, "mapper")][-1]
    enter = unet.embedding[1]
    leave = unet.clf[1]
    narrow = unet.down_downscalers[1][1]                                                # to the next level
    narrow = narrow.blocks[0] if hasattr(narrow, "blocks") else narrow
    widen = unet.up_upscalers[-2][1]                                                    # and back
    widen = widen.blocks[1] if hasattr(widen, "blocks") else widen
    mappers = []
    if unet.config.semantic_channels:
        mappers = [unet.effnet_mapper[2], unet.pixels_mapper[2]]

    with torch.no_grad():
        for block in itertools.chain(*unet.down_blocks, *unet.up_blocks):
            for layer in output_layers(block):
                zero(layer)
        for block in [*down, *up]:
            if hasattr(block, "depthwise"):                     # the constants carry no information
                block.depthwise.weight[K] = 0
                block.depthwise.bias[K] = 0

        # Input: x enters X and, three times as large, E, where the blocks may overwrite it.
        zero(enter)
        enter.weight[X, :, 0, 0] = eye
        enter.weight[E, :, 0, 0] = 3 * eye
        enter.bias[K] = constants
        for mapper in mappers:
            mapper.weight[XK] = 0
            mapper.bias[XK] = 0
        narrow.weight.mul_(8)
        narrow.weight[:, K] = 0
        zero(widen)

        # Through the skip: GELU(x) - GELU(-x) = x. The input norm divided x by its scale and
        # subtracted a mean, from the constants too, so x is read relative to their mean.
        norm = math.sqrt((4 * CONSTANT ** 2 + 10 * k) / c)
        read = torch.zeros(k, 2 * c)                            # the block's own channels, then the skip's
        read[:, c:c + k] = eye
        read[:, c + K] = -0.25
        first.weight[XE] = torch.cat([read, -read])
        first.bias[XE] = 0
        second.weight[:k, :2 * k] = norm * torch.cat([eye, -eye], dim=1)
        second.bias[K] = constants

        # Output: the two factors by time, then the subtraction.
        fit = fit_time_factors(unet, k)
        for rows, column in ((X, 0), (E, 1)):
            time_block.mapper.weight[rows] = fit[:64, column]
            time_block.mapper.bias[rows] = fit[64, column]
        time_block.mapper.bias[K] = 1
        norm = 4 * CONSTANT / math.sqrt(c)
        zero(leave)
        leave.weight[:, X, 0, 0] = norm * eye
        leave.weight[:, E, 0, 0] = -norm * eye

    return fix(unet)
