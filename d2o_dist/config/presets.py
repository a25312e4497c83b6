"""The named presets of `D2OConfig`: for each the fields in which it differs from the defaults, which are `d2o`."""

from __future__ import annotations

from typing import Any

# Every preset but the default names each field in which it differs from it, so that a better default changes no other
# preset. The paper's rules, with dispersions that do not depend on the prompt's length:
_PAPER = {
    "dispersion": "layers_minmax",
    "dispersion_sign": -1,
    "temperature": 1.0,
    "heavy_fraction": 0.75,
    "selection": "cumulative",
    "selection_pool": 7,
    "selection_pool_side": "both",
    "selection_reach": None,
    "merge": "keys_values",
    "merge_targets": "kept",
    "max_decode_tail": None,
    "gate": "threshold",
}
# Neither the paper nor its code holds short prompts above the ratio.
_PAPER_RULES = {**_PAPER, "min_layer_tokens": 32}
_BASELINE = {**_PAPER, "allocation": "uniform", "merge": "none"}
_MASS = {
    **_PAPER,
    "selection": "window",
    "dispersion": "log_zscore",
    "dispersion_sign": 1,
    "temperature": 3.3,
    "heavy_fraction": 0.8,
    "merge": "mass",
    "merge_targets": "tail",
    "gate": "quantile",
}
_SPAN = {**_MASS, "selection_pool": 15, "selection_pool_side": "after"}
_REACH = {**_SPAN, "selection_reach": 20.0, "max_decode_tail": 16}

PRESETS: dict[str, dict[str, Any]] = {
    "d2o": {},
    "paper": {**_PAPER_RULES, "dispersion": "raw", "eviction_interval": 1},
    "paper_minmax": _PAPER_RULES,
    "released": {
        **_PAPER_RULES,
        "dispersion": "heads_minmax",
        "exact_total": False,
        "protected_layers": (0, 1, -1),
        "heavy_fraction": 0.5,
        "ema_beta": 0.5,
        "threshold_agg": "mean",
        "eviction_interval": 1,
        "merge": "released",
    },
    "mass": _MASS,
    "span": _SPAN,
    "reach": _REACH,
    "lean": {**_REACH, "allocation": "uniform"},
    "reread": {
        **_PAPER,
        "allocation": "ranked",
        "budget_per": "head",
        "selection": "reread",
        "heavy_fraction": 0.8,
        "min_layer_tokens": 16,
        "merge": "mass",
        "merge_targets": "tail",
        "gate": "quantile",
    },
    "full": {**_BASELINE, "keep_ratio": 1.0, "eviction_interval": None},
    "streaming": {**_BASELINE, "selection": "recent"},
    "h2o": {**_BASELINE, "heavy_fraction": 0.5},
    "snapkv": {**_BASELINE, "selection": "window"},
    "pyramidkv": {**_BASELINE, "allocation": "pyramid", "selection": "window"},
}
