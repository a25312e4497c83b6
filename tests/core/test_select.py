"""What slots are ranked by, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from d2o_dist.core.select import ranking_rates
from d2o_dist.policy.score import decaying_mean
from d2o_dist.slots.slots import Slots
from tests.spec import spec


def naive_decaying_mean(rates: list[float], positions: list[int], reach: float, first: int) -> list[float]:
    out = []
    for i, here in enumerate(positions):
        total = 0.0
        for j in range(i + 1):
            if positions[j] >= first:
                total += rates[j] * math.exp((positions[j] - here) / reach)
        out.append(total * -math.expm1(-1 / reach) if here >= first else rates[i])
    return out


def ragged(lengths: list[int], heads: int, gap: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rates over many orders of magnitude, a quarter of them 0, and positions with gaps; unused slots last."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), heads, max(lengths))
    rates = 10 ** (9 * torch.rand(shape, generator=generator, dtype=torch.float64) - 9)
    rates = rates * (torch.rand(shape, generator=generator) > 0.25)
    positions = torch.randint(1, gap + 1, shape, generator=generator).cumsum(-1) - 1
    unused = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None, None]
    return rates.masked_fill(unused, 0), positions.masked_fill(unused, -1)


@pytest.mark.parametrize("reach", [0.01, 1.0, 20.0, 1e6])
@pytest.mark.parametrize("first", [0, 4, 1000])
@pytest.mark.parametrize("gap", [1, 40])
def test_decaying_mean_equals_the_loops(reach, first, gap):
    lengths = [57, 1, 33]
    rates, positions = ragged(lengths, 2, gap, seed=7)
    found = decaying_mean(rates, positions, reach, first)
    for row, count in enumerate(lengths):
        for head in range(2):
            args = rates[row, head, :count].tolist(), positions[row, head, :count].tolist()
            expected = torch.tensor(naive_decaying_mean(*args, reach, first), dtype=torch.float64)
            torch.testing.assert_close(found[row, head, :count], expected, rtol=1e-11, atol=0)


def test_nothing_before_the_first_peak_and_what_is_left_of_it_far_away():
    rates = torch.zeros(1, 1, 2000, dtype=torch.float64)
    rates[..., 5] = 1.0
    found = decaying_mean(rates, torch.arange(2000)[None, None], 20.0, 4)[0, 0]
    assert (found[:5] == 0).all()
    expected = torch.exp(-torch.arange(1995, dtype=torch.float64) / 20) * -math.expm1(-1 / 20)
    torch.testing.assert_close(found[5:], expected, rtol=1e-12, atol=0)


def test_far_positions_lose_no_precision():
    """At a million positions `exp(position / reach)` is far beyond any float."""
    rates, positions = ragged([500], 1, 3, seed=3)
    far = decaying_mean(rates, positions + 1_000_000, 5.0, 4)
    near = naive_decaying_mean(rates[0, 0].tolist(), positions[0, 0].tolist(), 5.0, 0)
    torch.testing.assert_close(far[0, 0], torch.tensor(near, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_mean_of_equal_rates_is_that_rate():
    rates = torch.full((1, 1, 3000), 0.25, dtype=torch.float64)
    found = decaying_mean(rates, torch.arange(3000)[None, None], 20.0, 0)[0, 0, 1000:]
    torch.testing.assert_close(found, rates[0, 0, 1000:], rtol=1e-11, atol=0)


def test_float32_rates_are_summed_in_float64():
    rates, positions = ragged([300, 200], 2, 2, seed=5)
    wide = decaying_mean(rates.float().double(), positions, 20.0, 4)
    found = decaying_mean(rates.float(), positions, 20.0, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, wide.float())


def test_sinks_lend_nothing_and_recent_queries_rank_as_they_stand():
    count = 40
    rates = torch.full((1, 1, count), 1e-9)
    rates[..., 0] = 0.9
    rates[..., 20] = 0.1
    nothing = torch.zeros(1, 1, count)
    slots = Slots(torch.zeros(1, 1, count, 2), torch.zeros(1, 1, count, 2), torch.arange(count)[None, None],
                  nothing, rates, nothing)  # fmt: skip
    config = spec(selection_reach=8.0)

    def rank(finalize: bool) -> torch.Tensor:
        pooled = ranking_rates(slots, config, finalize=finalize)
        return config.score.rank(slots, pooled, torch.tensor([count]))

    ranking = rank(finalize=True)[0, 0]
    assert ranking[4:].argmax() == 16 and float(ranking[4:20].max()) < 1e-7
    assert (ranking[21:].diff() < 0).all()
    assert torch.equal(rank(finalize=False), rates)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "20"])
def test_a_reach_that_is_no_length_is_refused(value):
    with pytest.raises(ValueError, match=r"score.reach \(.*\) must be (above 0|a finite number)"):
        spec(selection_reach=value)
