"""Initial weights for Stage B and C that already know what noise is, so that training has only to learn pictures."""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from sampler import alpha_bar

LOUD = 60.0


def hold(layer, rows, period=None):
    """These rows of a layer, and those every `period` after them, keep their values while the others learn."""
    for parameter in (layer.weight, layer.bias):
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) and parameter.dim() > 1 else 0
        mask = torch.ones_like(parameter)
        for start in range(0, parameter.shape[dim], period or parameter.shape[dim]):
            mask.index_fill_(dim, rows + start, 0)
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def ends(block):
    """The layers whose answers a block adds to the stream; in a timestep block, to its scale and shift."""
    if hasattr(block, "channelwise"):
        return [block.channelwise[4]]
    if hasattr(block, "mappers"):
        return [getattr(block, name) for name in block.mappers]
    return [block.attention.attn.out_proj]


def wire(unet):
    """A noisy latent is x = sqrt(a) x0 + sqrt(1 - a) epsilon, with a = alpha_bar(t), so

        epsilon = x / sqrt(1 - a) - x0 sqrt(a) / sqrt(1 - a)

    and all that there is to learn is x0. Near t = 1, where the sampler decides what there will be, x0 is a hundredth of
    epsilon: any jitter in how x passes through the network drowns it, and learning takes many times as long. So the
    formula is wired into weights that then never change:

        X   channels of their own, in which x passes through the outermost level
        E   channels into which the network paints its idea of x0
        K   four loud constants, which keep the norms from dividing the size of x away

    The last timestep block scales X and E as the formula says, and the last layer subtracts. The other channels, and
    all else, are free to learn; every block begins as nothing.
    """
    c, k = unet.config.widths[0], unet.config.latent * unet.config.patch ** 2
    X, E, K, eye = torch.arange(k), torch.arange(k, 2 * k), torch.arange(2 * k, 2 * k + 4), torch.eye(k)
    held, constants = torch.cat([X, K]), LOUD * torch.tensor([1.0, -1.0, 1.0, -1.0])
    down, up, enter, leave = unet.down_blocks[0], unet.up_blocks[-1], unet.embedding[1], unet.clf[1]
    narrow, widen = (change[1].blocks[i] if hasattr(change[1], "blocks") else change[1]     # to the next level and back
                     for change, i in ((unet.down_downscalers[1], 0), (unet.up_upscalers[-2], 1)))
    mappers = [unet.effnet_mapper[2], unet.pixels_mapper[2]] if unet.config.semantic else []
    scale = [block for block in up if hasattr(block, "mappers")][-1]
    first, response, second = up[0].channelwise[0], up[0].channelwise[2], up[0].channelwise[4]
    pairs = torch.arange(2 * k)

    with torch.no_grad():
        for block in itertools.chain(*unet.down_blocks, *unet.up_blocks):
            for end in ends(block):
                nn.init.zeros_(end.weight), nn.init.zeros_(end.bias)
        for block in [*down, *up]:
            if hasattr(block, "depthwise"):             # nothing to see in the constants
                block.depthwise.weight[K], block.depthwise.bias[K] = 0, 0

        # The way in: x into X and, three times as loud, into E, where the blocks may use it up.
        nn.init.zeros_(enter.weight), nn.init.zeros_(enter.bias)
        enter.weight[X, :, 0, 0], enter.weight[E, :, 0, 0], enter.bias[K] = eye, 3 * eye, constants
        for mapper in mappers:
            mapper.weight[held], mapper.bias[held] = 0, 0
        narrow.weight.mul_(8)[:, K] = 0
        nn.init.zeros_(widen.weight), nn.init.zeros_(widen.bias)

        # Through the skip: GELU(x) - GELU(-x) = x. The norm on the way in divided x by its size and took a mean away,
        # from the constants too, so x is read against their mean.
        size = math.sqrt((4 * LOUD ** 2 + 10 * k) / c)
        read = torch.zeros(k, 2 * c)                    # of the block's own channels, then of the skip's
        read[:, c:c + k], read[:, c + K] = eye, -0.25
        first.weight[pairs], first.bias[pairs] = torch.cat([read, -read]), 0
        second.weight[:k, :2 * k], second.bias[K] = size * torch.cat([eye, -eye], dim=1), constants

        # The formula's two factors, as far as they are smooth, fitted to the sines and cosines of t; they make up for
        # what X and E themselves add to the last norm, which divides by the constants, now twice as loud.
        t = torch.linspace(0, 1, 4001)
        a = alpha_bar(t)
        of_x = (1 - a + 0.03 * a ** 2).rsqrt()
        factors = torch.stack([of_x, a.sqrt() * of_x], dim=1).double()                      # (4001, 2)
        size = 4 * LOUD / math.sqrt(c)
        norm = (1 + k * (factors ** 2 * torch.tensor([1, 2])).sum(1, keepdim=True) / c / size ** 2).sqrt()
        waves = F.pad(unet.embed_time(t, None, None)[:, :64].double(), (0, 1), value=1)     # (4001, 65)
        weighted = waves * (1 / factors[:, 1:] ** 2).clamp(max=2000)
        fit = torch.linalg.solve(weighted.T @ waves + 1e-4 * torch.eye(65), weighted.T @ (factors * norm - 1)).float()
        for rows, column in ((X, 0), (E, 1)):
            scale.mapper.weight[rows], scale.mapper.bias[rows] = fit[:64, column], fit[64, column]
        scale.mapper.bias[K] = 1
        nn.init.zeros_(leave.weight), nn.init.zeros_(leave.bias)
        leave.weight[:, X, 0, 0], leave.weight[:, E, 0, 0] = size * eye, -size * eye

    for block in [*down, *up]:
        for end in ends(block):
            hold(end, torch.arange(2 * k + 4) if block is scale else held, period=c)
    for layer in (enter, widen, *mappers):
        hold(layer, held)
    hold(first, pairs)
    for parameter in (response.gamma, response.beta):
        parameter.register_hook(lambda gradient: F.pad(gradient[..., 2 * k:], (2 * k, 0)))
    leave.requires_grad_(False)
    return unet
