"""The attention that each slot received, summed over queries (paper section 3.2).

Shape legend: B rows, b rows of a group, Hq query heads, Hkv KV heads, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.statistics import group_sum
from d2o_dist.slots.slots import Slots, stats_dtype


class ColumnSums:
    """Sums of a running prefill. Those of a KV head go to the scores of its slots.

    Args:
        by_query_head: whether those of each query head are kept too, for the variances of a first prefill.
    """

    def __init__(self, ranks: RequestRanks, *, by_query_head: bool) -> None:
        self._ranks = ranks
        self._by_query_head = by_query_head
        self._sums: Tensor | None = None  # [B, Hq, S]

    def grow(self, q: Tensor, width: int) -> None:
        """Before a chunk with queries q [B, Hq, n, D], after which there are S = `width` slots."""
        if not self._by_query_head or (self._sums is not None and width <= self._sums.shape[-1]):
            return
        # Of chunks of an unknown number: moved now and then, not at each.
        room = width if self._sums is None else width + width // 4
        grown = torch.zeros(*q.shape[:2], room, dtype=stats_dtype(q.dtype), device=q.device)
        if self._sums is not None:
            grown[:, :, : self._sums.shape[-1]] = self._sums
        self._sums = grown

    def observe(self, slots: Slots, rows: slice, sums: Tensor) -> None:
        """Add what a group of rows gave: [b, Hq, <= S]."""
        width = sums.shape[-1]
        slots.scores[rows, :, :width] += self._ranks.sum_replicas(group_sum(sums, slots.scores.shape[1]))
        if self._sums is not None:
            self._sums[rows, :, :width] += sums

    def deviations(self, row: int, count: int, power: int) -> Tensor:
        """[Hq] sum of the deviations of a row's first `count` sums from 1, to this power."""
        return (self._sums[row, :, :count] - 1).pow(power).sum(-1)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        if self._sums is not None:
            self._sums = self._sums[list(rows)]
