"""The sampler is diffusers' DDPMWuerstchenScheduler, step by step."""
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from helpers import assert_same, noise

import sampler


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 60])
def test_every_step_is_the_schedulers(steps):
    """The same predictions; noise from the same generators in the same order: the first latent, then every step."""
    peer, shape = DDPMWuerstchenScheduler(), (4, 6, 5)
    peer.set_timesteps(steps)
    assert torch.equal(sampler.timesteps(steps), peer.timesteps)
    ours, theirs = sampler.generators(5, 3), [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
    x = sampler.draw_noise(ours, shape, "cpu")
    assert torch.equal(x, torch.cat([torch.randn(1, *shape, generator=generator) for generator in theirs]))
    for i, (t, t_next) in enumerate(zip(peer.timesteps[:-1], peer.timesteps[1:])):
        eps = noise(3, *shape, seed=i)
        step_noise = sampler.draw_noise(ours, shape, "cpu") * (t_next > 0)
        y = peer.step(eps, t.expand(3), x, generator=theirs).prev_sample
        x = sampler.ddpm(x, eps, step_noise, sampler.alpha_bar(t), sampler.alpha_bar(t_next))
        assert_same(x, y, 1e-6)
    for a, b in zip(ours, theirs):                      # the last step drew as well
        assert torch.equal(torch.randn(20, generator=a), torch.randn(20, generator=b))
