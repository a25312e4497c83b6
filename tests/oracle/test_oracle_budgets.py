"""Dispersion and budgets of the oracle, by hand: sections 1 and 2 of the specification."""

from __future__ import annotations

import math

import pytest
import torch

from .naive_budgets import layer_dispersions, layer_slots, water_fill
from .naive_config import OracleConfig


def test_dispersions_by_hand():
    # Of mean 1, as column sums are; variances 1 and 4 in layer 0; 9 and 9 in layer 1.
    sums = [torch.tensor([[0.0, 1.0, 2.0], [-1.0, 1.0, 3.0]]), torch.tensor([[-2.0, 1.0, 4.0], [1.0, -2.0, 4.0]])]
    sums = [s.double() for s in sums]
    assert layer_dispersions(sums, "raw") == pytest.approx([2.5, 9.0])
    assert layer_dispersions(sums, "heads_minmax") == pytest.approx([0.5, 0.0], abs=1e-6)
    assert layer_dispersions(sums, "layers_minmax") == pytest.approx([0.0, 1.0], abs=1e-6)
    assert layer_dispersions(sums, "log_zscore") == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_water_filling_by_hand():
    def log(*weights):
        return [math.log(w) for w in weights]

    assert water_fill(log(1, 1, 2, 4), 0.5, 0.01, set()) == pytest.approx([0.25, 0.25, 0.5, 1.0])
    # Shares 1.6, .2, .1, .1 of 2: the first is fixed at 1, and the second takes its part of what is left.
    assert water_fill(log(16, 2, 1, 1), 0.5, 0.01, set()) == pytest.approx([1.0, 0.5, 0.25, 0.25])
    # Both clamps at once, excess 0.08 against shortfall 0.5: the minima first, and then no one is over 1.
    assert water_fill(log(54, 45, 0.5, 0.5), 0.5, 0.26, set()) == pytest.approx(
        [1.48 * 54 / 99, 1.48 * 45 / 99, 0.26, 0.26]
    )
    assert water_fill(log(1, 1, 1, 3), 0.5, 0.01, {0}) == pytest.approx([1.0, 0.2, 0.2, 0.6])
    with pytest.raises(ValueError, match="exceed"):
        water_fill(log(1, 1, 1, 1), 0.2, 0.01, {0})
    with pytest.raises(ValueError, match="exceed"):
        water_fill(log(1, 1, 1, 1), 0.2, 0.3, set())


@pytest.mark.parametrize("seed", range(20))
def test_water_filling_always_meets_the_total(seed):
    random = torch.Generator().manual_seed(seed)
    weights = (torch.randn(12, generator=random) * 10).tolist()
    ratio = 0.05 + 0.9 * float(torch.rand(1, generator=random))
    ratios = water_fill(weights, ratio, 0.02, set())
    assert sum(ratios) == pytest.approx(12 * ratio)
    assert min(ratios) >= 0.02 and max(ratios) <= 1
    config = OracleConfig(keep_ratio=ratio, min_layer_tokens=0)
    slots, _ = layer_slots(config, weights, 997)
    assert sum(slots) == math.floor(ratio * 12 * 997 + 1e-9) and max(slots) <= 997


def test_remainders_go_to_lower_layers_first():
    slots, _ = layer_slots(OracleConfig(keep_ratio=0.5, min_layer_tokens=0), [0.0] * 4, 7)  # 3.5 each, 14 in all
    assert slots == [4, 4, 3, 3]


def test_absolute_budgets():
    config = OracleConfig(keep_tokens=100, min_layer_tokens=0)
    assert layer_slots(config, [0.0] * 4, 1000)[0] == [100] * 4
    assert sum(layer_slots(config, [0.0, 1.0, 2.0, 3.0], 1000)[0]) == 400
    assert layer_slots(config, [0.0, 1.0, 2.0, 3.0], 40)[0] == [100] * 4  # may grow while decoding


def test_config_errors():
    for wrong in (
        {},
        {"keep_ratio": 0.5, "keep_tokens": 5},
        {"keep_ratio": 1.5},
        {"keep_ratio": 0.2, "heavy_fraction": 1.0},
        {"keep_tokens": 5, "min_layer_tokens": 0},
    ):
        with pytest.raises(ValueError):
            OracleConfig(**wrong)
