"""A layer's slots on one of the sequence ranks, at the end of a prompt: what `evict_ordered` asks of them.

Every rank learns the statistics of all slots (some bytes a token and head), and what one of them chose (a byte a token
and head). Keys travel once: the kept ones, to all ranks. Each rank finds the nearest kept key of its own evicted ones
and adds up what they bring; the sums go back to the owners of the kept slots. At last the shards are made level.

Shape legend: B rows, H KV heads of the tensor rank, W slots of a rank, K kept and E evicted slots of all ranks, M of
them here, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.select import Selection
from d2o_dist.evict.exchange import BySequence
from d2o_dist.evict.judge import MAX_FOUND, Nearest
from d2o_dist.evict.level import level_owners, move_slots
from d2o_dist.layout.sequence import statistics_of_all
from d2o_dist.policy.merge import MergeRule, apply_merge, merge_sums
from d2o_dist.slots.shares import count_held
from d2o_dist.slots.slots import Slots, compact, pick


@dataclass(frozen=True)
class Listed:
    """Slots of all ranks [B, H, n], by position: where they are, and which of them are here.

    Attributes:
        owner, local: int64, rank and slot; valid: bool, whether there is one; rank: this one.
    """

    owner: Tensor
    local: Tensor
    valid: Tensor
    rank: int

    @property
    def mine(self) -> Tensor:
        """[B, H, n] bool."""
        return (self.owner == self.rank) & self.valid

    def here(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """[B, H, M]: which of the listed are here, in order, then 0s; and which of the M there are."""
        mine = self.mine
        width = int(mine.sum(-1).max()) if width is None else width
        have = torch.arange(width, device=mine.device) < mine.sum(-1, keepdim=True)
        return compact(mine, width), have


class Shards:
    """As `prompt.PromptSlots`.

    Args:
        slots: [B, H, W, ...] of this rank, W the same on all ranks; unused ones have position -1.
    """

    def __init__(self, slots: Slots, ranks: RequestRanks) -> None:
        self.slots, self.ranks = slots, ranks
        self.statistics, source = statistics_of_all(slots, ranks.sp)
        self._owner, self._local = source // slots.positions.shape[-1], source % slots.positions.shape[-1]
        self._kept: Listed | None = None
        self._evicted: Listed | None = None
        self._positions = self.statistics.positions

    @property
    def _merges_globally(self) -> bool:
        return self.ranks.parallel.merge_scope == "global"

    def decide(self, choice: Tensor | None) -> Tensor | None:
        """As `PromptSlots.decide`. Powers and sums round otherwise on another rank."""
        return None if choice is None else self.ranks.from_first_copy(self.ranks.sp.broadcast(choice, 0))

    def keep(self, selection: Selection | None) -> Slots:
        """As `PromptSlots.keep`."""
        rank, everything = self.ranks.sp.rank, self._positions
        if selection is None:
            count = int(self.statistics.kv_len.max())
            self._positions = everything[..., :count]
            self._kept = Listed(self._owner[..., :count], self._local[..., :count], self._positions >= 0, rank)
            return self._take(self._kept, self.slots)

        def listed(index: Tensor, valid: Tensor) -> Listed:
            return Listed(self._owner.gather(-1, index), self._local.gather(-1, index), valid.expand_as(index), rank)

        self._kept = listed(selection.keep_idx, selection.keep_valid)
        self._evicted = listed(selection.evict_idx, selection.evict_valid)
        self._positions = everything.gather(-1, selection.keep_idx).masked_fill(~self._kept.valid, -1)
        return self._take(self._kept, self.slots)

    def _take(self, listed: Listed, slots: Slots) -> Slots:
        """Those of the listed slots that are here, in their order, from slot 0 on."""
        which, have = listed.here()
        return slots.take(listed.local.gather(-1, which), have)

    def nearest(self, kept: Slots, selection: Selection, find: Nearest) -> tuple[Tensor, Tensor]:
        """As `PromptSlots.nearest`; targets of others are 0. One collective with the keys of what is kept, unless each
        rank merges its own. One with all similarities: by them every rank decides as one process would."""
        which, have = self._evicted.here()
        keys = pick(self.slots.keys, self._evicted.local.gather(-1, which), have)
        similarity, target = find(keys, *self._targets(kept, selection))
        spread = similarity.new_zeros(self._evicted.owner.shape)
        targets = torch.zeros_like(spread, dtype=torch.int64).scatter_add_(-1, which, torch.where(have, target, 0))
        return self.ranks.sp.all_reduce(spread.scatter_add_(-1, which, torch.where(have, similarity, 0))), targets

    def _targets(self, kept: Slots, selection: Selection) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, D] of slots that may take evicted ones in, and [B, H, T] bool, which of them do."""
        if not self._merges_globally:
            return kept.keys, selection.is_target.gather(-1, self._here(kept)) & (kept.positions >= 0)
        index = self._kept.local.unsqueeze(-1).expand(*self._kept.local.shape, self.slots.keys.shape[-1])
        keys = torch.where(self._kept.mine.unsqueeze(-1), self.slots.keys.gather(2, index), 0)
        return self.ranks.sp.all_reduce(keys), selection.is_target

    def reports(self, reports: Tensor, similarity: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `PromptSlots.reports`."""
        assert self._kept.owner.shape[-1] < MAX_FOUND
        return BySequence(self.ranks).reports(reports, similarity, target, target >= 0)[:3]

    def fold(
        self, kept: Slots, selection: Selection, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule
    ) -> Slots:
        """As `PromptSlots.fold`. One collective, unless each rank merges its own."""
        num_targets = self._kept.owner.shape[-1] if self._merges_globally else kept.positions.shape[-1]
        if num_targets == 0:
            return kept  # a rank that keeps nothing, and merges its own: its tokens have no target
        evicted = self._take(self._evicted, self.slots.for_merge(keys=rule.averages_keys))
        which, have = self._evicted.here(evicted.positions.shape[-1])
        similarity, target, merged = (tensor.gather(-1, which) for tensor in (similarity, target, merged))
        sums = merge_sums(evicted, similarity, target, merged & have, rule, num_targets)
        if self._merges_globally:
            sums = sums.unpack(self._to_owners(sums.pack())[:, :, : kept.positions.shape[-1]])
        return apply_merge(kept, sums, rule)

    def _here(self, kept: Slots) -> Tensor:
        return self._kept.here(kept.positions.shape[-1])[0]

    def own(self, tensor: Tensor) -> Tensor:
        """As `PromptSlots.own`."""
        return tensor[..., : self._kept.owner.shape[-1]].gather(-1, self._kept.here()[0])

    def nothing_stays(self) -> None:
        """As `PromptSlots.nothing_stays`: all ranks have the same heads."""

    def _to_owners(self, sums: Tensor) -> Tensor:
        """[B, H, K, X] of what this rank's evicted tokens bring -> [B, H, M, X] of what all bring to the slots here."""
        sp, kept = self.ranks.sp, self._kept
        most = int(count_held(kept.owner, kept.valid, sp.size).max())
        parts = []
        for rank in range(sp.size):
            columns, _ = Listed(kept.owner, kept.local, kept.valid, rank).here(most)
            parts.append(sums.gather(2, columns.unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1])))
        return sp.reduce_scatter(torch.cat(parts, 2), 2, in_rank_order=True)

    def level(self, kept: Slots, room: int) -> tuple[Slots, Tensor, Tensor]:
        """After the eviction: let every rank hold as many slots, to one.

        Args:
            room: slots that the fullest row must be able to hold, over all ranks, from now on.

        Returns:
            Slots [B, H, C, ...] of this rank, each head's from slot 0 on by ascending position; [B, H, world] int64
            slots of each rank; [B, H, K] int64 positions of all ranks' slots, ascending, -1 on what a row lacks.
        """
        listed, positions, sp = self._kept, self._positions, self.ranks.sp
        taker = level_owners(listed.owner, listed.valid, sp.size)
        capacity = -(-max(room, positions.shape[-1]) // sp.size)
        moved = move_slots(kept, positions, listed.valid, listed.owner, taker, sp, capacity)
        return moved, count_held(taker, listed.valid, sp.size), positions
