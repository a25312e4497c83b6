"""What each named preset is, in full: a better default must change no other one."""

from __future__ import annotations

import math

import pytest

from d2o_dist.policy import PRESETS, D2OConfig
from d2o_dist.policy.budget import Dispersion, Pyramid, Ranked, Uniform
from d2o_dist.policy.gate import Quantile, RowThreshold, Threshold
from d2o_dist.policy.merge import Average, Drop, Mass, Released
from d2o_dist.policy.score import Accumulated, Newest, Reach, Reread, Window
from d2o_dist.policy.statistics import StatisticsConfig
from d2o_dist.policy.targets import Kept, Tail
from tests.spec import spec

MASS = Mass(max_log_mass=3.0, gate=Quantile(0.25), targets=Tail(0.1, 16))
# recent_fraction, eviction_interval, score, budget, merge
EXPECTED = {
    "d2o": (
        0.2, 16, Reach(False, 20.0), Dispersion(statistic="log_zscore", sign=1, temperature=3.3, min_layers=12), MASS,
    ),
    "lean": (0.2, 16, Reach(False, 20.0), Uniform(), MASS),
    "reread": (
        0.2, 16, Reread(2048), Ranked(per_head=True, min_layer_tokens=16),
        Mass(max_log_mass=3.0, gate=Quantile(0.25), targets=Tail(0.1, None)),
    ),
    "paper": (
        0.25, 1, Accumulated(),
        Dispersion(statistic="raw", sign=-1, temperature=1.0, min_layers=0, min_layer_tokens=32),
        Average(keys=True, self_weight=math.e, gate=Threshold(0.7, "max"), targets=Kept()),
    ),
    "released": (
        0.5, 1, Accumulated(),
        Dispersion(
            statistic="heads_minmax", sign=-1, temperature=1.0, min_layers=0, exact_total=False,
            protected_layers=(0, 1, -1), min_layer_tokens=32,
        ),
        Released(RowThreshold(0.5, "mean")),
    ),
    "full": (0.25, None, Newest(), Uniform(), Drop()),
    "streaming": (0.25, 16, Newest(), Uniform(), Drop()),
    "h2o": (0.5, 16, Accumulated(), Uniform(), Drop()),
    "snapkv": (0.25, 16, Window(False, 7, "both"), Uniform(), Drop()),
    "pyramidkv": (0.25, 16, Window(False, 7, "both"), Pyramid(beta=20.0), Drop()),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_every_preset_is_what_it_is(name):
    config = D2OConfig.preset(name)
    found = (config.recent_fraction, config.eviction_interval, config.score, config.budget, config.merge)
    assert found == EXPECTED[name]
    assert config.statistics == StatisticsConfig(32, None, 64) and config.num_sink_tokens == 4
    assert config.keep_tokens is None and config.keep_ratio == (1.0 if name == "full" else 0.2)


def test_there_are_ten_and_no_two_are_alike():
    assert set(PRESETS) == set(EXPECTED) and len(PRESETS) == 10
    assert len({str(D2OConfig.preset(name).to_dict()) for name in PRESETS}) == 10


def test_the_default_is_d2o():
    assert D2OConfig() == D2OConfig.preset("d2o")


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "full"])
def test_they_are_those_of_the_specification(name):
    config = D2OConfig.preset(name)
    smallest, few = config.budget.min_layer_tokens, getattr(config.budget, "min_layers", 0)
    assert config == spec(name, min_layer_tokens=smallest, min_layers=few)


def test_lean_needs_no_statistics_of_the_whole_prompt():
    assert not D2OConfig.preset("lean").needs_column_sums and D2OConfig.preset("d2o").needs_column_sums
