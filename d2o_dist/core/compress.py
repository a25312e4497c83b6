"""One eviction of one layer, from slots to slots: the composition of select, nearest, threshold, gate and merge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2o_dist.core.select import add_rates, choose, ranking_rates, rate_gain, selection_of
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import head_reports, read_reports
from d2o_dist.policy.merge import MergeRule, merge_into, nearest_kept
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots

# Finds the nearest target of each evicted key; the contract of `policy.merge.nearest_kept`.
Nearest = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Folds evicted tokens into kept ones; the contract of `policy.merge.merge_into`.
Merge = Callable[[Slots, Slots, Tensor, Tensor, Tensor, MergeRule], Slots]
# [B, h, X] of the heads at hand -> [B, H, X] of all heads, in the order of the heads; the same on every rank.
GatherHeads = Callable[[Tensor], Tensor]
# Whole numbers below it are exact in float32.
MAX_FOUND = 1 << 24


def evict_ordered(
    slots: Slots,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    *,
    finalize: bool = True,
    num_seen_tokens: Tensor | None = None,
    nearest: Nearest = nearest_kept,
    merge: Merge = merge_into,
    gather_heads: GatherHeads = lambda reports: reports,
    choice: Tensor | None = None,
    here: slice | None = None,
) -> tuple[Slots, D2OState]:
    """`compress_layer` of slots that lie in order of position, unused ones last, and of some heads of the layer.

    Args:
        num_seen_tokens: [B] tokens seen by each row; by default one more than its last position.
        nearest, merge: what finds the nearest target of each evicted key, and what folds it in.
        gather_heads: asked once if anything is merged and anything stays, else never.

    Where other ranks hold copies of these heads, one of them decides for all:

    Args:
        choice: what becomes of each slot, as it chose (`core.select.choose`); None: it is chosen here.
        here: which of the heads that `gather_heads` answers with are its own of these. The reports then carry what it
            found of each evicted token (`with_found`), and that is what counts.
    """
    if num_seen_tokens is None:
        num_seen_tokens = slots.positions.amax((1, 2)) + 1
    rates = ranking_rates(slots, config, finalize=finalize)
    gain = rate_gain(slots, rates, config)
    if choice is None:
        ranking = config.score.rank(slots, rates, num_seen_tokens)
        choice = choose(slots, budget, ranking, config, finalize=finalize)
    if choice is None:
        slots = slots if gain is None else add_rates(slots, gain)
        return slots.map(lambda tensor: tensor[:, :, : int(slots.kv_len.max())]), state
    selection = selection_of(choice, slots, budget)

    def settled(kept: Slots) -> Slots:
        return kept if gain is None else add_rates(kept, gain.gather(-1, selection.keep_idx))

    kept = slots.take(selection.keep_idx, selection.keep_valid)
    valid = selection.evict_valid
    if not config.merge.merges or selection.keep_idx.shape[-1] == 0:
        return settled(kept), count_dropped(valid, selection.evict_idx.shape[1], state)

    evicted = slots.take(selection.evict_idx, valid)
    similarity, target = nearest(evicted.keys, kept.keys, selection.is_target)
    reports = head_reports(similarity, valid.expand_as(similarity), config.merge.gate)
    if here is None:
        reports = gather_heads(reports)
    else:
        assert kept.positions.shape[-1] < MAX_FOUND
        everyone = gather_heads(with_found(reports, similarity, target))
        reports, similarity, target = found_of(everyone, here, reports.shape[-1], similarity.shape[-1])
        target = target.long()
    merged, state = judge(similarity, valid, reports, state, config)
    return settled(merge(kept, evicted, similarity, target, merged, config.merge)), state


def compress_layer(
    slots: Slots,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    *,
    finalize: bool = True,
) -> tuple[Slots, D2OState]:
    """Evict each row down to its budget and merge what was evicted. All KV heads of the layer are in `slots`.

    Args:
        slots: [B, Hkv, S, ...]; unused slots have position -1; rows may hold different numbers.
        budget: `num_heavy` and `num_recent`, ints or [B].
        state: `D2OState()` before the first eviction of the sequence.
        finalize: at the end of a prefill (rates are pooled for the selection) rather than while decoding.

    Returns:
        Slots by ascending position, as many as the fullest row holds, and the new state.
    """
    return evict_ordered(slots.in_order(), budget, state, config, finalize=finalize)


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
