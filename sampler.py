"""The Wuerstchen sampler: DDPM on a continuous cosine schedule, with guidance. Three recipes: diffusers' (its
DDPMWuerstchenScheduler), the original code's, and LCM's.

Time runs from t = 1 (pure noise) to t = 0 (none). A latent at time t is

    x = sqrt(a) x0 + sqrt(1 - a) epsilon        with a = alpha_bar(t)                   (DDPM, eq. 4)

and the network predicts epsilon. Schedule, times, noise and latents are fp32, whatever the type of the weights.

Letters: B pictures, C channels, y x the sides of the latent.

Sources: Ho et al., DDPM (2020), arXiv 2006.11239; Nichol and Dhariwal, the cosine schedule (2021), arXiv 2102.09672;
Ho and Salimans, guidance (2022), arXiv 2207.12598; Lin et al., its rescaling (2023), arXiv 2305.08891; Kynkaanniemi et
al., its interval (2024), arXiv 2404.07724; Luo et al., LCM (2023), arXiv 2310.04378; the code of Stable Cascade.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

OFFSET = 0.008                                          # s of the cosine schedule
START = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
LEAST, MOST = 0.0001, 0.9999                            # of alpha_bar


def alpha_bar(t):
    """What is left of the signal's variance at time t (fp32, any shape). (Nichol, eq. 17)"""
    return (torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2 / START).clamp(LEAST, MOST)


def time_of(a):
    """The t of an alpha_bar."""
    return torch.acos((a * START).sqrt()) / (math.pi / 2) * (1 + OFFSET) - OFFSET


def timesteps(steps, strength=1.0):
    """The steps + 1 times, from `strength` to 0, between which the sampler walks."""
    return torch.linspace(strength, 0, steps + 1)                                       # (steps + 1,)


def ddpm(x, epsilon, noise, now, then):
    """One step of the reverse process, between two alpha_bars (fp32 scalars)."""
    alpha = now / then
    mean = (x - (1 - alpha) / (1 - now).sqrt() * epsilon) / alpha.sqrt()                # DDPM, eq. 11
    variance = (1 - alpha) * (1 - then) / (1 - now)                                     # DDPM, eq. 7
    return mean + variance.sqrt() * noise


def lcm(x, epsilon, noise, now, then):
    """A leap to x0 and, with new noise, back. For networks that were distilled to leap."""
    return then.sqrt() * clean(x, epsilon, now) + (1 - then).sqrt() * noise


def clean(x, epsilon, now):
    """x0, from the first equation above."""
    return (x - (1 - now).sqrt() * epsilon) / now.sqrt()


@dataclass(frozen=True)
class Recipe:
    """How to walk. The default is diffusers'."""
    step: Callable = ddpm
    shift: float | None = None                          # noise levels moved, and r read back from them
    rescale: float = 0.0                                # how much guidance gives back of the size that it adds, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)          # the times at which there is guidance
    ends_clean: bool = False                            # the result is the last x0, not the last x
    decoder_guidance: float = 0.0                       # Stage B's, where nobody says otherwise


RECIPES = {"diffusers": Recipe(), "lcm": Recipe(lcm),
           "original": Recipe(shift=2.0, rescale=0.7, ends_clean=True, decoder_guidance=1.1)}


def generators(seed, count):
    """One source of noise per picture, seeded seed, seed + 1, ...: a picture does not depend on its neighbours. They
    live on the CPU, so it does not depend on the device either."""
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def draw(sources, shape, device):
    """Gaussian noise (B, *shape) in fp32, one picture from each source."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)


def guide(wanted, unwanted, guidance, rescale):
    """From what is not wanted towards what is, and beyond: (B, C, y, x). Rescaled picture by picture."""
    epsilon = unwanted + guidance * (wanted - unwanted)
    if rescale:
        size = wanted.std((1, 2, 3), keepdim=True) / epsilon.std((1, 2, 3), keepdim=True)
        epsilon = epsilon * (1 + rescale * (size - 1))
    return epsilon


def sample(unet, shape, condition, steps, guidance, sources, recipe=Recipe(), start=None, strength=1.0):
    """Yields the latent and what is taken for x0, each (B, *shape), fp32, after every step.

    unet        Stage B or Stage C
    shape       (C, y, x) of one latent
    condition   the unet's other arguments by name: B rows for what is wanted, then, for guidance, B for what is not
    sources     one generator per picture: drawn from once for the start and once in every step
    start       a latent (B or 1, *shape) to start from, noised to t = strength, instead of noise alone
    """
    weight = unet.clf[1].weight                         # says the type and the device of the network
    condition = {name: value.to(weight) for name, value in condition.items()}
    prepared = {}                                       # with guidance and without: once a run, not once a step
    t = r = timesteps(steps, strength)                                                  # (steps + 1,)
    a = alpha_bar(t)
    if recipe.shift is not None:
        a = torch.sigmoid(torch.logit(a) - 2 * math.log(recipe.shift)).clamp(LEAST, MOST)
        r = time_of(a)
    a, r = a.to(weight.device), r.to(weight.device)
    x = draw(sources, shape, weight.device)                                             # (B, C, y, x)
    if start is not None:
        x = a[0].sqrt() * start.to(x) + (1 - a[0]).sqrt() * x
    for i in range(steps):
        guided = guidance > 1 and bool(recipe.interval[0] <= t[i] <= recipe.interval[1])
        rows = torch.cat([x, x]) if guided else x                                       # (2B or B, C, y, x)
        if guided not in prepared:
            prepared[guided] = unet.prepare(**{name: value[:len(rows)] for name, value in condition.items()})
        epsilon = unet(rows.to(weight), r[i].expand(len(rows)), **prepared[guided]).float()
        if guided:
            epsilon = guide(*epsilon.chunk(2), guidance, recipe.rescale)                # (B, C, y, x)
        x0 = clean(x, epsilon, a[i])
        noise = draw(sources, shape, weight.device) * (i < steps - 1)                   # none on the way to t = 0
        x = recipe.step(x, epsilon, noise, a[i], a[i + 1])
        yield x, x0                                                                     # each (B, C, y, x)
