"""One eviction of one layer, from slots to slots: the composition of select, nearest, threshold, gate and merge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.merge import merge_into, nearest_kept
from d2o_dist.core.select import rank_scores, select
from d2o_dist.core.threshold import open_gate, similarity_stats, update_threshold
from d2o_dist.core.types import D2OState, LayerBudget, Slots


def compress_layer(
    slots: Slots,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    *,
    finalize: bool = True,
    num_seen_tokens: Tensor | None = None,
    nearest: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = nearest_kept,
) -> tuple[Slots, D2OState]:
    """Evict each row down to its budget and merge what was evicted.

    Args:
        slots: [B, Hkv, S, ...]; unused slots have position -1; rows may hold different numbers.
        budget: `num_heavy` and `num_recent`, ints or [B].
        state: `D2OState()` before the first eviction of the sequence.
        finalize: at the end of a prefill (rates are max-pooled for the selection) rather than while decoding.
        num_seen_tokens: [B] tokens seen by each row; by default one more than its last position.
        nearest: what finds the nearest target of each evicted key; the same contract as `nearest_kept`.

    Returns:
        Slots by ascending position, as many as the fullest row holds, and the new state.
    """
    slots = slots.in_order()
    if num_seen_tokens is None:
        num_seen_tokens = slots.positions.amax((1, 2)) + 1
    ranking = rank_scores(slots, config, finalize=finalize, num_seen_tokens=num_seen_tokens)
    selection = select(slots, budget, ranking, config)
    if selection is None:
        return slots.map(lambda tensor: tensor[:, :, : int(slots.kv_len.max())]), state

    kept = slots.take(selection.keep_idx, selection.keep_valid)
    evicted = slots.take(selection.evict_idx, selection.evict_valid)
    valid = selection.evict_valid.expand_as(selection.evict_idx)
    num_evicted = valid.sum((1, 2))
    if config.merge == "none":
        return kept, count_evicted(state, torch.zeros_like(num_evicted), num_evicted)

    similarity, target = nearest(evicted.keys, kept.keys, selection.is_target)
    stats = similarity_stats(similarity, valid & similarity.isfinite())
    threshold = update_threshold(state.threshold, stats, config)
    merged = open_gate(similarity, valid, threshold, config)
    kept = merge_into(kept, evicted, similarity, target, merged, config)
    num_merged = merged.sum((1, 2))
    state = count_evicted(state, num_merged, num_evicted - num_merged)
    return kept, D2OState(threshold, state.num_merged, state.num_dropped)


def count_evicted(state: D2OState, num_merged: Tensor, num_dropped: Tensor) -> D2OState:
    """The state with the counts [B] of one eviction added."""
    return D2OState(
        state.threshold,
        num_merged if state.num_merged is None else state.num_merged + num_merged,
        num_dropped if state.num_dropped is None else state.num_dropped + num_dropped,
    )
