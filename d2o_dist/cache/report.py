"""What a cache was asked to keep and what it holds: numbers, a table, a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.cache.window import WindowLayer
from d2o_dist.slots.windows import kept, kind_of


@dataclass(frozen=True)
class LayerReport:
    """One layer. Per-row lists are in the order of the batch; tokens are counted per KV head.

    Attributes:
        layer: index among the model's layers with attention; kind: `compressed`, `protected`,
            `sliding` or `chunked`.
        num_heavy, num_recent: the budget of each row; None before finalize and for layers that are never evicted.
        kv_len: slots held by each row. Where heads have budgets of their own, these three are means over the KV heads.
        dispersion: statistic that the budget came from, per row; None if the budget rule does not use it.
        threshold: moving similarity threshold per row; None before the first eviction of a row. Where heads have
            budgets of their own, the mean over the KV heads of this rank.
        num_merged, num_dropped: evicted tokens folded into others or lost so far, over all rows and the KV heads that
            this rank knows of: all of the layer on one device, its own where ranks share the heads.
        num_bytes, full_bytes: keys and values held (by all ranks), and what an uncompressed cache would hold.
    """

    layer: int
    kind: str
    num_heavy: list[float] | None
    num_recent: list[float] | None
    kv_len: list[float]
    dispersion: list[float] | None
    threshold: list[float | None]
    num_merged: int
    num_dropped: int
    num_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """The whole cache.

    Attributes:
        requested_keep_ratio: `keep_ratio`, or `keep_tokens` over the tokens seen at the last finalize.
        achieved_keep_ratio: tokens held over tokens seen, in the layers that are compressed or protected; None if no
            token was seen, as by a cache that the model was never given.
        held_bytes, full_bytes: keys and values of all layers, windows and chunks included in both as they are; of the
            whole request, however many ranks share it.
        allocated_bytes: all buffers of this rank: room to grow, positions, statistics and states included.
        num_seen_tokens: per row, padding not counted.
        budget_rule: by which layers share; with few layers it may be a simpler one than the configuration's.
        state_bytes: of this rank, what layers keep that hold no tokens (linear attention, Mamba, convolutions); in no
            ratio, and in neither `held_bytes` nor `full_bytes`.
        num_short_slots: per row, slots that layers lack of their budgets, for they were evicted before all shares were
            known (`reading: layerwise`).
    """

    phase: str
    requested_keep_ratio: float | None
    achieved_keep_ratio: float | None
    held_bytes: int
    full_bytes: int
    allocated_bytes: int
    num_seen_tokens: list[int]
    num_short_slots: list[int]
    layers: list[LayerReport]
    budget_rule: str
    state_bytes: int = 0

    @property
    def compression_ratio(self) -> float | None:
        """Fraction of the tokens removed; None if none was seen."""
        return None if self.achieved_keep_ratio is None else 1 - self.achieved_keep_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON."""
        return {**dataclasses.asdict(self), "compression_ratio": self.compression_ratio}

    def __str__(self) -> str:
        if self.achieved_keep_ratio is None:
            return "this cache has seen no token: no forward of a model was given it as past_key_values"
        asked = "-" if self.requested_keep_ratio is None else f"{self.requested_keep_ratio:.4f}"
        lines = [
            f"keep ratio: requested {asked}, achieved {self.achieved_keep_ratio:.4f}   phase: {self.phase}   "
            f"tokens seen: {_brief(self.num_seen_tokens)}",
            f"bytes: {_mib(self.held_bytes)} held of {_mib(self.full_bytes)} full "
            f"({_mib(self.allocated_bytes)} allocated"
            + (f", {_mib(self.state_bytes)} of it states of other layers)" if self.state_bytes else ")")
            + f"   budget rule: {self.budget_rule}",
            f"{'layer':>5} {'kind':<10} {'heavy':>9} {'recent':>9} {'held':>9} {'dispersion':>10} {'threshold':>9} "
            f"{'merged':>8} {'dropped':>8} {'MiB':>8}",
        ]
        if any(self.num_short_slots):
            short = _brief(self.num_short_slots)
            lines.insert(2, f"slots that layers lack, evicted before all shares were known: {short}")
        for layer in self.layers:
            lines.append(
                f"{layer.layer:>5} {layer.kind:<10} {_brief(layer.num_heavy):>9} {_brief(layer.num_recent):>9} "
                f"{_brief(layer.kv_len):>9} {_brief(layer.dispersion):>10} {_brief(layer.threshold):>9} "
                f"{layer.num_merged:>8} {layer.num_dropped:>8} {layer.num_bytes / 2**20:>8.2f}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw budgets and dispersion by layer into an image file (mean over rows). Needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed (extra `demo`). ValueError: the cache has seen no token.
        """
        from matplotlib.figure import Figure

        if self.achieved_keep_ratio is None:
            raise ValueError("there is nothing to draw: the cache has seen no token")

        index = [layer.layer for layer in self.layers]
        held = [sum(layer.kv_len) / max(len(layer.kv_len), 1) for layer in self.layers]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        left = figure.add_subplot()
        colors = {"compressed": "#4878a8", "protected": "#c08040", "sliding": "#a0a0a0", "chunked": "#a0a0a0"}
        for kind, color in colors.items():
            bars = [(i, h) for i, h, layer in zip(index, held, self.layers, strict=True) if layer.kind == kind]
            if bars:
                left.bar(*zip(*bars, strict=True), color=color, label=kind)
        left.set(xlabel="layer", ylabel="slots held (mean over rows)")
        seen = _brief(self.num_seen_tokens)
        left.set_title(f"achieved keep ratio {self.achieved_keep_ratio:.3f}, seen {seen} tokens")
        known = [layer for layer in self.layers if layer.dispersion]
        points = [(layer.layer, sum(layer.dispersion) / len(layer.dispersion)) for layer in known]
        if points:
            right = left.twinx()
            right.plot(*zip(*points, strict=True), color="#b03030", marker="o", markersize=3, label="dispersion")
            right.set_ylabel("dispersion")
            right.legend(loc="upper right")
        left.legend(loc="upper left")
        path = Path(path)
        figure.savefig(path)
        return path


def make_report(cache: CompressedCache, state_bytes: int = 0) -> CacheReport:
    """The report of a cache as it stands; state_bytes: of layers that are not in it, on this rank."""
    reports = [_layer_report(cache, index) for index in range(len(cache.layers))]
    counted = [report for report in reports if report.kind not in ("sliding", "chunked")]
    seen = sum(cache.num_seen) * len(counted)
    held = sum(sum(report.kv_len) for report in counted)
    config = cache.config
    requested = config.keep_ratio
    if requested is None and cache.plans:
        tokens = sum(plan.num_tokens for plan in cache.plans)
        requested = min(1.0, config.keep_tokens * len(cache.plans) / tokens)
    return CacheReport(
        phase=cache.phase,
        requested_keep_ratio=requested,
        achieved_keep_ratio=held / seen if seen else None if not cache.num_seen else 1.0,
        held_bytes=sum(report.num_bytes for report in reports),
        full_bytes=sum(report.full_bytes for report in reports),
        allocated_bytes=sum(layer.num_allocated_bytes for layer in cache.layers) + state_bytes,
        num_seen_tokens=list(cache.num_seen),
        num_short_slots=[plan.num_short for plan in cache.plans or []],
        layers=reports,
        budget_rule=config.budget.name,
        state_bytes=state_bytes,
    )


def _layer_report(cache: CompressedCache, index: int) -> LayerReport:
    layer = cache.layers[index]
    kv_len, seen = list(layer.mean_kv_len), cache.num_seen
    heads = cache.kv_heads(index)
    per_token = heads * layer.token_bytes
    num_bytes = round(heads * layer.slot_bytes * sum(kv_len))
    if isinstance(layer, WindowLayer):
        full = [kept(layer.window, count) for count in seen]
        return LayerReport(
            index, kind_of(layer.window), None, None, kv_len, None, [None] * len(seen), 0, 0, num_bytes,
            per_token * sum(full),
        )  # fmt: skip
    state, heads = layer.state, layer.budgeted
    first = cache.full_layers.index(index) * len(heads)
    budgets = layer.slot_budgets
    num_heavy = num_recent = None
    if budgets is not None:
        splits = [[cache.config.split(slots) for slots in head.slot_budgets] for head in heads]
        num_heavy, num_recent = ([_mean(part) for part in zip(*of, strict=True)] for of in (
            [[heavy for heavy, _ in head] for head in splits], [[recent for _, recent in head] for head in splits]
        ))  # fmt: skip
    plans = [plan.dispersions[first : first + len(heads)] for plan in cache.plans or [] if plan.dispersions]
    dispersion = [_mean(one) for one in plans]
    protected = cache.plans is not None and budgets is None
    threshold = [None] * len(seen) if state.threshold is None else [
        None if value != value else value for value in state.threshold.tolist()
    ]  # fmt: skip
    return LayerReport(
        layer=index,
        kind="protected" if protected else "compressed",
        num_heavy=num_heavy,
        num_recent=num_recent,
        kv_len=kv_len,
        dispersion=dispersion or None,
        threshold=threshold,
        num_merged=0 if state.num_merged is None else int(state.num_merged.sum()),
        num_dropped=0 if state.num_dropped is None else int(state.num_dropped.sum()),
        num_bytes=num_bytes,
        full_bytes=per_token * sum(seen),
    )


def _mean(values: Sequence[float]) -> float:
    """Of one value, the value itself."""
    return values[0] if len(values) == 1 else sum(values) / len(values)


def _brief(values: list[Any] | None) -> str:
    """One number, or the range of several."""
    known = [value for value in values or [] if value is not None]
    if not known:
        return "-"

    def show(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    low, high = min(known), max(known)
    return show(low) if low == high else f"{show(low)}-{show(high)}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
