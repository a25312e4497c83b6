"""What the gate decides for one eviction, from the reports of all KV heads of a layer; and how reports travel.

Shape legend: B rows, h KV heads at hand, H KV heads of the layer, E evicted tokens, X report width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import read_reports
from d2o_dist.slots.slots import D2OState

# Finds the nearest target of each evicted key; the contract of `policy.merge.nearest_kept`.
Nearest = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Whole numbers below it are exact in float32.
MAX_FOUND = 1 << 24


def with_found(reports: Tensor, *columns: Tensor) -> Tensor:
    """[B, h, X + n E]: the reports [B, h, X] of heads, and behind them what they found of each evicted token, n columns
    [B, h, E] of whole numbers below `MAX_FOUND` or of the reports' own dtype."""
    return torch.cat([reports, *(column.to(reports.dtype) for column in columns)], -1)


def found_of(everyone: Tensor, here: slice, num_reports: int, num_evicted: int) -> tuple[Tensor, ...]:
    """Of what `with_found` made of all heads [B, H, X + n E]: all reports [B, H, X], and the n columns [B, h, E] of the
    heads `here`."""
    reports, found = everyone[..., :num_reports], everyone[:, here, num_reports:]
    return reports, *found.split(num_evicted, -1)


def judge(
    similarity: Tensor, valid: Tensor, reports: Tensor, state: D2OState, config: D2OConfig
) -> tuple[Tensor, D2OState]:
    """Which evicted tokens of the heads at hand are merged, [B, h, E] bool, and the state after the eviction.

    Args:
        similarity: [B, h, E] cosine to the nearest target, of the heads at hand; valid: [B, 1, E] bool.
        reports: [B, H, X] of all heads (`head_reports`).
    """
    layer = read_reports(reports)
    threshold = config.merge.gate.move(state.threshold, layer)
    merged = config.merge.gate.open(similarity, valid, layer, threshold)
    num_merged = merged.sum((1, 2))
    return merged, _count(state, threshold, num_merged, valid.sum((1, 2)) * similarity.shape[1] - num_merged)


def count_dropped(valid: Tensor, num_heads: int, state: D2OState) -> D2OState:
    """The state after an eviction that merges nothing; valid: [B, 1, E] bool, evicted from each of the heads."""
    num_evicted = valid.sum((1, 2)) * num_heads
    return _count(state, state.threshold, torch.zeros_like(num_evicted), num_evicted)


def _count(state: D2OState, threshold: Tensor | None, num_merged: Tensor, num_dropped: Tensor) -> D2OState:
    """The state after an eviction; counts [B] are of the heads at hand."""
    return D2OState(
        threshold,
        num_merged if state.num_merged is None else state.num_merged + num_merged,
        num_dropped if state.num_dropped is None else state.num_dropped + num_dropped,
    )
