"""The knobs of the specification and its presets, as the naive oracle reads them: sections 2 and 6."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any


def floor(x: float) -> int:
    """The floor of a product, tolerant of the last bits (0.3 * 10 is 3)."""
    return math.floor(x + 1e-9)


@dataclass
class OracleConfig:
    """Every knob of the specification under its own name; the defaults are the `paper_minmax` preset."""

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    dispersion: str = "layers_minmax"  # heads_minmax | layers_minmax | raw | log_zscore
    dispersion_sign: int = -1
    temperature: float = 1.0
    min_layers: int = 0  # where fewer share, they share equally
    allocation: str = "dynamic"  # dynamic | uniform | pyramid | ranked | profile
    profile: tuple[float, ...] | None = None  # shares of layers that were measured before
    budget_per: str = "layer"  # layer | head: then each KV head is a layer of section 2, 3 and 4
    exact_total: bool = True
    protected_layers: list[int] = field(default_factory=list)
    min_layer_ratio: float = 0.01
    min_layer_tokens: int = 32
    heavy_fraction: float = 0.75
    num_sink_tokens: int = 4
    selection: str = "cumulative"  # cumulative | average | window | mixed | joint | recent | reread
    joint_share: float = 0.5  # of the slots that go by accumulated attention over age, with joint
    reread_chunk: int = 2048
    selection_pool: int = 7
    selection_pool_side: str = "both"  # both | after (the neighbours lie before a token)
    selection_reach: float | None = None  # tokens; then a decaying sum over what lies before a token replaces the pool
    merge: str = "keys_values"  # none | values | keys_values | mass | released
    merge_targets: str = "kept"  # kept | tail (read by merge: mass)
    tail_fraction: float = 0.1
    max_decode_tail: int | None = None  # None: no bound
    gate: str = "threshold"  # threshold | quantile
    drop_quantile: float = 0.25
    rate_window: int = 32
    score_queries: str = "all"  # all | strided
    score_query_stride: int = 8
    score_near_distance: int = 64
    max_log_mass: float = 3.0
    self_weight: float = math.e
    ema_beta: float = 0.7
    threshold_agg: str = "max"  # max | mean
    eviction_interval: int | None = 16  # None: never evict while decoding

    def __post_init__(self) -> None:
        _choice("dispersion", self.dispersion, ("heads_minmax", "layers_minmax", "raw", "log_zscore"))
        _choice("dispersion_sign", self.dispersion_sign, (-1, 1))
        _choice("allocation", self.allocation, ("dynamic", "uniform", "pyramid", "ranked", "profile"))
        _choice("budget_per", self.budget_per, ("layer", "head"))
        choices = ("cumulative", "average", "window", "mixed", "joint", "recent", "reread")
        _choice("selection", self.selection, choices)
        _choice("score_queries", self.score_queries, ("all", "strided"))
        _choice("merge", self.merge, ("none", "values", "keys_values", "mass", "released"))
        _choice("merge_targets", self.merge_targets, ("kept", "tail"))
        _choice("gate", self.gate, ("threshold", "quantile"))
        _choice("threshold_agg", self.threshold_agg, ("max", "mean"))
        # Section 2: "exactly one of the two is given."
        if (self.keep_ratio is None) == (self.keep_tokens is None):
            raise ValueError("give exactly one of keep_ratio and keep_tokens")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], not {self.keep_ratio}")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise ValueError(f"keep_tokens must be at least 1, not {self.keep_tokens}")
        if self.eviction_interval is not None and self.eviction_interval < 1:
            raise ValueError(f"eviction_interval must be at least 1 or None, not {self.eviction_interval}")
        # Section 2: "A configuration whose layers could never hold num_sink_tokens + 1 heavy and 1 recent token is a
        # clear error." READING: a ratio can give any number of slots, so only the split can be impossible; an absolute
        # budget is checked at its average (or at min_layer_tokens, where that is more).
        slots = 10**9 if self.keep_tokens is None else max(self.keep_tokens, self.min_layer_tokens)
        heavy = floor(self.heavy_fraction * slots)
        if heavy < self.num_sink_tokens + 1 or slots - heavy < 1:
            raise ValueError(f"{slots} slots cannot hold {self.num_sink_tokens} + 1 heavy tokens and 1 recent token")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OracleConfig:
        return cls(**{**copy.deepcopy(PRESETS[name]), **overrides})


def _choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


# Section 6. The `paper_minmax` preset is the defaults.
_ROOM = {"min_layer_tokens": 256}  # of all but the paper's and the released rules
PRESETS: dict[str, dict[str, Any]] = {
    "paper_minmax": {},
    "paper": {"dispersion": "raw", "eviction_interval": 1},
    "released": {
        "dispersion": "heads_minmax",
        "exact_total": False,
        "protected_layers": [0, 1, -1],
        "heavy_fraction": 0.5,
        "ema_beta": 0.5,
        "threshold_agg": "mean",
        "eviction_interval": 1,
        "merge": "released",
    },
    "mass": {
        **_ROOM,
        "selection": "window",
        "dispersion": "log_zscore",
        "dispersion_sign": 1,
        "temperature": 3.3,
        "heavy_fraction": 0.8,
        "merge": "mass",
        "merge_targets": "tail",
        "gate": "quantile",
    },
    "full": {**_ROOM, "keep_ratio": 1.0, "allocation": "uniform", "merge": "none", "eviction_interval": None},
    "streaming": {**_ROOM, "selection": "recent", "allocation": "uniform", "merge": "none"},
    "h2o": {**_ROOM, "selection": "cumulative", "allocation": "uniform", "heavy_fraction": 0.5, "merge": "none"},
    "snapkv": {**_ROOM, "selection": "window", "allocation": "uniform", "merge": "none"},
    "pyramidkv": {**_ROOM, "selection": "window", "allocation": "pyramid", "merge": "none"},
}
