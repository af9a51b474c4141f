"""The pages for those who port: what they say is what a run says."""

import numpy as np
import operators
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sampler import alpha_bar, ddpm, draw, generators, timesteps

OUTDATED = "out of date: python tests/operators.py writes it anew"


def test_the_operator_list_is_what_running_the_networks_gives():
    assert operators.PAGE.read_text(encoding="utf-8") == operators.operators(), OUTDATED


def test_the_schedules_tables_are_what_the_sampler_gives():
    page = operators.PORTING.read_text(encoding="utf-8")
    assert page == operators.with_schedule(page), OUTDATED


@pytest.mark.parametrize("steps", [20, 10])
def test_a_step_in_fp32_is_what_its_row_of_the_table_says(steps):
    torch.manual_seed(0)
    rows = [[float(cell) for cell in line.split("|")[2:-1]] for line in operators.schedule().splitlines()
            if line.count("|") == 7 and line.split("|")[1].strip().isdigit() and line.split("|")[4].strip()]
    rows = rows[:20] if steps == 20 else rows[20:]
    assert len(rows) == steps
    a = alpha_bar(timesteps(steps))
    for i, (t, now, of_x, of_epsilon, of_noise) in enumerate(rows):
        x, epsilon, noise = torch.randn(3, 1000)
        stepped = ddpm(x, epsilon, noise * (i < steps - 1), a[i], a[i + 1])
        assert abs(timesteps(steps)[i] - t) < 1e-7 and abs(a[i] - now) < 1e-6
        assert torch.allclose(stepped, of_x * x + of_epsilon * epsilon + of_noise * noise, rtol=0, atol=1e-4)


def test_the_noise_can_be_drawn_without_pytorch():
    """As PORTING.md tells: MT19937 and Box-Muller, sixteen values at a time."""
    sources, twister = generators(7, 1), np.random.RandomState(7)
    for shape in ((16, 3, 3), (4, 32, 32)):
        bits = np.frombuffer(twister.bytes(4 * np.prod(shape)), dtype="<u4")
        u = (bits % 2**24 / 2**24).reshape(-1, 2, 8)
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), 2 * np.pi * u[:, 1]
        noise = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape)
        assert np.abs(draw(sources, shape, "cpu")[0].numpy() - noise).max() < 1e-5


@pytest.mark.parametrize("title", ["Stage C lite", "Stage A, decoding", "Semantic encoder", "Previewer"])
def test_the_flops_are_those_that_pytorch_counts(title):
    _, record, _ = operators.run(title)
    with FlopCounterMode(display=False) as counter:
        operators.run(title)
    assert sum(row.flops for row in record.rows.values()) == counter.get_total_flops()


def test_the_peak_is_that_of_the_storages_alive():
    record = operators.Record()
    with torch.inference_mode(), record:
        x = torch.empty(1000, device="meta")            # 4000 bytes
        y = (x + 1)[:10]                                # 8000: the slice holds them all
        del x                                           # 4000
        y = y * 2                                       # 4040, then 40
    assert (record.peak, record.live) == (8000, 40)


@pytest.mark.parametrize("trap, call", [
    ("exact, with erf", lambda x: F.gelu(x)),
    ("", lambda x: F.gelu(x, approximate="tanh")),
    ("corners aligned", lambda x: F.interpolate(x, (9, 9), mode="bilinear", align_corners=True)),
    ("", lambda x: F.interpolate(x, (9, 9), mode="bilinear", align_corners=False)),
    ("edges replicated", lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")),
    ("", lambda x: F.pad(x, (1, 1, 1, 1))),
    ("GRN: over all positions, cannot be tiled", lambda x: x.sum((1, 2))),
    ("", lambda x: x.sum(-1)),
    ("stays fp32", lambda x: x.float()),
])
def test_a_trap_is_read_off_the_arguments(trap, call):
    with torch.inference_mode(), operators.Record() as record:
        call(torch.empty(1, 4, 8, 8, device="meta", dtype=torch.bfloat16))
    assert [key[-1] for key in record.rows][-1] == trap
