"""The eviction at the end of a prefill, of a layer whose slots are spread over sequence ranks.

Every rank learns the statistics of all slots (some bytes a token and head), and what one of them chose (a byte a token
and head). Keys travel once: the kept ones, to all ranks. Each rank finds the nearest kept key of its own evicted ones
and adds up what they bring; the sums go back to the owners of the kept slots. At last the shards are made level.

Shape legend: B rows, H KV heads of the tensor rank, W slots of a rank, K kept and E evicted slots of all ranks, D head
dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.compress import MAX_FOUND, Nearest, count_dropped, found_of, judge, with_found
from d2o_dist.core.select import Selection, add_rates, choose, ranking_rates, rate_gain, selection_of
from d2o_dist.evict.level import level_owners, move_slots
from d2o_dist.layout.sequence import statistics_of_all
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.policy.merge import apply_merge, merge_sums
from d2o_dist.slots.shares import count_held
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots, compact


@dataclass(frozen=True)
class Shard:
    """A layer's slots on one rank, and what every rank knows of the others'.

    Attributes:
        slots: [B, H, C, ...] of this rank, each head's from slot 0 on by ascending position.
        held: [B, H, world] int64: slots of each rank.
        positions: [B, H, K] int64 of all ranks' slots, ascending, -1 on what a row does not have.
    """

    slots: Slots
    held: Tensor
    positions: Tensor


def finalize_shard(
    slots: Slots,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    ranks: RequestRanks,
    *,
    num_seen_tokens: Tensor,
    nearest: Nearest,
    room: int,
) -> tuple[Shard, D2OState]:
    """Evict each row of all ranks' slots down to its budget, merge what was evicted, and level the shards.

    Args:
        slots: [B, H, W, ...] of this rank, W the same on all ranks; unused ones have position -1.
        budget: of the rows, over all ranks.
        room: slots that the fullest row must be able to hold, over all ranks, from now on.
    """
    sp = ranks.sp
    everyone, source = statistics_of_all(slots, sp)
    owner, local = source // slots.positions.shape[-1], source % slots.positions.shape[-1]
    rates = ranking_rates(everyone, config, finalize=True)
    ranking = config.score.rank(everyone, rates, num_seen_tokens)
    choice = choose(everyone, budget, ranking, config, finalize=True)
    selection = None
    if choice is not None:
        # One rank's: the same numbers may rank otherwise on another, where powers and sums round otherwise.
        selection = selection_of(ranks.from_first_copy(sp.broadcast(choice, 0)), everyone, budget)
    if selection is None:
        count = int(everyone.kv_len.max())
        owner, local, positions = owner[..., :count], local[..., :count], everyone.positions[..., :count]
        valid = positions >= 0
        kept = _take_own(slots, owner, local, valid, sp.rank)
        keep_idx = torch.arange(count, device=positions.device).expand_as(positions)
    else:
        keep_owner, keep_local = owner.gather(-1, selection.keep_idx), local.gather(-1, selection.keep_idx)
        valid = selection.keep_valid.expand_as(keep_owner)
        positions = everyone.positions.gather(-1, selection.keep_idx).masked_fill(~valid, -1)
        evict_owner, evict_local = owner.gather(-1, selection.evict_idx), local.gather(-1, selection.evict_idx)
        kept, state = _merge(
            slots, selection, keep_owner, keep_local, evict_owner, evict_local, state, config, ranks, nearest
        )
        owner, keep_idx = keep_owner, selection.keep_idx
    gain = rate_gain(everyone, rates, config)
    if gain is not None:
        here = _columns_of(owner, valid, sp.rank, kept.positions.shape[-1])
        kept = add_rates(kept, gain.gather(-1, keep_idx).gather(-1, here))
    taker = level_owners(owner, valid, sp.size)
    capacity = -(-max(room, positions.shape[-1]) // sp.size)
    moved = move_slots(kept, positions, valid, owner, taker, sp, capacity)
    return Shard(moved, count_held(taker, valid, sp.size), positions), state


def _take_own(slots: Slots, owner: Tensor, local: Tensor, valid: Tensor, rank: int) -> Slots:
    """Those of the listed slots [B, H, K] that are here, in their order, from slot 0 on."""
    mine = (owner == rank) & valid
    width = int(mine.sum(-1).max())
    which = compact(mine, width)
    have = torch.arange(width, device=mine.device) < mine.sum(-1, keepdim=True)
    return slots.take(local.gather(-1, which), have)


def _merge(
    slots: Slots,
    selection: Selection,
    keep_owner: Tensor,
    keep_local: Tensor,
    evict_owner: Tensor,
    evict_local: Tensor,
    state: D2OState,
    config: D2OConfig,
    ranks: RequestRanks,
    nearest: Nearest,
) -> tuple[Slots, D2OState]:
    """This rank's kept slots [B, H, S, ...] with everything merged into them, and the state."""
    sp, rank = ranks.sp, ranks.sp.rank
    keep_valid = selection.keep_valid.expand_as(keep_owner)
    kept = _take_own(slots, keep_owner, keep_local, keep_valid, rank)
    if not config.merge.merges or keep_owner.shape[-1] == 0:
        return kept, count_dropped(selection.evict_valid, evict_owner.shape[1], state)

    # This rank's evicted tokens: which of all E they are, and their slots.
    mine = (evict_owner == rank) & selection.evict_valid
    width = int(mine.sum(-1).max())
    which = compact(mine, width)
    have = torch.arange(width, device=mine.device) < mine.sum(-1, keepdim=True)
    evicted = slots.take(evict_local.gather(-1, which), have)

    is_global = ranks.parallel.merge_scope == "global"
    if is_global:
        own = ((keep_owner == rank) & keep_valid).unsqueeze(-1)
        index = keep_local.unsqueeze(-1).expand(*keep_local.shape, slots.keys.shape[-1])
        keys = sp.all_reduce(torch.where(own, slots.keys.gather(2, index), 0))
        is_target = selection.is_target
    else:
        keys = kept.keys
        here = _columns_of(keep_owner, keep_valid, rank, kept.positions.shape[-1])
        is_target = selection.is_target.gather(-1, here) & (kept.positions >= 0)
    similarity, target = nearest(evicted.keys, keys, is_target)

    # The similarities of all E, in their order: with them every rank decides what one process would.
    spread = similarity.new_zeros(mine.shape).scatter_add_(-1, which, torch.where(have, similarity, 0))
    similarities = sp.all_reduce(spread)
    own = head_reports(similarities, selection.evict_valid.expand_as(similarities), config.merge.gate)
    if ranks.copied_heads is None:
        reports = ranks.gather_kv_heads(own)
    else:
        assert keys.shape[2] < MAX_FOUND
        targets = torch.zeros_like(spread).scatter_add_(-1, which, torch.where(have, target, 0).to(spread.dtype))
        everyone = ranks.gather_kv_heads(with_found(own, similarities, targets))
        reports, similarities, targets = found_of(everyone, ranks.copied_heads, own.shape[-1], mine.shape[-1])
        similarity, target = similarities.gather(-1, which), targets.gather(-1, which).long()
    merged, state = judge(similarities, selection.evict_valid, reports, state, config)
    if keys.shape[2] == 0:
        return kept, state  # with `local`, a rank that keeps nothing: its tokens have no target
    merged = merged.gather(-1, which) & have
    sums = merge_sums(evicted, similarity, target, merged, config.merge, keys.shape[2])
    if is_global:
        sums = sums.unpack(_to_owners(sums.pack(), keep_owner, keep_valid, sp)[:, :, : kept.positions.shape[-1]])
    return apply_merge(kept, sums, config.merge), state


def _columns_of(owner: Tensor, valid: Tensor, rank: int, width: int) -> Tensor:
    """[B, H, width]: which of the listed slots [B, H, K] a rank owns, in their order; then 0s."""
    return compact((owner == rank) & valid, width)


def _to_owners(sums: Tensor, owner: Tensor, valid: Tensor, sp: Collectives) -> Tensor:
    """[B, H, K, X] of what this rank's evicted tokens bring -> [B, H, S, X] of what all bring to this rank's slots."""
    most = int(count_held(owner, valid, sp.size).max())
    parts = []
    for rank in range(sp.size):
        columns = _columns_of(owner, valid, rank, most).unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1])
        parts.append(sums.gather(2, columns))
    return sp.reduce_scatter(torch.cat(parts, 2), 2, in_rank_order=True)
