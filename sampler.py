"""The Würstchen sampler: DDPM on a continuous cosine schedule, with classifier-free guidance.

Time runs from t = 1 (pure noise) to t = 0 (no noise). A latent at time t is

    x = sqrt(a) x0 + sqrt(1 - a) eps        with a = alpha_bar(t) and Gaussian noise eps            (DDPM, eq. 4)

and the network predicts eps. Schedule, times, noise and latents are fp32, whatever the type of the weights.

Three recipes: "diffusers" (its DDPMWuerstchenScheduler, the default), "original" (the code released with the model)
and "lcm" (for networks distilled to few steps). The letters in shape comments are explained in model.py.

Sources: Ho et al., DDPM (2020), arXiv 2006.11239; Nichol and Dhariwal, the cosine schedule (2021), arXiv 2102.09672;
Ho and Salimans, classifier-free guidance (2022), arXiv 2207.12598; Lin et al., guidance rescale (2023), arXiv
2305.08891; Kynkäänniemi et al., guidance in an interval (2024), arXiv 2404.07724; Luo et al., LCM (2023), arXiv
2310.04378; Lugmayr et al., RePaint (2022), arXiv 2201.09865; the original code of Stable Cascade.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

OFFSET = 0.008                                              # s of the cosine schedule
COS2_AT_0 = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
ALPHA_BAR_MIN, ALPHA_BAR_MAX = 0.0001, 0.9999


# ---------------------------------------------------------------------------------------------------- the schedule
def alpha_bar(t: Tensor) -> Tensor:
    """The fraction of the signal's variance left at time t, elementwise (Nichol and Dhariwal, eq. 17)."""
    a = torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2 / COS2_AT_0
    return a.clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)


def inverse_alpha_bar(a: Tensor) -> Tensor:
    """The time t at which alpha_bar(t) = a."""
    return torch.acos((a * COS2_AT_0).sqrt()) / (math.pi / 2) * (1 + OFFSET) - OFFSET


def timesteps(steps: int | list[float], strength: float = 1.0) -> Tensor:
    """steps + 1 evenly spaced times from `strength` down to 0, or the times given as a list: (steps + 1,), fp32, on the
    CPU."""
    if isinstance(steps, list):
        return torch.tensor(steps, dtype=torch.float32)
    return torch.linspace(strength, 0, steps + 1, dtype=torch.float32)


def noise_levels(t: Tensor, shift: float | None) -> tuple[Tensor, Tensor]:
    """Times -> (a, r): alpha_bar, and the time given to the network.

    Without a shift, a = alpha_bar(t) and r = t. With a shift, the log signal-to-noise ratio is lowered by 2 ln(shift),
    and r is recomputed from the new a. Even a shift of 1 changes r near t = 0 and t = 1, where alpha_bar is clamped.
    """
    a = alpha_bar(t)
    if shift is None:
        return a, t
    log_snr = torch.logit(a) - 2 * math.log(shift)
    a = torch.sigmoid(log_snr).clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)
    return a, inverse_alpha_bar(a)


# ---------------------------------------------------------------------------------------------------- one step
def add_noise(x0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """A latent at noise level a: DDPM, eq. 4."""
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def predict_x0(x: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """Knowing eps means knowing x0: DDPM, eq. 4, solved for x0."""
    return (x - (1 - a).sqrt() * eps) / a.sqrt()


def ddpm(x: Tensor, eps: Tensor, noise: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """One step of the reverse process, from noise level a to a_next."""
    alpha = a / a_next
    mean = (x - (1 - alpha) / (1 - a).sqrt() * eps) / alpha.sqrt()              # DDPM, eq. 11
    variance = (1 - alpha) * (1 - a_next) / (1 - a)                             # DDPM, eq. 7
    return mean + variance.sqrt() * noise


def lcm(x: Tensor, eps: Tensor, noise: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """Jump to the predicted x0, then add fresh noise to reach level a_next (LCM, algorithm 3)."""
    return add_noise(predict_x0(x, eps, a), noise, a_next)


def guide(cond: Tensor, uncond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022, eq. 6): move from the unconditional prediction towards the
    conditional one and beyond; `guidance` is the paper's w + 1. `rescale` pulls the standard deviation back to the
    conditional one's (Lin et al., 2023, section 3.4), image by image."""
    eps = uncond + guidance * (cond - uncond)                                   # (N, C, H, W)
    if rescale:
        std_ratio = cond.std((1, 2, 3), keepdim=True) / eps.std((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
        eps = eps * (1 + rescale * (std_ratio - 1))
    return eps


# ---------------------------------------------------------------------------------------------------- recipes
@dataclass(frozen=True)
class Recipe:
    """How to sample; the defaults are diffusers'."""
    step: Callable = ddpm
    shift: float | None = None                              # of Stage C's noise levels; None: no shift
    decoder_shift: float | None = None                      # the same for Stage B
    rescale: float = 0.0                                    # strength of the guidance rescale, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)              # guidance is applied at these times, bounds included
    return_x0: bool = False                                 # return the last x0 instead of the last x
    decoder_guidance: float = 0.0                           # Stage B's default guidance scale


RECIPES = {
    "diffusers": Recipe(),
    "original": Recipe(
        shift=2.0, decoder_shift=1.0, rescale=0.7, return_x0=True, decoder_guidance=1.1),
    "lcm": Recipe(step=lcm, shift=1.0, decoder_shift=1.0),
}


# ---------------------------------------------------------------------------------------------------- the loop
def generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator per image, seeded with seed, seed + 1, …, so that an image does not depend on its batch. They live
    on the CPU, so that it does not depend on the device either."""
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def draw_noise(noise_generators: list[torch.Generator], shape: tuple, device) -> Tensor:
    """Gaussian noise (N, *shape), fp32; each generator draws one latent."""
    noise = []
    for generator in noise_generators:
        noise.append(torch.randn(shape, generator=generator, dtype=torch.float32))
    return torch.stack(noise).to(device, non_blocking=str(device).startswith("cuda"))  # the CPU need not wait


def sample(unet, shape: tuple, condition: dict[str, Tensor], steps: int | list[float], guidance: float,
           noise_generators: list[torch.Generator], recipe: Recipe = Recipe(),
           init_latent: Tensor | None = None, strength: float = 1.0, mask: Tensor | None = None,
           control: dict[int, Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoise N latents. Yields (x, x0) after every step: the latents and the predicted clean latents, (N, *shape) each,
    fp32.

    unet                Stage B or Stage C
    shape               (C, H, W) of one latent
    condition           arguments of the unet by name: N conditional rows, then N unconditional rows (the latter are
                        needed only if guidance > 1)
    steps               their number, or a list of decreasing times
    guidance            guidance scale; no guidance if <= 1
    noise_generators    N generators; each draws once for the initial noise and once per step
    init_latent         (N or 1, *shape), image to image: start from this latent, noised to t = strength
    mask                (1, 1, H, W), bool, latent inpainting: only where it is True does the initial latent change
    control             a ControlNet's output, the same in every step and in all rows
    """
    weight = next(unet.parameters())  # its device and type are the network's
    condition = {name: value.to(weight) for name, value in condition.items()}
    if control is not None:
        control = {block: value.to(weight) for block, value in control.items()}
        unet = partial(unet, control=control)
    low, high = recipe.interval
    t = timesteps(steps, strength)
    steps = len(t) - 1
    a, r = noise_levels(t, recipe.shift)
    a, r = a.to(weight.device), r.to(weight.device)
    x = draw_noise(noise_generators, shape, weight.device)                      # (N, C, H, W)
    if init_latent is not None:
        init_latent = init_latent.to(x)
        x = add_noise(init_latent, x, a[0])
    if mask is not None:
        mask = mask.to(weight.device)

    for i in range(steps):
        guided = guidance > 1 and low <= t[i] <= high
        rows = torch.cat([x, x]) if guided else x                               # (2N or N, C, H, W)
        inputs = {name: value[:len(rows)] for name, value in condition.items()}
        eps = unet(rows.to(weight), r[i].expand(len(rows)), **inputs).float()   # (2N or N, C, H, W)
        if guided:
            cond, uncond = eps.chunk(2)
            eps = guide(cond, uncond, guidance, recipe.rescale)                 # (N, C, H, W)
        x0 = predict_x0(x, eps, a[i])
        noise = draw_noise(noise_generators, shape, weight.device)              # drawn in the last step too
        if i == steps - 1:
            noise = torch.zeros_like(noise)
        x = recipe.step(x, eps, noise, a[i], a[i + 1])
        if mask is not None:                                                # latent inpainting: RePaint, eq. 8
            x0 = torch.where(mask, x0, init_latent)
            x = torch.where(mask, x, add_noise(init_latent, noise, a[i + 1]))
        yield x, x0
