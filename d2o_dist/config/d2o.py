"""`D2OConfig`: every knob of the algorithm, validated and frozen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.config.io import build, check_choice, did_you_mean, dump_yaml, load_yaml, refuse_unknown
from d2o_dist.config.presets import PRESETS
from d2o_dist.config.readers import refuse_unread, refuse_unread_values, without_unread

ALLOCATIONS = ("dynamic", "uniform", "pyramid", "ranked")
BUDGETS = ("layer", "head")
DISPERSIONS = ("layers_minmax", "heads_minmax", "raw", "log_zscore")
SELECTIONS = ("cumulative", "window", "mixed", "recent", "reread")
SELECTION_POOL_SIDES = ("both", "after")
MERGES = ("keys_values", "values", "none", "mass", "released")
MERGE_TARGETS = ("kept", "tail")
GATES = ("threshold", "quantile")
THRESHOLD_AGGS = ("max", "mean")
SCORE_QUERIES = ("all", "strided")
# The two ways to say how much is kept.
SIZES = ("keep_ratio", "keep_tokens")

DEFAULT_KEEP_RATIO = 0.2
# A product such as 0.29 * 100 is 28.999999999999996 in binary; the user meant 29.
_FLOOR_SLACK = 1e-9


def floor_tokens(tokens: float) -> int:
    """`floor` of a token count that was computed from decimal fractions."""
    return math.floor(tokens + _FLOOR_SLACK)


@dataclass(frozen=True)
class QuerySample:
    """Column sums from a part of the queries.

    Attributes:
        stride: one query in so many is summed over all keys, and counted as many times.
        near: over keys at less than this distance every query is summed.
    """

    stride: int
    near: int


@dataclass(frozen=True)
class D2OConfig:
    """How a KV cache is compressed. The defaults are the preset `d2o`; see `docs/algorithm.md` for the equations.

    A field that only some rules read is refused where it is set and no rule would read it (`config/readers.py`).

    Size of the cache (exactly one of the first two; `keep_ratio=0.2` when neither is given):

    Attributes:
        keep_ratio: fraction of the full cache's tokens to keep, averaged over the compressed layers, in (0, 1].
        keep_tokens: slots a layer, on average; does not depend on the length of the prompt.
        allocation: how layers share the total: `dynamic` (by dispersion), `uniform`, `pyramid` (falls with depth),
            `ranked` (by how many of a layer's tokens are among the highest ranked of all layers).
        budget_per: `layer`: all KV heads of a layer hold as many slots; `head`: each has a budget of its own, and
            wherever these rules speak of a layer, one KV head is meant.
        dispersion: a layer's scalar statistic of its column sums: `layers_minmax`, `heads_minmax`, `raw`, `log_zscore`.
        dispersion_sign: -1 gives even attention more (the paper), +1 gives uneven attention more.
        temperature: divides the exponent of the softmax over layers.
        pyramid_beta: with `allocation="pyramid"`, the last layer gets `1/pyramid_beta` of the average.
        exact_total: water-fill the layers so that the total is exactly what was asked for; only `min_layer_tokens` can
            exceed it.
        min_layer_ratio: no layer's ratio falls below this, or below that of all where `keep_tokens` makes it smaller.
        min_layer_tokens: a layer gets at least so many slots, whatever the ratio or `keep_tokens`. A prompt of fewer
            tokens may grow to it while decoding.
        protected_layers: layers that keep everything; negative indices count from the last layer.

    Which tokens:
        heavy_fraction: share of a layer's slots that is chosen by score (sinks included); the rest are the newest.
        num_sink_tokens: first tokens of the sequence, never evicted, as far as there are heavy slots for them.
        selection: `cumulative` (accumulated attention), `window` (attention of the last queries, pooled over
            neighbours at finalize), `mixed` (both), `recent` (newest first: a plain sliding window with sinks),
            `reread` (the most attention that any query gave while the prompt was read a second time, by
            `D2OCache.reread`).
        reread_chunk: prompt tokens of one forward of that second reading, each of which stands alone.
        selection_pool: neighbours the rate is max-pooled over, the token itself among them; odd.
        selection_pool_side: `both`: as many of them before the token as after it; `after`: those before it, so that the
            `selection_pool - 1` tokens after a peak of attention are kept with it, and none before it.
        selection_reach: takes the place of those two, which are read only where it is None: a token's rate at finalize
            becomes the mean of its own and of those before it (the sinks' left out), with weights that fall by a factor
            e every so many positions. What follows many or strong peaks ranks high for longer than what follows one
            weak peak, while decoding too.
        rate_window: prompt queries that the rates are averaged over, and the decay of their average while decoding.

    Column sums, from which dispersions and cumulative scores come:
        score_queries: `all`: exact, from every query of the prompt; `strided`: estimated, from one query in
            `score_query_stride` and, for the nearest keys, from all. Cheaper. Rates are exact in either case.
        score_query_stride: with `strided`, one query in so many is summed over all keys.
        score_near_distance: with `strided`, keys at less than this distance from a query are summed over all queries.

    What happens to evicted tokens:
        merge: `keys_values`, `values`, `none` (drop), `mass` (values weighted by attention, and the slot draws the
            attention of all it stands for), `released` (the rule of the published code).
        merge_targets: `kept` (with `merge="mass"` all but the sinks), or `tail`: only the lowest ranked of those that
            are neither sinks nor recent take others in.
        tail_fraction: share of a layer's slots that is the tail.
        max_decode_tail: most slots of a KV head's tail in an eviction while decoding, so that what ranks send then, and
            what is searched, do not grow with the budget; None: no bound.
        gate: `threshold` (cosine against a moving threshold) or `quantile` (all but the least similar are merged).
        drop_quantile: share of evicted tokens that `gate="quantile"` drops.
        ema_beta: weight of the newest eviction in the moving threshold.
        threshold_agg: what an eviction adds to the threshold: `max` (paper) or `mean` of the similarities.
        self_weight: with `merge` `keys_values` or `values`, what a kept token weighs beside the `exp(cosine)` of those
            merged into it; `e` (the paper) is the weight of its own cosine of 1.
        max_log_mass: with `merge="mass"`, most that is added to the logit of a slot.

    While decoding:
        eviction_interval: a layer is evicted when it holds this many slots more than its budget; None: never.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    allocation: str = "dynamic"
    budget_per: str = "layer"
    dispersion: str = "log_zscore"
    dispersion_sign: int = 1
    temperature: float = 3.3
    pyramid_beta: float = 20.0
    exact_total: bool = True
    min_layer_ratio: float = 0.01
    min_layer_tokens: int = 256
    protected_layers: tuple[int, ...] = ()
    heavy_fraction: float = 0.8
    num_sink_tokens: int = 4
    selection: str = "window"
    selection_pool: int = 15
    selection_pool_side: str = "after"
    selection_reach: float | None = 20.0
    rate_window: int = 32
    reread_chunk: int = 2048
    score_queries: str = "all"
    score_query_stride: int = 8
    score_near_distance: int = 64
    merge: str = "mass"
    merge_targets: str = "tail"
    tail_fraction: float = 0.1
    max_decode_tail: int | None = 16
    gate: str = "quantile"
    drop_quantile: float = 0.25
    ema_beta: float = 0.7
    threshold_agg: str = "max"
    self_weight: float = math.e
    max_log_mass: float = 3.0
    eviction_interval: int | None = 16

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.keep_tokens is None:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        layers = self.protected_layers
        if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
            raise ValueError(f"protected_layers ({layers!r}) must be a list of layer indices")
        object.__setattr__(self, "protected_layers", tuple(layers))
        self._check_types()
        self._check_values()
        self._check_room()
        refuse_unread_values(vars(self), {f.name: f.default for f in dataclasses.fields(self)})

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> D2OConfig:
        """A named configuration, with any field overridden.

        Raises:
            ValueError: unknown preset or field, a value outside its limits, or a field that no rule would read.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f'no preset "{name}".{did_you_mean(str(name), PRESETS)} Known: {", ".join(PRESETS)}')
        refuse_unknown(overrides, [f.name for f in dataclasses.fields(cls)], cls.__name__)
        # None for a size means that it is not given.
        given = {key: value for key, value in overrides.items() if value is not None or key not in SIZES}
        if name == "full" and (given.get("keep_ratio", 1.0) != 1.0 or "keep_tokens" in given):
            raise ValueError('preset "full" keeps the whole cache: keep_ratio must be 1.0 and keep_tokens unset')
        config = cls(**{**without_unread(PRESETS[name], given), **given})
        if not config.keeps_everything:
            refuse_unread(vars(config), given)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> D2OConfig:
        """From a mapping of fields; the extra key `preset` names the preset that the fields override."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a D2O configuration must be a mapping of fields, not {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        refuse_unknown((key for key in values if key != "preset"), known, cls.__name__)
        values = dict(values)
        name = values.pop("preset", None)
        if name is None:
            return build(cls, values)
        if all(f.name in values for f in dataclasses.fields(cls)):
            raise ValueError(f'preset "{name}" would change nothing: every field is given beside it. Leave one out')
        return cls.preset(name, **values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `from_dict` is its inverse."""
        values = dataclasses.asdict(self)
        values["protected_layers"] = list(self.protected_layers)
        return values

    @classmethod
    def from_yaml(cls, path: str | Path) -> D2OConfig:
        """From a YAML file of fields (and optionally `preset`)."""
        return cls.from_dict(load_yaml(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text of all fields; also written to `path` when given."""
        text = dump_yaml(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def replace(self, **changes: Any) -> D2OConfig:
        """A copy with some fields changed, validated anew; a changed field that no rule would read is refused."""
        refuse_unknown(changes, [f.name for f in dataclasses.fields(self)], type(self).__name__)
        config = type(self)(**{**without_unread(vars(self), changes), **changes})
        refuse_unread(vars(config), changes)
        return config

    # ---- what follows from the fields --------------------------------------------------------------------------

    @property
    def needs_column_sums(self) -> bool:
        """Whether a decision depends on whole-prompt attention statistics; if not, they are never computed."""
        by_sums = self.allocation == "dynamic" or self.selection in ("cumulative", "mixed")
        return by_sums and not self.keeps_everything

    @property
    def needs_rates(self) -> bool:
        """Whether the attention of the last prompt queries, and its decaying average while decoding, are kept."""
        return (self.selection not in ("recent", "reread") or self.merge == "mass") and not self.keeps_everything

    @property
    def needs_reread(self) -> bool:
        """Whether tokens are ranked by a second reading of the prompt. `scores` then hold peaks rather than sums."""
        return self.selection == "reread" and not self.keeps_everything

    @property
    def by_layer(self) -> bool:
        """Whether layers are compressed as wholes, after one reading, by budgets that no ranking of tokens decides.

        That is all that training can do.
        """
        return not self.needs_reread and self.allocation != "ranked" and self.budget_per == "layer"

    @property
    def query_sample(self) -> QuerySample | None:
        """Which queries column sums are taken from; None: all, or there are none to take."""
        if self.score_queries == "all" or self.score_query_stride == 1 or not self.needs_column_sums:
            return None
        return QuerySample(self.score_query_stride, self.score_near_distance)

    @property
    def num_last_queries(self) -> int:
        """Last queries of a prompt that finalize looks at: for the rates, and those no sampled query stands for."""
        sample = self.query_sample
        return max(self.rate_window if self.needs_rates else 0, 0 if sample is None else sample.stride - 1)

    @property
    def keeps_everything(self) -> bool:
        """Whether no token is ever evicted."""
        return self.keep_ratio == 1.0 and self.eviction_interval is None

    def protected(self, num_layers: int) -> frozenset[int]:
        """Indices in `[0, num_layers)` of the layers that keep everything.

        Raises:
            ValueError: an index outside `[-num_layers, num_layers)`.
        """
        for index in self.protected_layers:
            if not -num_layers <= index < num_layers:
                raise ValueError(f"protected_layers has {index}, but the model has {num_layers} layers")
        return frozenset(index % num_layers for index in self.protected_layers)

    def split(self, num_slots: int) -> tuple[int, int]:
        """`(num_heavy, num_recent)` of a layer of `num_slots` slots: `floor(heavy_fraction * S)` and the rest."""
        num_heavy = floor_tokens(self.heavy_fraction * num_slots)
        return num_heavy, num_slots - num_heavy

    # ---- validation --------------------------------------------------------------------------------------------

    def _check_types(self) -> None:
        def number(name: str, *, integer: bool = False) -> None:
            value = getattr(self, name)
            kinds = (int,) if integer else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                kind = "an integer" if integer else "a finite number"
                raise ValueError(f"{name} ({value!r}) must be {kind}")

        for name in ("temperature", "pyramid_beta", "min_layer_ratio", "heavy_fraction", "tail_fraction"):
            number(name)
        for name in ("drop_quantile", "ema_beta", "self_weight", "max_log_mass"):
            number(name)
        for name in ("dispersion_sign", "min_layer_tokens", "num_sink_tokens", "selection_pool", "rate_window"):
            number(name, integer=True)
        for name in ("score_query_stride", "score_near_distance", "reread_chunk"):
            number(name, integer=True)
        if self.keep_ratio is not None:
            number("keep_ratio")
        for name in ("keep_tokens", "max_decode_tail", "eviction_interval"):
            if getattr(self, name) is not None:
                number(name, integer=True)
        if self.selection_reach is not None:
            number("selection_reach")
        if not isinstance(self.exact_total, bool):
            raise ValueError(f"exact_total ({self.exact_total!r}) must be true or false")
        for index in self.protected_layers:
            if isinstance(index, bool) or not isinstance(index, int):
                raise ValueError(f"protected_layers has {index!r}; layer indices are integers")

    def _check_values(self) -> None:
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("budget_per", self.budget_per, BUDGETS)
        check_choice("dispersion", self.dispersion, DISPERSIONS)
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("selection_pool_side", self.selection_pool_side, SELECTION_POOL_SIDES)
        check_choice("score_queries", self.score_queries, SCORE_QUERIES)
        check_choice("merge", self.merge, MERGES)
        check_choice("merge_targets", self.merge_targets, MERGE_TARGETS)
        check_choice("gate", self.gate, GATES)
        check_choice("threshold_agg", self.threshold_agg, THRESHOLD_AGGS)
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise ValueError(
                f"keep_ratio ({self.keep_ratio}) and keep_tokens ({self.keep_tokens}) are two ways to say one thing: "
                "give exactly one"
            )
        limits = [
            ("keep_ratio", self.keep_ratio is None or 0 < self.keep_ratio <= 1, "in (0, 1]"),
            ("keep_tokens", self.keep_tokens is None or self.keep_tokens >= 1, "at least 1"),
            ("dispersion_sign", self.dispersion_sign in (-1, 1), "-1 or 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("pyramid_beta", self.pyramid_beta >= 1, "at least 1"),
            ("min_layer_ratio", 0 <= self.min_layer_ratio <= 1, "in [0, 1]"),
            ("min_layer_tokens", self.min_layer_tokens >= 0, "at least 0"),
            ("heavy_fraction", 0 < self.heavy_fraction < 1, "in (0, 1)"),
            ("num_sink_tokens", self.num_sink_tokens >= 0, "at least 0"),
            ("selection_pool", self.selection_pool >= 1 and self.selection_pool % 2 == 1, "odd and at least 1"),
            ("selection_reach", self.selection_reach is None or self.selection_reach > 0, "above 0, or null"),
            ("rate_window", self.rate_window >= 1, "at least 1"),
            ("score_query_stride", self.score_query_stride >= 1, "at least 1"),
            ("score_near_distance", self.score_near_distance >= 0, "at least 0"),
            ("reread_chunk", self.reread_chunk >= 1, "at least 1"),
            ("tail_fraction", 0 < self.tail_fraction <= 1, "in (0, 1]"),
            ("max_decode_tail", self.max_decode_tail is None or self.max_decode_tail >= 1, "at least 1, or null"),
            ("drop_quantile", 0 <= self.drop_quantile < 1, "in [0, 1)"),
            ("ema_beta", 0 <= self.ema_beta <= 1, "in [0, 1]"),
            ("self_weight", self.self_weight > 0, "above 0"),
            ("max_log_mass", self.max_log_mass >= 0, "at least 0"),
            ("eviction_interval", self.eviction_interval is None or self.eviction_interval >= 1, "at least 1, or null"),
        ]
        for name, holds, limit in limits:
            if not holds:
                raise ValueError(f"{name} ({getattr(self, name)}) must be {limit}")
        if self.allocation == "ranked" and self.selection == "recent":
            raise ValueError(
                'allocation "ranked" compares the tokens of all layers by attention, and selection "recent" reads none'
            )
        if self.allocation == "pyramid" and self.budget_per != "layer":
            raise ValueError(f'allocation "pyramid" is by depth: budget_per ({self.budget_per}) must be "layer"')
        if self.merge == "released" and (self.gate != "threshold" or self.merge_targets != "kept"):
            raise ValueError(
                f'merge "released" has a gate and targets of its own: gate ({self.gate}) must be "threshold" and '
                f'merge_targets ({self.merge_targets}) "kept"'
            )

    def _check_room(self) -> None:
        """Refuse a configuration whose layers could never hold `num_sink_tokens + 1` heavy and 1 recent token."""
        if self.keep_ratio is not None and self.exact_total and self.min_layer_ratio > self.keep_ratio:
            raise ValueError(
                f"min_layer_ratio ({self.min_layer_ratio}) alone exceeds the total: keep_ratio is {self.keep_ratio}"
            )
        if self.keep_tokens is None:
            return  # a prompt can be long enough for any ratio
        num_slots = max(self.keep_tokens, self.min_layer_tokens)
        num_heavy, num_recent = self.split(num_slots)
        if num_heavy < self.num_sink_tokens + 1 or num_recent < 1:
            raise ValueError(
                f"keep_tokens ({self.keep_tokens}) gives a layer {num_heavy} heavy and {num_recent} recent slots; it "
                f"must hold at least num_sink_tokens + 1 = {self.num_sink_tokens + 1} heavy and 1 recent token"
            )
