"""A naive float64 reading of the specification (restated in docs/algorithm.md), used as a test oracle.

Written from the specification alone, for one sequence of one request, with clarity before speed: slots are plain Python
objects, loops run over heads and slots, attention is dense. Section numbers in comments are those of the specification.
Where the specification leaves room, the reading taken is marked `READING`.

    result = run_oracle(model, input_ids, OracleConfig.preset("mass", keep_ratio=0.3), num_new_tokens=20)

Hugging Face's RMSNorm computes in float32 even in a float64 model. The oracle calls the model's own modules as they
are; `use_float64_norms(model)` makes both sides exact where a test wants differences below 1e-7.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

RATE_EPSILON = 1e-9  # section 4b: "plus 1e-9"
MINMAX_EPSILON = 1e-6  # section 1: "+1e-6 in the denominator"
MIXED_MIN_AGE = 32  # section 3: "a / max(tokens seen - position, 32)"
PYRAMID_BETA = 20


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
    allocation: str = "dynamic"  # dynamic | uniform | pyramid | ranked
    budget_per: str = "layer"  # layer | head: then each KV head is a layer of section 2, 3 and 4
    exact_total: bool = True
    protected_layers: list[int] = field(default_factory=list)
    min_layer_ratio: float = 0.01
    min_layer_tokens: int = 32
    heavy_fraction: float = 0.75
    num_sink_tokens: int = 4
    selection: str = "cumulative"  # cumulative | window | mixed | recent | reread
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
        _choice("allocation", self.allocation, ("dynamic", "uniform", "pyramid", "ranked"))
        _choice("budget_per", self.budget_per, ("layer", "head"))
        _choice("selection", self.selection, ("cumulative", "window", "mixed", "recent", "reread"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Sections 1 and 2: dispersion and layer budgets
# ---------------------------------------------------------------------------------------------------------------------


def layer_dispersions(column_sums: list[torch.Tensor], method: str) -> list[float]:
    """`F_l` of every layer, from its column sums [Hq, T]."""
    # "Per-head variance F[h] = var_j c[h,j] (unbiased, divisor T-1)". READING: of a single token it is 0. The mean over
    # j is 1, as every row of the attention adds up to 1; of sampled sums "deviations are taken from 1" all the same.
    divisor = max(column_sums[0].shape[1] - 1, 1)
    head_variances = [(sums - 1).square().sum(dim=1) / divisor for sums in column_sums]
    if method == "heads_minmax":
        # "min-max normalise F[h] across the heads of the layer (+1e-6 in the denominator), then mean over heads".
        return [float(((f - f.min()) / (f.max() - f.min() + MINMAX_EPSILON)).mean()) for f in head_variances]
    means = [float(f.mean()) for f in head_variances]
    if method == "raw":
        return means
    if method == "layers_minmax":
        # "mean over heads first, then min-max across the L layers". READING: with the same +1e-6.
        low, high = min(means), max(means)
        return [(m - low) / (high - low + MINMAX_EPSILON) for m in means]
    # Section 2, log_zscore: "log of the heads' mean, standardised across layers (unbiased deviation)".
    # READING: a mean of 0 counts as the smallest positive number; no spread (or one layer) gives 0 everywhere.
    logs = [math.log(max(m, 1e-300)) for m in means]
    centre = sum(logs) / len(logs)
    if len(logs) == 1:
        return [0.0]
    deviation = math.sqrt(sum((x - centre) ** 2 for x in logs) / (len(logs) - 1))
    return [(x - centre) / deviation if deviation > 0 else 0.0 for x in logs]


def layer_log_weights(config: OracleConfig, column_sums: list[torch.Tensor]) -> list[float]:
    """`log w_l` up to a constant. In logarithms, because `raw` underflows and the shares only need proportions."""
    num_layers = len(column_sums)
    if config.allocation == "uniform":
        return [0.0] * num_layers
    assert config.allocation != "ranked"
    if config.allocation == "pyramid":
        # Linear in depth from (2 - 1/beta) to 1/beta of the average.
        if num_layers == 1:
            return [0.0]
        first, last = 2 - 1 / PYRAMID_BETA, 1 / PYRAMID_BETA
        return [math.log(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]
    # "w = softmax_l(-F_l)", with dispersion_sign for the minus and `temperature` dividing the exponent.
    dispersions = layer_dispersions(column_sums, config.dispersion)
    return [config.dispersion_sign * f / config.temperature for f in dispersions]


def normalise(log_weights: list[float]) -> list[float]:
    top = max(log_weights)
    total = sum(math.exp(x - top) for x in log_weights)
    return [math.exp(x - top) / total for x in log_weights]


def protected_set(config: OracleConfig, num_layers: int) -> set[int]:
    for layer in config.protected_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"protected layer {layer} of {num_layers} layers")
    return {layer % num_layers for layer in config.protected_layers}


def water_fill(log_weights: list[float], keep_ratio: float, min_ratio: float, protected: set[int]) -> list[float]:
    """Ratios in [min_ratio, 1] whose sum is exactly `keep_ratio * L`, in proportion to `w` where no clamp is hit."""
    num_layers = len(log_weights)
    # "A total that the protected layers or the minima alone exceed is a clear error."
    if len(protected) + min_ratio * (num_layers - len(protected)) > keep_ratio * num_layers + 1e-9:
        raise ValueError(f"protected layers and minima alone exceed keep_ratio {keep_ratio}")
    # "protected layers are fixed at 1, layers that hit a clamp are fixed there, and the rest share what is left in
    # proportion to w, until no more clamp."
    fixed = {layer: 1.0 for layer in protected}
    while len(fixed) < num_layers:
        free = [layer for layer in range(num_layers) if layer not in fixed]
        left = keep_ratio * num_layers - sum(fixed.values())
        shares = dict(zip(free, [left * w for w in normalise([log_weights[layer] for layer in free])], strict=True))
        too_small = [layer for layer in free if shares[layer] < min_ratio]
        too_large = [layer for layer in free if shares[layer] > 1]
        if not too_small and not too_large:
            fixed.update(shares)
            break
        # Both clamps in one round: the side with the larger total violation first (as CSS flexbox resolves lengths).
        shortfall = sum(min_ratio - shares[layer] for layer in too_small)
        excess = sum(shares[layer] - 1 for layer in too_large)
        if shortfall >= excess:
            fixed.update({layer: min_ratio for layer in too_small})
        if excess >= shortfall:
            fixed.update({layer: 1.0 for layer in too_large})
    return [fixed[layer] for layer in range(num_layers)]


def layer_slots(config: OracleConfig, log_weights: list[float], num_tokens: int) -> tuple[list[int], list[float]]:
    """`S_l` and `r_l` of every layer (section 2)."""
    num_layers = len(log_weights)
    protected = protected_set(config, num_layers)
    if config.keep_ratio is not None:
        keep_ratio, length, min_ratio = config.keep_ratio, num_tokens, config.min_layer_ratio
    else:
        # Absolute budget: a share of max(T, keep_tokens), so that a short prompt's layers may grow to keep_tokens.
        length = max(num_tokens, config.keep_tokens)
        keep_ratio = config.keep_tokens / length
        min_ratio = min(config.min_layer_ratio, keep_ratio)
    if config.exact_total:
        ratios = water_fill(log_weights, keep_ratio, min_ratio, protected)
        # "S_l = floor(r_l * T), and the tokens still short of floor(keep_ratio * L * T) go one each to the layers of
        # largest remainder (ties: lower layer)." Remainders are compared to nine digits, so that ties are ties.
        slots = [floor(r * length) for r in ratios]
        missing = floor(keep_ratio * num_layers * length) - sum(slots)
        remainders = [round(r * length - s, 9) for r, s in zip(ratios, slots, strict=True)]
        order = sorted(range(num_layers), key=lambda layer: (-remainders[layer], layer))
        for layer in [layer for layer in order if slots[layer] < length][: max(missing, 0)]:
            slots[layer] += 1
    else:
        # "r_l = clamp(w_l * L * keep_ratio, min_layer_ratio, 1)"; "protected_layers keep everything".
        ratios = [min(max(w * num_layers * keep_ratio, min_ratio), 1.0) for w in normalise(log_weights)]
        ratios = [1.0 if layer in protected else r for layer, r in enumerate(ratios)]
        slots = [floor(r * length) for r in ratios]
    # "last of all, S_l = max(S_l, min_layer_tokens). A prompt shorter than that may grow to it while decoding."
    return [max(s, config.min_layer_tokens) for s in slots], ratios


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    key: torch.Tensor
    value: torch.Tensor
    position: int
    score: float = 0.0
    rate: float = 0.0
    log_mass: float = 0.0


@dataclass
class Eviction:
    """What one eviction of one layer did; per KV head, in position order. For looking at when a comparison fails."""

    layer: int
    num_seen_tokens: int
    evicted: list[list[int]]
    similarity: list[list[float]]
    target: list[list[int]]
    merged: list[list[bool]]
    threshold: float | None


class OracleCache:
    def __init__(self, config: OracleConfig, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        self.config = config
        self.num_layers, self.num_heads, self.num_kv_heads = num_layers, num_heads, num_kv_heads
        self.group_size = num_heads // num_kv_heads
        heads = list(range(num_kv_heads))
        # What has a budget and a threshold: a layer with all of its KV heads, or one KV head of a layer.
        self.units = [(layer, part) for layer in range(num_layers)
                      for part in ([[head] for head in heads] if config.budget_per == "head" else [heads])]  # fmt: skip
        protected = protected_set(config, num_layers)
        self.protected = {unit for unit, (layer, _) in enumerate(self.units) if layer in protected}
        self.reread_done = False
        self.slots: list[list[list[Slot]]] = [[[] for _ in range(num_kv_heads)] for _ in range(num_layers)]
        self.thresholds: list[float | None] = [None] * len(self.units)
        self.budgets: list[tuple[int, int]] | None = None  # (N_l, M_l) of each unit
        self.ratios: list[float] | None = None
        self.log_weights: list[float] | None = None  # of the first prefill
        self.num_seen_tokens = 0  # "the number of tokens seen"
        self.pending = False  # tokens prefilled since the last finalize
        # Per layer, per query head, the column sums of the first prefill.
        self.column_sums: list[list[torch.Tensor]] = [
            [torch.zeros(0, dtype=torch.float64) for _ in range(num_heads)] for _ in range(num_layers)
        ]
        # Per layer, per KV head, the group's attention rows of this prefill's last `rate_window` queries.
        self.window: list[list[list[torch.Tensor]]] = [[[] for _ in range(num_kv_heads)] for _ in range(num_layers)]
        self._begin_sampling()
        self.evictions: list[Eviction] = []

    def num_live(self, unit: int) -> int:
        layer, heads = self.units[unit]
        return len(self.slots[layer][heads[0]])

    # -- attention ----------------------------------------------------------------------------------------------------

    def _append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: list[int]) -> None:
        for head in range(self.num_kv_heads):
            for i, position in enumerate(positions):
                # "Append (k_t, v_t) with position t, score 0."
                self.slots[layer][head].append(Slot(keys[head, i].clone(), values[head, i].clone(), position))

    def _attend(
        self, layer: int, queries: torch.Tensor, positions: list[int], scaling: float
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs [Hq, n, D] and, per query head, the probabilities [n, live slots]."""
        outputs, probabilities = [], []
        for head, slots in enumerate(self.slots[layer]):
            keys = torch.stack([s.key for s in slots])
            values = torch.stack([s.value for s in slots])
            log_mass = torch.tensor([s.log_mass for s in slots], dtype=torch.float64)
            later = torch.tensor([s.position for s in slots]) > torch.tensor(positions)[:, None]
            for h in self._group(head):
                # "Attention adds log_mass_j to the logit of slot j, everywhere".
                logits = queries[h] @ keys.T * scaling + log_mass
                p = torch.softmax(logits.masked_fill(later, -math.inf), dim=-1)
                outputs.append(p @ values)
                probabilities.append(p)
        return torch.stack(outputs), probabilities

    def _group(self, head: int) -> range:
        return range(head * self.group_size, (head + 1) * self.group_size)

    # -- prefill: sections 1 and 5 ------------------------------------------------------------------------------------

    def prefill_chunk(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """One layer of one chunk: of the first prefill (section 1), or of a later turn, whose "queries attend the live
        slots and each other, causally; every live slot's score grows by the column sums" (section 5)."""
        positions = list(range(self.num_seen_tokens, self.num_seen_tokens + queries.shape[1]))
        self._append(layer, keys, values, positions)
        outputs, probabilities = self._attend(layer, queries, positions, scaling)
        for h, attention in enumerate(probabilities):
            # "c[h,j] = sum_i A[h,i,j]".
            rows = list(attention)
            if self.config.score_queries == "strided":
                rows = self._sampled_rows(layer, h, rows)
            self._add_column_sums(layer, h, sum(rows, torch.zeros(attention.shape[1], dtype=torch.float64)))
        for head in range(self.num_kv_heads):
            group_probabilities = sum(probabilities[h] for h in self._group(head))
            if self.reread_done:
                self._raise_peaks(layer, head, group_probabilities)
            rows = self.window[layer][head] + list(group_probabilities)
            self.window[layer][head] = rows[-self.config.rate_window :]
        return outputs

    def _raise_peaks(self, layer: int, head: int, group_probabilities: torch.Tensor) -> None:
        """With `reread` a slot's score is the most that a query [n, S] gave it, from the second reading on."""
        for slot, peak in zip(self.slots[layer][head], group_probabilities.amax(dim=0).tolist(), strict=True):
            slot.score = max(slot.score, peak)

    def reread_chunk(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """One layer of one chunk of the second reading: appended, attended, scored, and taken away again."""
        count = len(self.slots[layer][0])
        positions = list(range(self.num_seen_tokens, self.num_seen_tokens + queries.shape[1]))
        self._append(layer, keys, values, positions)
        outputs, probabilities = self._attend(layer, queries, positions, scaling)
        self.reread_done = True
        for head in range(self.num_kv_heads):
            self._raise_peaks(layer, head, sum(probabilities[h] for h in self._group(head)))
            del self.slots[layer][head][count:]
        return outputs

    def _add_column_sums(self, layer: int, h: int, sums: torch.Tensor) -> None:
        """sums [slots]: what some queries of query head h brought to each slot in a prefill."""
        if self.log_weights is None:
            # First prefill: nothing is evicted yet, so slot index is position.
            total = sums.clone()
            total[: len(self.column_sums[layer][h])] += self.column_sums[layer][h]
            self.column_sums[layer][h] = total
        if self.config.selection == "reread":
            return  # scores are peaks
        # "a[g,j] = sum over the G query heads of the group of c[h,j]".
        for slot, column_sum in zip(self.slots[layer][h // self.group_size], sums.tolist(), strict=True):
            slot.score += column_sum

    def _sampled_rows(self, layer: int, h: int, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """`score_queries: strided`: what is added for the attention rows [slots] of a chunk's tokens in query head h.

        Token i of the prefill (from 0): its attention on tokens of the same prefill less than `score_near_distance`
        away counts once; the rest of its row counts `stride` times if i + 1 is a multiple of the stride, else it waits.
        """
        config = self.config
        if self.num_old[layer][h] is None:
            self.num_old[layer][h] = len(rows[0]) - len(rows)
        added = []
        for i, row in enumerate(rows, start=self.num_prefilled):
            token = torch.arange(len(row)) - self.num_old[layer][h]  # below 0: from before this prefill
            near = (token >= 0) & (i - token < config.score_near_distance)
            added.append(torch.where(near, row, 0.0))
            far = torch.where(near, 0.0, row)
            if (i + 1) % config.score_query_stride == 0:
                added.append(far * config.score_query_stride)
                self.waiting[layer][h] = []
            else:
                self.waiting[layer][h].append(far)
        return added

    def _add_waiting(self) -> None:
        """The prefill has ended: tokens that no sampled one stands for count once."""
        for layer, heads in enumerate(self.waiting):
            for h, rows in enumerate(heads):
                for row in rows:  # an earlier chunk's row lacks the later slots
                    wide = torch.zeros(len(self.slots[layer][h // self.group_size]), dtype=torch.float64)
                    wide[: len(row)] = row
                    self._add_column_sums(layer, h, wide)
        self._begin_sampling()

    def _begin_sampling(self) -> None:
        """With `score_queries: strided`: per layer and query head the slots when this prefill began; tokens since then;
        and the far parts of the attention rows [slots] of the tokens since the last sampled one."""
        self.num_old: list[list[int | None]] = [[None] * self.num_heads for _ in range(self.num_layers)]
        self.num_prefilled = 0
        self.waiting: list[list[list[torch.Tensor]]] = [
            [[] for _ in range(self.num_heads)] for _ in range(self.num_layers)
        ]

    def finish_prefill_chunk(self, num_tokens: int) -> None:
        self.num_seen_tokens += num_tokens
        self.num_prefilled += num_tokens
        self.pending = True

    def finalize(self) -> None:
        """ "`finalize` runs once, before the first decode step attends, or when called. Budgets are set there" """
        if not self.pending:
            return
        self.pending = False
        self._add_waiting()
        config = self.config
        # Section 4b: "rate r_i: mean attention token i got from the last rate_window (32) prompt queries, summed over
        # the group's query heads, plus 1e-9". A later turn's rates are those of its own last queries.
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                rows = self.window[layer][head]
                total = torch.zeros(len(self.slots[layer][head]), dtype=torch.float64)
                for row in rows:
                    total[: len(row)] += row  # zero where not causal: an earlier chunk's row lacks the later slots
                for slot, mass in zip(self.slots[layer][head], total.tolist(), strict=True):
                    slot.rate = mass / len(rows) + RATE_EPSILON
                self.window[layer][head] = []
        first = self.log_weights is None
        if first:
            self.log_weights = self._log_weights()
        # Section 5: "at the next finalize the layer weights w of the first prefill are kept, T is the number of tokens
        # seen, and each layer is evicted to its new S_l (absolute budgets stay as they are)".
        if first or config.keep_tokens is None:
            of_units = dataclasses.replace(config, protected_layers=sorted(self.protected))
            slots, self.ratios = layer_slots(of_units, self.log_weights, self.num_seen_tokens)
            # "N_l = floor(heavy_fraction * S_l), M_l = S_l - N_l".
            heavy = [floor(config.heavy_fraction * s) for s in slots]
            self.budgets = [(n, s - n) for n, s in zip(heavy, slots, strict=True)]
        for unit, (layer, heads) in enumerate(self.units):
            if unit in self.protected:
                continue
            # With a reach slots keep their pooled rates from here on; merging still goes by those measured.
            carries = config.selection_reach is not None and config.selection in ("window", "mixed")
            carried = [slot for head in heads if carries for slot in self.slots[layer][head]]
            pooled = [rate for head in heads if carries for rate in self.pooled_rates(self.slots[layer][head])]
            gains = [rate - slot.rate for rate, slot in zip(pooled, carried, strict=True)]
            if self.num_live(unit) > sum(self.budgets[unit]):
                self.evict(unit, pooled=True)
            for slot, gain in zip(carried, gains, strict=True):
                slot.rate = max(slot.rate + gain, 0.0)

    def _log_weights(self) -> list[float]:
        """Of every unit. `ranked`: w is the share of the unit's tokens among the floor(keep_ratio * all) highest ranked
        tokens of the model; ties: lower layer, head, position."""
        config = self.config
        if config.allocation != "ranked":
            per_unit = [[self.column_sums[layer][h] for head in heads for h in self._group(head)]
                        for layer, heads in self.units]  # fmt: skip
            return layer_log_weights(config, [torch.stack(sums) for sums in per_unit])
        everything = []
        for unit, (layer, heads) in enumerate(self.units):
            for head in heads:
                rank = self.ranks(self.slots[layer][head], pooled=True)
                everything += [(-r, unit, head, s.position) for r, s in zip(rank, self.slots[layer][head], strict=True)]
        ratio = config.keep_ratio or min(1.0, config.keep_tokens / self.num_seen_tokens)
        best = sorted(everything)[: floor(ratio * len(everything))]
        counts = [sum(unit == u for _, u, _, _ in best) for unit in range(len(self.units))]
        return [math.log(count / len(best)) if count else -700.0 for count in counts]

    # -- decode: section 5 --------------------------------------------------------------------------------------------

    def decode_step(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """One layer of one decode step. The caller has run `finalize`, and counted the new token in num_seen_tokens."""
        config = self.config
        position = self.num_seen_tokens - 1
        # "1. Append (k_t, v_t) with position t, score 0. 2. Attend over all live slots."
        self._append(layer, keys, values, [position])
        outputs, probabilities = self._attend(layer, queries, [position], scaling)
        for head in range(self.num_kv_heads):
            group_probabilities = sum(probabilities[h][0] for h in self._group(head)).tolist()
            for slot, p in zip(self.slots[layer][head], group_probabilities, strict=True):
                # "3. a[g,s] += the probabilities on slot s, summed over the group's query heads, the new slot's own
                # included."
                slot.score = max(slot.score, p) if config.selection == "reread" else slot.score + p
                # Section 4b: "r <- (1 - 1/rate_window) * r + p / rate_window ... (a new slot starts at its own p)".
                if slot.position == position:
                    slot.rate = p
                else:
                    slot.rate = (1 - 1 / config.rate_window) * slot.rate + p / config.rate_window
        # "4. When the live count reaches S_l + eviction_interval, evict the surplus over S_l". READING: protected
        # layers "keep everything", also while decoding.
        interval = config.eviction_interval
        for unit, (of_layer, _) in enumerate(self.units):
            if of_layer != layer or unit in self.protected or interval is None:
                continue
            if self.num_live(unit) >= sum(self.budgets[unit]) + interval:
                self.evict(unit, pooled=False)
        return outputs

    # -- section 3 ----------------------------------------------------------------------------------------------------

    def pooled_rates(self, slots: list[Slot]) -> list[float]:
        """What slots rank by at the end of a prefill, in position order."""
        config = self.config
        if config.selection_reach is not None:
            # A mean over the token and the live ones before it, sinks left out, whose weights fall by e every `reach`
            # positions and would add up to 1 without a beginning and gaps.
            rates = []
            for number, slot in enumerate(slots):
                lenders = [t for t in slots[: number + 1] if t.position >= config.num_sink_tokens]
                weights = [math.exp((t.position - slot.position) / config.selection_reach) for t in lenders]
                summed = sum(t.rate * weight for t, weight in zip(lenders, weights, strict=True))
                rates.append(summed * (1 - math.exp(-1 / config.selection_reach)) if lenders else slot.rate)
            return rates
        # "max-pooled over selection_pool (7) neighbouring positions at finalize". READING: over all live slots,
        # sinks and recent tokens too, by distance in POSITION (a later turn's slots have gaps).
        below, above = config.selection_pool // 2, (config.selection_pool - 1) // 2
        if config.selection_pool_side == "after":
            below, above = config.selection_pool - 1, 0
        return [max(t.rate for t in slots if -below <= t.position - s.position <= above) for s in slots]

    def ranks(self, slots: list[Slot], pooled: bool) -> list[float]:
        """What a KV head's slots are ranked by, larger is better."""
        config = self.config
        if config.selection == "recent":
            return [float(s.position) for s in slots]
        if config.selection in ("cumulative", "reread"):
            return [s.score for s in slots]
        rates = self.pooled_rates(slots) if pooled else [s.rate for s in slots]
        if config.selection == "window":
            return rates
        # mixed: "the pooled rate plus a / max(tokens seen - position, 32)".
        seen = self.num_seen_tokens
        return [r + s.score / max(seen - s.position, MIXED_MIN_AGE) for r, s in zip(rates, slots, strict=True)]

    def evict(self, unit: int, pooled: bool) -> None:
        """Sections 3 and 4: choose per KV head, then merge or drop."""
        config = self.config
        layer, heads = self.units[unit]
        num_heavy, num_recent = self.budgets[unit]
        kept: list[list[Slot]] = []
        evicted: list[list[Slot]] = []
        targets: list[list[Slot]] = []
        for slots in [self.slots[layer][head] for head in heads]:
            # "Keep the first num_sink_tokens (4), the last M_l by position, and the top N_l - num_sink_tokens of the
            # rest by score. Ties: the LOWER position is kept." READING: no more sinks than heavy slots.
            num_sinks = min(config.num_sink_tokens, num_heavy)
            sinks, recent = slots[:num_sinks], slots[len(slots) - num_recent :]
            rank = {s.position: r for s, r in zip(slots, self.ranks(slots, pooled), strict=True)}
            rest = sorted(slots[num_sinks : len(slots) - num_recent], key=lambda s: (-rank[s.position], s.position))
            heavy, out = rest[: num_heavy - num_sinks], rest[num_heavy - num_sinks :]
            kept.append(sorted(sinks + heavy + recent, key=lambda s: s.position))
            evicted.append(sorted(out, key=lambda s: s.position))
            if config.merge != "mass":
                targets.append(kept[-1])  # section 4: "max over kept j"
            elif config.merge_targets == "kept":
                # Section 4b: "all kept tokens but the sinks".
                targets.append(sorted(heavy + recent, key=lambda s: s.position))
            else:
                # Section 4b: "only the max(1, floor(tail_fraction * S_l)) lowest ranked (... ties: the later position)
                # among the kept tokens that are neither sinks nor recent". `heavy` is in rank order already.
                count = max(1, floor(config.tail_fraction * (num_heavy + num_recent)))
                # "while decoding no more than max_decode_tail": `pooled` tells an eviction of a prompt.
                if not pooled and config.max_decode_tail is not None:
                    count = min(count, config.max_decode_tail)
                targets.append(sorted(heavy[-count:], key=lambda s: s.position))
        if config.merge == "none":
            similarity = [[0.0] * len(out) for out in evicted]
            nearest = [[0] * len(out) for out in evicted]
            merged = [[False] * len(out) for out in evicted]
        else:
            pairs = [nearest_targets(out, t) for out, t in zip(evicted, targets, strict=True)]
            similarity = [[u for u, _ in head] for head in pairs]
            nearest = [[j for _, j in head] for head in pairs]
            merged = self.gate(unit, similarity)
            for head in range(len(heads)):
                for j, target in enumerate(targets[head]):
                    mine = [i for i in range(len(evicted[head])) if merged[head][i] and nearest[head][i] == j]
                    if mine:
                        self.merge_into(target, [evicted[head][i] for i in mine], [similarity[head][i] for i in mine])
        self.evictions.append(
            Eviction(
                layer=layer,
                num_seen_tokens=self.num_seen_tokens,
                evicted=[[s.position for s in out] for out in evicted],
                similarity=similarity,
                target=[[t[j].position if t else -1 for j in n] for t, n in zip(targets, nearest, strict=True)],
                merged=merged,
                threshold=self.thresholds[unit],
            )
        )
        for head, stay in zip(heads, kept, strict=True):
            self.slots[layer][head] = stay

    # -- section 4 ----------------------------------------------------------------------------------------------------

    def gate(self, unit: int, similarity: list[list[float]]) -> list[list[bool]]:
        """Which evicted tokens are merged, per KV head in position order."""
        config = self.config
        everything = sorted(u for head in similarity for u in head if u > -math.inf)
        if not everything:  # no head has a merge target
            return [[False] * len(head) for head in similarity]
        if config.gate == "quantile" and config.merge != "released":
            # "merge all but the drop_quantile = 0.25 least similar of this eviction, over all KV heads of the layer".
            dropped = floor(config.drop_quantile * len(everything))
            cut = everything[dropped] if dropped < len(everything) else math.inf
            return [[u >= cut for u in head] for head in similarity]
        # "first eviction of the sequence: tau = mean of u_i; later: tau = ema_beta * agg(u_i) + (1 - ema_beta) * tau".
        mean = sum(everything) / len(everything)
        if self.thresholds[unit] is None:
            tau = mean
        else:
            aggregate = everything[-1] if config.threshold_agg == "max" else mean
            tau = config.ema_beta * aggregate + (1 - config.ema_beta) * self.thresholds[unit]
        self.thresholds[unit] = tau
        if config.merge == "released":
            # Section 6: "evicted row n passes if the MEAN over heads of u at row n reaches tau".
            rows = len(similarity[0])
            passes = [sum(head[n] for head in similarity) / len(similarity) >= tau for n in range(rows)]
            return [list(passes) for _ in similarity]
        # "Gate: merge i if u_i >= tau, else drop it for good."
        return [[u >= tau for u in head] for head in similarity]

    def merge_into(self, target: Slot, sources: list[Slot], similarity: list[float]) -> None:
        """Merge into the kept slot j = `target` the tokens M_j = `sources` gated to it."""
        config = self.config
        if config.merge == "mass":
            # Section 4b: "m = r_j + sum r_i; v_j <- (r_j v_j + sum r_i v_i) / m;
            # log_mass_j <- min(log_mass_j + log(m / r_j), max_log_mass = 3); r_j <- m; the key stays as it is".
            m = target.rate + sum(s.rate for s in sources)
            if m == 0:  # READING: every probability underflowed, so there is nothing to weigh
                return
            target.value = (target.rate * target.value + sum(s.rate * s.value for s in sources)) / m
            growth = math.log(m / target.rate) if target.rate > 0 else math.inf
            target.log_mass = min(target.log_mass + growth, config.max_log_mass)
            target.rate = m
            return
        if config.merge == "released":
            # Section 6: "kept j becomes the mean of itself and the u_i * k_i merged into it (scatter_reduce(mean,
            # include_self)), the same for v".
            n = 1 + len(sources)
            target.key = (target.key + sum(u * s.key for u, s in zip(similarity, sources, strict=True))) / n
            target.value = (target.value + sum(u * s.value for u, s in zip(similarity, sources, strict=True))) / n
            return
        # "k_j <- (e*k_j + sum exp(u_i) k_i) / (e + sum exp(u_i)), the same for v_j ... Position and score of j stay".
        weights = [math.exp(u) for u in similarity]
        own = config.self_weight
        total = own + sum(weights)
        target.value = (own * target.value + sum(w * s.value for w, s in zip(weights, sources, strict=True))) / total
        if config.merge == "keys_values":
            target.key = (own * target.key + sum(w * s.key for w, s in zip(weights, sources, strict=True))) / total

    # -- looking at it ------------------------------------------------------------------------------------------------

    def snapshot(self) -> list[dict[str, torch.Tensor]]:
        """Per layer, in position order: positions [Hkv, S] int64, keys and values [Hkv, S, D], scores, rates, log_mass
        [Hkv, S] float64. A head that holds less than another ends in slots of position -1 with zeros."""
        layers = []
        for heads in self.slots:
            width, none = max(len(slots) for slots in heads), torch.zeros_like(heads[0][0].key)
            heads = [slots + [Slot(none, none, -1)] * (width - len(slots)) for slots in heads]
            entry = {
                "positions": torch.tensor([[s.position for s in slots] for slots in heads]),
                "keys": torch.stack([torch.stack([s.key for s in slots]) for slots in heads]),
                "values": torch.stack([torch.stack([s.value for s in slots]) for slots in heads]),
            }
            for name, attribute in (("scores", "score"), ("rates", "rate"), ("log_mass", "log_mass")):
                numbers = [[getattr(s, attribute) for s in slots] for slots in heads]
                entry[name] = torch.tensor(numbers, dtype=torch.float64)
            layers.append(entry)
        return layers


def unit(keys: list[torch.Tensor]) -> torch.Tensor:
    """ "Zero-norm keys have cosine 0." """
    stacked = torch.stack(keys)
    norms = stacked.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, stacked / norms, torch.zeros_like(stacked))


def nearest_targets(evicted: list[Slot], targets: list[Slot]) -> list[tuple[float, int]]:
    """ "u_i = max over kept j of cos(k_i, k_j), j*(i) its argmax (ties: lowest position)"; targets in position order.

    Without a target the similarity is -inf, which no gate lets through.
    """
    if not targets or not evicted:
        return [(-math.inf, 0) for _ in evicted]
    cosines = (unit([s.key for s in evicted]) @ unit([t.key for t in targets]).T).tolist()
    return [(max(row), row.index(max(row))) for row in cosines]


# ---------------------------------------------------------------------------------------------------------------------
# The model around it
# ---------------------------------------------------------------------------------------------------------------------


def use_float64_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Let every RMSNorm of `model` compute in the dtype of its input (Hugging Face's computes in float32)."""

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


class OracleSession:
    """One sequence going through a Llama-type model: `feed` tokens in any order of prompts, chunks and decode steps."""

    def __init__(self, model: torch.nn.Module, config: OracleConfig) -> None:
        if model.dtype != torch.float64:
            model = copy.deepcopy(model).double()
        self.model, self.decoder = model.eval(), model.model
        first = self.decoder.layers[0].self_attn
        self.head_dim = first.head_dim
        num_heads = first.q_proj.out_features // self.head_dim
        num_kv_heads = first.k_proj.out_features // self.head_dim
        self.cache = OracleCache(config, len(self.decoder.layers), num_heads, num_kv_heads)
        self.apply_rotary = importlib.import_module(type(self.decoder).__module__).apply_rotary_pos_emb
        for layer in self.decoder.layers:
            if getattr(layer.self_attn, "sliding_window", None) is not None:
                raise ValueError("sliding windows are not part of the specification")

    def reread(self, token_ids: list[int]) -> None:
        """The second reading of a prompt: each chunk is one forward after the prompt, and is forgotten."""
        chunk = self.cache.config.reread_chunk
        for start in range(0, len(token_ids), chunk):
            self.feed(token_ids[start : start + chunk], again=True)

    @torch.no_grad()
    def feed(self, token_ids: list[int], again: bool = False) -> torch.Tensor:
        """One forward. Returns the logits [n, vocabulary] of its tokens. `again`: of a second reading."""
        cache = self.cache
        start = cache.num_seen_tokens
        # Section 5: "Prefill is every forward with more than one token since the last decode step". READING: the very
        # first forward is prefill whatever its length.
        decoding = len(token_ids) == 1 and start > 0 and not again
        if decoding:
            cache.finalize()
            cache.num_seen_tokens += 1
        hidden = self.decoder.embed_tokens(torch.tensor([token_ids]))
        position_ids = torch.arange(start, start + len(token_ids))[None]
        cos, sin = self.decoder.rotary_emb(hidden, position_ids)
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            queries = self._heads(attention.q_proj(normed), getattr(attention, "q_norm", None))
            keys = self._heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
            values = self._heads(attention.v_proj(normed), None)
            queries, keys = self.apply_rotary(queries, keys, cos, sin)
            step = cache.decode_step if decoding else cache.reread_chunk if again else cache.prefill_chunk
            outputs = step(index, queries[0], keys[0], values[0], attention.scaling)  # [Hq, n, D]
            hidden = hidden + attention.o_proj(outputs.transpose(0, 1).reshape(1, len(token_ids), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if not decoding and not again:
            cache.finish_prefill_chunk(len(token_ids))
        return self.model.lm_head(self.decoder.norm(hidden))[0]

    def _heads(self, x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        x = x.view(1, x.shape[1], -1, self.head_dim)
        return (x if norm is None else norm(x)).transpose(1, 2)


@dataclass
class OracleResult:
    tokens: list[int]  # the greedy tokens
    logits: torch.Tensor  # [num_new_tokens, vocabulary], row i chose tokens[i]
    budgets: list[tuple[int, int]]  # per layer (num_heavy, num_recent)
    ratios: list[float]  # per layer r_l
    achieved_ratio: float  # kept slots over L * T, right after finalize
    column_sums: list[torch.Tensor]  # per layer [Hq, T], of the first prefill
    thresholds_after_finalize: list[float | None]
    thresholds: list[float | None]
    after_finalize: list[dict[str, torch.Tensor]]  # OracleCache.snapshot
    final: list[dict[str, torch.Tensor]]
    evictions: list[Eviction]
    session: OracleSession  # to go on from here


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many tiny operations: several threads only wait for each other, here by a factor of ten and more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_oracle(
    model: torch.nn.Module,
    input_ids: torch.Tensor | list[int],
    oracle_config: OracleConfig,
    num_new_tokens: int,
    chunks: list[int] | None = None,
    forced_tokens: list[int] | None = None,
    session: OracleSession | None = None,
) -> OracleResult:
    """Prefill (in `chunks`, lengths that sum to the prompt), finalize, and decode greedily.

    As in Hugging Face's generate, the last new token is not fed back: n new tokens are one prefill and n - 1 decode
    steps. `forced_tokens` are fed in place of the greedy ones. `session` continues an earlier result's session, with
    `input_ids` as a later turn. A chunk of one token that is not the very first forward is a decode step.
    """
    session = session or OracleSession(model, oracle_config)
    cache = session.cache
    ids = [int(i) for i in input_ids]
    chunks = chunks or [len(ids)]
    if sum(chunks) != len(ids):
        raise ValueError(f"chunks {chunks} of a prompt of {len(ids)} tokens")
    start = 0
    first = cache.log_weights is None
    for length in chunks:
        last = session.feed(ids[start : start + length])[-1]
        start += length
    if first and cache.config.selection == "reread":
        session.reread(ids)
    cache.finalize()
    after_finalize, thresholds_after_finalize = cache.snapshot(), list(cache.thresholds)
    kept = sum(len(slots) for heads in cache.slots for slots in heads)
    achieved_ratio = kept / (cache.num_layers * cache.num_kv_heads * cache.num_seen_tokens)
    tokens, logits = [], []
    for step in range(num_new_tokens):
        logits.append(last)
        tokens.append(int(last.argmax()))
        if step + 1 < num_new_tokens:
            last = session.feed([tokens[-1] if forced_tokens is None else int(forced_tokens[step])])[-1]
    return OracleResult(
        tokens=tokens,
        logits=torch.stack(logits) if logits else torch.zeros(0, last.shape[0], dtype=last.dtype),
        budgets=list(cache.budgets),
        ratios=list(cache.ratios),
        achieved_ratio=achieved_ratio,
        column_sums=[torch.stack(sums) for sums in cache.column_sums],
        thresholds_after_finalize=thresholds_after_finalize,
        thresholds=list(cache.thresholds),
        after_finalize=after_finalize,
        final=cache.snapshot(),
        evictions=list(cache.evictions),
        session=session,
    )
