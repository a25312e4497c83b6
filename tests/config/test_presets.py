"""What each named preset is, in full: a better default must change no other one."""

from __future__ import annotations

import math

import pytest

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.config.presets import PRESETS

# Fields in which presets differ, in this order; all others are the same everywhere.
FIELDS = (
    "allocation", "budget_per", "dispersion", "dispersion_sign", "temperature", "exact_total", "protected_layers",
    "heavy_fraction", "selection", "selection_pool", "selection_pool_side", "merge", "merge_targets", "gate",
    "selection_reach", "max_decode_tail", "ema_beta", "threshold_agg", "eviction_interval", "min_layer_tokens",
)  # fmt: skip
PAPER = ("dynamic", "layer", "layers_minmax", -1, 1.0, True, (), 0.75, "cumulative", 7, "both", "keys_values", "kept",
         "threshold", None, None, 0.7, "max", 16, 256)  # fmt: skip
MASS = ("dynamic", "layer", "log_zscore", 1, 3.3, True, (), 0.8, "window", 7, "both", "mass", "tail", "quantile", None,
        None, 0.7, "max", 16, 256)  # fmt: skip


def but(base: tuple, **changes) -> tuple:
    return tuple((dict(zip(FIELDS, base, strict=True)) | changes)[name] for name in FIELDS)


BASELINE = but(PAPER, allocation="uniform", merge="none")
SPAN = but(MASS, selection_pool=15, selection_pool_side="after")
D2O = but(SPAN, selection_reach=20.0, max_decode_tail=16)
EXPECTED = {
    "d2o": D2O,
    "span": SPAN,
    "reach": D2O,
    "lean": but(D2O, allocation="uniform"),
    "mass": MASS,
    "paper_minmax": but(PAPER, min_layer_tokens=32),
    "paper": but(PAPER, dispersion="raw", eviction_interval=1, min_layer_tokens=32),
    "released": but(
        PAPER, dispersion="heads_minmax", exact_total=False, protected_layers=(0, 1, -1), heavy_fraction=0.5,
        ema_beta=0.5, threshold_agg="mean", eviction_interval=1, merge="released",
        min_layer_tokens=32,
    ),
    "reread": but(
        PAPER, allocation="ranked", budget_per="head", selection="reread", heavy_fraction=0.8, min_layer_tokens=16,
        merge="mass", merge_targets="tail", gate="quantile",
    ),
    "full": but(BASELINE, eviction_interval=None),
    "streaming": but(BASELINE, selection="recent"),
    "h2o": but(BASELINE, heavy_fraction=0.5),
    "snapkv": but(BASELINE, selection="window"),
    "pyramidkv": but(BASELINE, allocation="pyramid", selection="window"),
}  # fmt: skip
COMMON = dict(
    keep_tokens=None, pyramid_beta=20.0, min_layer_ratio=0.01, num_sink_tokens=4, rate_window=32,
    reread_chunk=2048,
    tail_fraction=0.1, drop_quantile=0.25, self_weight=math.e, max_log_mass=3.0,
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_what_it_is(name):
    config = D2OConfig.preset(name)
    assert tuple(getattr(config, field) for field in FIELDS) == EXPECTED[name]
    assert {field: getattr(config, field) for field in COMMON} == COMMON
    assert config.keep_ratio == (1.0 if name == "full" else 0.2)


def test_the_default_is_d2o():
    assert D2OConfig() == D2OConfig.preset("d2o")


def test_lean_needs_no_statistics_of_the_whole_prompt():
    assert not D2OConfig.preset("lean").needs_column_sums and D2OConfig.preset("d2o").needs_column_sums
