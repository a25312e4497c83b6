"""A layer whose KV heads have budgets of their own: each of them is a layer of one head.

Heads differ far more than layers do: a few look tokens up anywhere in the prompt, most never leave their neighbourhood.
Heads are attended one after the other.

Where ranks share the heads, every rank knows how many slots each head of the layer holds, its own or not: that follows
from lengths and budgets alone, which all ranks know. So nothing is asked of other ranks to evict, or to report.

Shape legend: B rows, Hq query heads, Hkv KV heads of this rank, n tokens of a chunk, S slots of the fullest head, D
head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.cache.layer import FullLayer
from d2o_dist.cache.rows import Rows
from d2o_dist.cache.step import LayerStep
from d2o_dist.cache.store import SlotStore
from d2o_dist.slots.slots import D2OState, Slots


class HeadElsewhere:
    """A KV head that another rank holds: how many slots it has there.

    Attributes:
        kv_len, slot_budgets: as of the `FullLayer` that it is there.
    """

    def __init__(self, kv_len: Sequence[int]) -> None:
        self.kv_len = list(kv_len)
        self.slot_budgets: list[int] | None = None

    def advance(self, counts: Sequence[int]) -> None:
        """Count what each row took."""
        self.kv_len = [held + new for held, new in zip(self.kv_len, counts, strict=True)]

    def evict(self, slack: int) -> None:
        """Count the eviction of each row that holds `slack` slots or more over its budget."""
        if self.slot_budgets is not None:
            both = zip(self.kv_len, self.slot_budgets, strict=True)
            self.kv_len = [slots if held >= slots + slack else held for held, slots in both]

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.kv_len = [self.kv_len[row] for row in host]
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]


class HeadwiseLayer:
    """One layer, after its first prefill.

    Args:
        layer: all of this rank's heads; here: which heads of the whole model's `num_heads` they are.

    Attributes:
        units: one layer a KV head of this rank; elsewhere: the heads of other ranks.
        budgeted: all heads of the layer, in order.
        store: all slots of the units side by side, to look at.
    """

    def __init__(self, layer: FullLayer, here: range, num_heads: int) -> None:
        assert layer.store.slots.positions.shape[1] == len(here)
        kv_len = layer.store.kv_len
        self.units = [layer.of_head(number) for number in range(len(here))]
        assert all(unit.kv_len == kv_len for unit in self.units)
        before, after = ([HeadElsewhere(kv_len) for _ in range(count)] for count in (here.start, num_heads - here.stop))
        self.elsewhere = before + after
        self.budgeted: list[FullLayer | HeadElsewhere] = before + self.units + after

    @property
    def store(self) -> HeadStores:
        """All slots of all heads."""
        return HeadStores([unit.store for unit in self.units])

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row's fullest head, on whichever rank."""
        return [max(held) for held in zip(*(head.kv_len for head in self.budgeted), strict=True)]

    @property
    def mean_kv_len(self) -> list[float]:
        """Slots of each row, mean over its heads on all ranks."""
        return [sum(held) / len(held) for held in zip(*(head.kv_len for head in self.budgeted), strict=True)]

    @property
    def slot_budgets(self) -> list[float] | None:
        """Slots each row is evicted to, mean over its heads on all ranks; None before finalize and for a protected
        layer."""
        budgets = [head.slot_budgets for head in self.budgeted]
        if any(one is None for one in budgets):
            return None
        return [sum(slots) / len(slots) for slots in zip(*budgets, strict=True)]

    @property
    def state(self) -> D2OState:
        """Thresholds averaged over the heads of this rank, counts added up."""

        def over_heads(name: str, join: Callable[[Tensor], Tensor]) -> Tensor | None:
            values = [getattr(unit.state, name) for unit in self.units]
            known = [value for value in values if value is not None]
            return join(torch.stack(known)) if known else None

        return D2OState(
            over_heads("threshold", lambda x: x.nanmean(0)),
            over_heads("num_merged", lambda x: x.sum(0)),
            over_heads("num_dropped", lambda x: x.sum(0)),
        )

    # ---- attention -------------------------------------------------------------------------------------------------

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """As `FullLayer.prefill`."""
        for head in self.elsewhere:
            head.advance(rows.counts)
        heads = zip(self.units, *self._by_head(q, k, v), strict=True)
        return torch.cat([unit.prefill(*of_head, scale, rows, num_seen) for unit, *of_head in heads], 1)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *steps: LayerStep) -> Tensor:
        """As `FullLayer.decode`, with a step for each head."""
        heads = zip(self.units, *self._by_head(q, k, v), steps, strict=True)
        return torch.cat([unit.decode(*of_head, scale, step) for unit, *of_head, step in heads], 1)

    def _by_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Sequence[Tensor], ...]:
        return q.chunk(len(self.units), 1), k.split(1, 1), v.split(1, 1)

    # ---- the rest is that of the heads -----------------------------------------------------------------------------

    def complete_statistics(self) -> None:
        """As `FullLayer.complete_statistics`."""
        for unit in self.units:
            unit.complete_statistics()

    def finish_prefill(self) -> None:
        """As `FullLayer.finish_prefill`."""
        for unit in self.units:
            unit.finish_prefill()

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        for head in self.budgeted:
            head.select_rows(index)


class HeadStores:
    """The stores of a layer's heads, looked at together."""

    def __init__(self, stores: list[SlotStore]) -> None:
        self._stores = stores

    @property
    def shape(self) -> tuple[int, int]:
        """(Hkv, D)."""
        return len(self._stores), self._stores[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._stores[0].dtype

    @property
    def num_allocated_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(store.num_allocated_bytes for store in self._stores)

    @cached_property
    def slots(self) -> Slots:
        """A copy, [B, Hkv, S, ...]: heads with fewer slots end in unused ones, of position -1."""
        heads = [store.slots for store in self._stores]
        width = max(one.positions.shape[-1] for one in heads)

        def join(name: str) -> Tensor:
            parts = [getattr(one, name) for one in heads]
            value = -1 if name == "positions" else 0
            sides = [(0, 0) * (part.dim() - 3) + (0, width - part.shape[2]) for part in parts]
            return torch.cat([pad(part, side, value=value) for part, side in zip(parts, sides, strict=True)], 1)

        return Slots(*(join(name) for name in ("keys", "values", "positions", "scores", "rates", "log_mass")))
