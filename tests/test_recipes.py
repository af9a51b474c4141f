"""Recipes, guidance and image to image, compared with the same formulas in double precision."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import noise
from torch import nn

import sampler
from sampler import RECIPES, Recipe

SHAPE, STEPS = (3, 4, 5), 6
AT_0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
TIMES = [1 - i / STEPS for i in range(STEPS + 1)]


class KnownUNet(nn.Module):
    """Answers with a known function of its arguments, and keeps the times and the number of rows it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.times, self.rows = [], []

    def forward(self, x, r, push):
        self.times.append(r[0].item())
        self.rows.append(len(x))
        return answer(x, r[:, None, None, None], push)


def answer(x, r, push):
    return 0.7 * x + push * (0.5 + r) + x / (1 + x ** 2)


def push(rows):
    return noise(rows, *SHAPE, seed=3)


def run(guidance, recipe, condition=None, **start):
    """Two images: the network and all (x, x0)."""
    unet, generators = KnownUNet(), sampler.generators(5, 2)
    condition = push(4 if guidance > 1 else 2) if condition is None else condition
    settings = STEPS, guidance, generators, recipe
    return unet, list(sampler.sample(unet, SHAPE, {"push": condition}, *settings, **start))


def draws():
    """What two generators give: the first latents, then the noise of every step."""
    generators = [torch.Generator("cpu").manual_seed(5 + i) for i in range(2)]
    return [np.stack([torch.randn(SHAPE, generator=generator).double().numpy() for generator in generators])
            for _ in range(STEPS + 1)]


def alpha_bar(t):
    return min(max(math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / AT_0, 0.0001), 0.9999)


def inverse_alpha_bar(a):
    return math.acos(math.sqrt(a * AT_0)) / (math.pi / 2) * 1.008 - 0.008


def close(ours, theirs, tolerance=1e-5):
    return np.abs(ours.numpy() - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_original_recipe(shift, guidance):
    """In the original's own terms: log SNR, DDIM with eta = 1, guidance rescaled for each image, x0 as the result."""
    recipe = replace(RECIPES["original"], shift=shift)
    unet, pairs = run(guidance, recipe)
    (x, *step_noise), known = draws(), push(4).double().numpy()
    low, high, *log_snr = (math.log(a / (1 - a)) for a in (0.0001, 0.9999, *map(alpha_bar, TIMES)))
    log_snr = np.clip(np.array(log_snr) + 2 * math.log(1 / shift), low, high)
    a, b = (np.sqrt(1 / (1 + np.exp(sign * log_snr))) for sign in (-1, 1))
    r = [inverse_alpha_bar(value ** 2) for value in a]
    for i in range(STEPS):
        eps = cond = answer(x, r[i], known[:2] if guidance > 1 else push(2).double().numpy())
        if guidance > 1:
            eps = answer(x, r[i], known[2:]) * (1 - guidance) + cond * guidance
            for n in range(2):
                eps[n] *= 0.7 * cond[n].std(ddof=1) / eps[n].std(ddof=1) + 0.3
        x0 = (x - b[i] * eps) / a[i]
        sigma = b[i + 1] / b[i] * math.sqrt(1 - a[i] ** 2 / a[i + 1] ** 2)
        x = a[i + 1] * x0 + math.sqrt(b[i + 1] ** 2 - sigma ** 2) * eps
        x = x + sigma * step_noise[i] * (i < STEPS - 1)
        assert close(pairs[i][0], x) and close(pairs[i][1], x0), i
    assert unet.times == pytest.approx(r[:-1], abs=2e-5)
    assert recipe.return_x0 and recipe.rescale == 0.7
    assert (RECIPES["original"].shift, RECIPES["original"].decoder_shift) == (2.0, 1.0)


def test_lcm_jumps_to_x0_and_reads_its_times_back():
    """At t = 1 and below, where alpha_bar is clamped, the network is given the time that belongs to the clamped value,
    as in the original code."""
    unet, pairs = run(1.0, RECIPES["lcm"])
    (x, *step_noise), known = draws(), push(2).double().numpy()
    r = [inverse_alpha_bar(alpha_bar(t)) for t in TIMES]
    for i in range(STEPS):
        a, a_next = alpha_bar(TIMES[i]), alpha_bar(TIMES[i + 1])
        x0 = (x - math.sqrt(1 - a) * answer(x, r[i], known)) / math.sqrt(a)
        x = math.sqrt(a_next) * x0 + (math.sqrt(1 - a_next) * step_noise[i] if i < STEPS - 1 else 0)
        assert close(pairs[i][0], x) and close(pairs[i][1], x0), i
    assert unet.times == pytest.approx(r[:-1], abs=2e-5) and abs(unet.times[0] - 1) > 1e-3


def test_guidance_is_applied_within_its_interval_only():
    """Outside, the network runs once per image, on the conditional rows alone."""
    unet, pairs = run(4.0, Recipe(interval=(0.3, 0.7)))
    assert unet.rows == [4 if 0.3 <= t <= 0.7 else 2 for t in TIMES[:-1]] and len(set(unet.rows)) == 2
    _, everywhere = run(4.0, Recipe(interval=(0.0, 1.0)))
    assert torch.equal(run(4.0, Recipe())[1][-1][0], everywhere[-1][0])
    _, nowhere = run(4.0, Recipe(interval=(0.99, 0.99)))
    _, plain = run(1.0, Recipe(), push(4)[:2])
    assert torch.equal(nowhere[-1][0], plain[-1][0])
    assert not torch.allclose(pairs[-1][0], plain[-1][0], atol=1e-2)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_an_init_latent_is_noised_to_its_strength(strength):
    init_latent = noise(1, *SHAPE, seed=8)
    unet, pairs = run(1.0, Recipe(), init_latent=init_latent, strength=strength)
    a = alpha_bar(strength)
    x = math.sqrt(a) * init_latent.double().numpy() + math.sqrt(1 - a) * draws()[0]
    assert unet.times == pytest.approx([strength * t for t in TIMES[:-1]], abs=1e-6)
    x0 = (x - math.sqrt(1 - a) * answer(x, strength, push(2).double().numpy())) / math.sqrt(a)
    assert close(pairs[0][1], x0)
