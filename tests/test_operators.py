"""The porter's pages hold what a run gives."""
import operators
import pytest
import torch
from helpers import slow_except
from pages import OPERATORS_PAGE, PORTING_PAGE, with_section
from torch.utils.flop_counter import FlopCounterMode

OUTDATED = "out of date: run python tests/porting/operators.py"


@pytest.mark.slow
def test_the_operator_list_is_what_running_the_networks_gives():
    page = OPERATORS_PAGE.read_text("utf-8")
    assert page == with_section(page, "operators", operators.operators_page()), OUTDATED


def test_the_schedule_is_what_the_sampler_gives():
    page = PORTING_PAGE.read_text("utf-8")
    assert page == with_section(page, "schedule", operators.schedule()), OUTDATED


TITLES = ["Stage C lite", "Stage A, decoding", "Semantic encoder", "Previewer"]


@pytest.mark.parametrize("title", slow_except(TITLES, "Previewer"))
def test_the_flops_are_those_that_pytorch_counts(title):
    _, record, _ = operators.run(title)
    with FlopCounterMode(display=False) as counter:
        operators.run(title)
    assert record.total["flops"] == counter.get_total_flops()


def test_the_peak_counts_the_storages_that_are_alive():
    with torch.inference_mode(), operators.Record() as record:
        x = torch.empty(1000, device="meta")            # 4000 bytes
        y = (x + 1)[:10]                                # 8000: the slice holds all of them
        del x                                           # 4000
        y = y * 2                                       # 4040, then 40
    assert (record.peak, record.live_bytes) == (8000, 40)
    assert record.peak_at == "add" and record.peak_shapes == {"1000": 8000}
