"""The Wuerstchen sampler: DDPM on a continuous cosine schedule, with guidance, as diffusers' DDPMWuerstchenScheduler.

Time runs from t = 1 (pure noise) to t = 0 (none). A latent at time t is

    x = sqrt(a) x0 + sqrt(1 - a) epsilon        with a = alpha_bar(t)                   (DDPM, eq. 4)

and the network predicts epsilon. Schedule, times, noise and latents are fp32, whatever the type of the weights.

Letters: B pictures, C channels, y x the sides of the latent.

Sources: Ho et al., DDPM (2020), arXiv 2006.11239; Nichol and Dhariwal, the cosine schedule (2021), arXiv 2102.09672;
Ho and Salimans, guidance (2022), arXiv 2207.12598.
"""
import math

import torch

OFFSET = 0.008                                          # s of the cosine schedule


def alpha_bar(t):
    """What is left of the signal's variance at time t (fp32, any shape); between 0.0001 and 0.9999. (Nichol, eq. 17)"""
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
    return (torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2 / start).clamp(0.0001, 0.9999)


def timesteps(steps):
    """The steps + 1 times from 1 to 0 between which the sampler walks."""
    return torch.linspace(1, 0, steps + 1)


def step(x, epsilon, noise, t, t_next):
    """One step of the reverse process, from time t to t_next (fp32 scalars). No noise is added on the way to 0."""
    now, then = alpha_bar(t), alpha_bar(t_next)
    alpha = now / then
    mean = (x - (1 - alpha) / (1 - now).sqrt() * epsilon) / alpha.sqrt()                # DDPM, eq. 11
    variance = (1 - alpha) * (1 - then) / (1 - now)                                     # DDPM, eq. 7
    return mean + variance.sqrt() * noise * (t_next > 0)


def generators(seed, count):
    """One source of noise per picture, seeded seed, seed + 1, ...: a picture does not depend on its neighbours. They
    live on the CPU, so it does not depend on the device either."""
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def draw(sources, shape, device):
    """Gaussian noise (B, *shape) in fp32, one picture from each source."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)


def sample(unet, shape, condition, steps, guidance, sources):
    """Yields every latent (B, *shape), fp32, from the noisiest to the last.

    unet        Stage B or Stage C
    shape       (C, y, x) of one latent
    condition   the unet's other arguments by name. With guidance above 1 each has 2B rows, first those of what is
                wanted, then those of what is not; else B rows
    sources     one generator per picture: drawn from once for the start and once in every step
    """
    weight = unet.clf[1].weight                         # says the type and the device of the network
    condition = {name: value.to(weight) for name, value in condition.items()}
    x = draw(sources, shape, weight.device)                                             # (B, C, y, x)
    times = timesteps(steps).to(weight.device)
    for t, t_next in zip(times[:-1], times[1:]):
        rows = torch.cat([x, x]) if guidance > 1 else x                                 # (2B or B, C, y, x)
        epsilon = unet(rows.to(weight), t.expand(len(rows)), **condition).float()
        if guidance > 1:
            wanted, unwanted = epsilon.chunk(2)                                         # each (B, C, y, x)
            epsilon = unwanted + guidance * (wanted - unwanted)
        x = step(x, epsilon, draw(sources, shape, weight.device), t, t_next)
        yield x
