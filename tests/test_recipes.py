"""Recipes, guidance and starts of the sampler, against the same mathematics worked out anew in double precision."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sampler

SHAPE, STEPS = (3, 4, 5), 6


class Unet(nn.Module):
    """Answers with a known function of what it is given, and remembers the times it was told."""

    def __init__(self):
        super().__init__()
        self.clf, self.told, self.rows = nn.ModuleList([nn.Identity(), nn.Linear(1, 1)]), [], []

    def prepare(self, **condition):
        return condition

    def forward(self, x, r, push):
        self.told.append(r[0].item()), self.rows.append(len(x))
        return answer(x, r[:, None, None, None], push)


def answer(x, r, push):
    return 0.7 * x + push * (0.5 + r) + x / (1 + x**2)


def push(rows):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(3))


def run(guidance, recipe, images=2, **start):
    unet, condition = Unet(), {"push": push(images * (2 if guidance > 1 else 1))}
    sources = sampler.generators(5, images)
    return unet, list(sampler.sample(unet, SHAPE, condition, STEPS, guidance, sources, recipe, **start))


def drawn(images=2):
    """What the generators give: the start, then the noise of every step."""
    sources = [torch.Generator("cpu").manual_seed(5 + i) for i in range(images)]
    return [torch.stack([torch.randn(SHAPE, generator=one) for one in sources]).numpy() for _ in range(STEPS + 1)]


def plain_alpha_bar(t):
    value = math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return min(max(value, 0.0001), 0.9999)


def close(ours, theirs, relative=1e-5):
    return np.abs(ours.numpy() - theirs).max() <= relative * np.abs(theirs).max()


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_original_recipe(shift, guidance):
    """In the original's own terms: logSNR, DDIM with eta = 1, guidance rescaled for each picture, x0 out."""
    recipe = replace(sampler.RECIPES["original"], shift=shift)
    unet, pairs = run(guidance, recipe)
    noise = drawn()
    x, known, r_told = noise[0].astype(np.float64), push(4 if guidance > 1 else 2).double().numpy(), []
    low, high = (math.log(a / (1 - a)) for a in (0.0001, 0.9999))
    snr = []
    for i in range(STEPS + 1):
        a = plain_alpha_bar(1 - i / STEPS)
        snr.append(min(max(math.log(a / (1 - a)) + 2 * math.log(1 / shift), low), high))
    for i in range(STEPS):
        variance = 1 / (1 + math.exp(-snr[i]))
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        r = math.acos(math.sqrt(variance * start)) / (math.pi / 2) * 1.008 - 0.008
        r_told.append(r)
        epsilon = answer(x, r, known[:2])
        if guidance > 1:
            positive = epsilon
            epsilon = answer(x, r, known[2:]) * (1 - guidance) + positive * guidance
            for n in range(2):
                size = positive[n].std(ddof=1) / epsilon[n].std(ddof=1)
                epsilon[n] = 0.7 * epsilon[n] * size + 0.3 * epsilon[n]
        a, b = (math.sqrt(1 / (1 + math.exp(-sign * snr[i]))) for sign in (1, -1))
        a_next, b_next = (math.sqrt(1 / (1 + math.exp(-sign * snr[i + 1]))) for sign in (1, -1))
        x0 = (x - b * epsilon) / a
        sigma = b_next / b * math.sqrt(1 - a**2 / a_next**2)
        x = a_next * x0 + math.sqrt(b_next**2 - sigma**2) * epsilon
        x = x + sigma * noise[i + 1] * (i < STEPS - 1)
        assert close(pairs[i][0], x) and close(pairs[i][1], x0), i
    assert unet.told == pytest.approx(r_told, abs=2e-5)
    assert recipe.ends_clean and recipe.rescale == 0.7 and sampler.RECIPES["original"].shift == 2.0


def test_a_picture_of_the_original_recipe_does_not_depend_on_its_neighbours():
    recipe = sampler.RECIPES["original"]
    known = push(4)
    both = list(sampler.sample(Unet(), SHAPE, {"push": known}, STEPS, 4.0, sampler.generators(5, 2), recipe))[-1][1]
    one = {"push": known[1::2]}
    alone = list(sampler.sample(Unet(), SHAPE, one, STEPS, 4.0, sampler.generators(6, 1), recipe))[-1][1]
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_lcm():
    _, pairs = run(1.0, sampler.RECIPES["lcm"])
    noise, known = drawn(), push(2).double().numpy()
    x = noise[0].astype(np.float64)
    for i in range(STEPS):
        t, a, a_next = 1 - i / STEPS, plain_alpha_bar(1 - i / STEPS), plain_alpha_bar(1 - (i + 1) / STEPS)
        x0 = (x - math.sqrt(1 - a) * answer(x, t, known)) / math.sqrt(a)
        x = math.sqrt(a_next) * x0 + (math.sqrt(1 - a_next) * noise[i + 1] if i < STEPS - 1 else 0)
        assert close(pairs[i][0], x) and close(pairs[i][1], x0), i


def test_guidance_keeps_to_its_interval():
    """Outside, the network runs once per picture, on what is wanted alone."""
    recipe = sampler.Recipe(interval=(0.3, 0.7))
    unet, pairs = run(4.0, recipe)
    times = [1 - i / STEPS for i in range(STEPS)]
    assert unet.rows == [4 if 0.3 <= t <= 0.7 else 2 for t in times] and len(set(unet.rows)) == 2
    assert torch.equal(run(4.0, sampler.Recipe())[1][-1][0], run(4.0, sampler.Recipe(interval=(0.0, 1.0)))[1][-1][0])
    never = run(4.0, sampler.Recipe(interval=(0.99, 0.99)))[1]
    plain = list(sampler.sample(Unet(), SHAPE, {"push": push(4)[:2]}, STEPS, 1.0, sampler.generators(5, 2)))
    assert torch.equal(never[-1][0], plain[-1][0]) and not torch.allclose(pairs[-1][0], plain[-1][0], atol=1e-2)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_a_start_is_noised_to_its_strength(strength):
    start = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(8))
    unet, pairs = run(1.0, sampler.Recipe(), start=start, strength=strength)
    a, noise = plain_alpha_bar(strength), drawn()
    x = math.sqrt(a) * start.double().numpy() + math.sqrt(1 - a) * noise[0]
    assert unet.told == pytest.approx([strength * (1 - i / STEPS) for i in range(STEPS)], abs=1e-6)
    x0 = (x - math.sqrt(1 - a) * answer(x, strength, push(2).double().numpy())) / math.sqrt(a)
    assert close(pairs[0][1], x0)


def test_a_time_can_be_read_back():
    t = torch.linspace(0.01, 0.99, 50)
    assert torch.allclose(sampler.time_of(sampler.alpha_bar(t)), t, atol=1e-4)
