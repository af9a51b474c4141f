"""The sampler is diffusers' DDPMWuerstchenScheduler, step by step."""

import pytest
import torch
from peers import assert_same, scheduler

import sampler


def test_alpha_bar_is_the_schedulers():
    t = torch.linspace(0, 1, 1001)
    theirs = scheduler()._alpha_cumprod(t, torch.device("cpu"))
    assert ((sampler.alpha_bar(t) - theirs).abs() <= 1e-6).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 60])
def test_every_step_is_the_schedulers(steps):
    """The same predictions, noise from the same generators in the same order: one for the start, one in every step."""
    peer, shape = scheduler(), (4, 6, 5)
    peer.set_timesteps(steps)
    assert torch.equal(sampler.timesteps(steps), peer.timesteps)
    ours, theirs = sampler.generators(5, 3), [torch.Generator("cpu").manual_seed(5 + i) for i in range(3)]
    x = sampler.draw(ours, shape, "cpu")
    y = torch.cat([torch.randn(1, *shape, generator=source) for source in theirs])
    assert torch.equal(x, y)
    for t, t_next in zip(peer.timesteps[:-1], peer.timesteps[1:]):
        epsilon = torch.randn(3, *shape, generator=torch.Generator().manual_seed(int(1000 * t)))
        noise = sampler.draw(ours, shape, "cpu") * (t_next > 0)
        x = sampler.ddpm(x, epsilon, noise, sampler.alpha_bar(t), sampler.alpha_bar(t_next))
        y = peer.step(epsilon, t.expand(3), y, generator=theirs).prev_sample
        assert_same(x, y, 1e-6)
        y = x  # every step is compared by itself
    for a, b in zip(ours, theirs):  # the last step drew as well
        assert torch.equal(torch.randn(20, generator=a), torch.randn(20, generator=b))
