"""What the ranks of a request tell each other at an eviction while decoding, so that all decide as one process would.

By heads, every rank has all slots of its units: only what the gate must hear crosses. By sequence, every rank has some
slots of every unit, and how many bytes are sent depends on how much is evicted, not on how much is held: each rank
offers its lowest ranked slots, from which all pick the same; the victims' keys and values reach all ranks, each finds
its own nearest target, and the nearest of all takes the victim in.

Shape legend: G groups (a row of a layer, or of a KV head with a budget of its own), h KV heads of a group, u = G x h
units, C slots of a segment, k slots offered by a rank, m of all ranks, E victims of a unit, X report width, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.ranked import ordered
from d2o_dist.evict.judge import found_of, with_found
from d2o_dist.slots.slots import Slots


@dataclass(frozen=True)
class Ranked:
    """Slots of each unit on all ranks, [u, m], the lowest ranked first.

    Attributes:
        slot: int64, counted from the unit's start, of a slot that is here; positions: int64; rates, or None.
        is_candidate: bool, whether the slot may be evicted; mine: bool, whether it is here; owner: int64, the rank that
            it is on.
    """

    slot: Tensor
    positions: Tensor
    is_candidate: Tensor
    mine: Tensor
    owner: Tensor | None = None
    rates: Tensor | None = None

    def pick(self, index: Tensor, valid: Tensor) -> Ranked:
        """Those at `index` [u, n] that are `valid`, by position, the others last, and no candidates."""
        valid = valid & self.is_candidate.gather(1, index)
        last = torch.iinfo(torch.int64).max
        index = index.gather(1, self.positions.gather(1, index).masked_fill(~valid, last).argsort(dim=-1, stable=True))
        valid = valid.sort(dim=-1, descending=True, stable=True).values
        owner, rates = (None if one is None else one.gather(1, index) for one in (self.owner, self.rates))
        positions = self.positions.gather(1, index).masked_fill(~valid, -1)
        return Ranked(self.slot.gather(1, index), positions, valid, valid & self.mine.gather(1, index), owner, rates)


class Exchange(Protocol):
    """Of one layout. Every rank of the request makes the same calls; what they give is the same on all of them."""

    def lowest(
        self, ranking: Tensor, positions: Tensor, count: int, offered: Tensor | None, rates: Tensor | None
    ) -> Ranked:
        """The `count` lowest ranked slots of each unit.

        Args:
            ranking: [u, C], +inf where a slot is no candidate; positions: [u, C]; rates: [u, C] if they must be known.
            offered: [n] int64, which of u x k slots are needed, where each rank names k of each unit; None: all.
        """

    def everywhere(self, victims: Slots, picked: Ranked) -> Slots:
        """Victims [G, h, E, ...] of which those that are here are given, as all ranks must know them."""

    def nearest(self, similarity: Tensor, position: Tensor, mine: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of what each rank found of each victim, [G, h, E]: the highest similarity, of equal ones that of the lowest
        target's position, and whether it is here; None: it always is."""

    def reports(
        self, reports: Tensor, similarity: Tensor, target: Tensor, takes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[G, h, X] of the heads at hand -> [G, H, X] of all, and the rest [G, h, E] as the first of the ranks that
        hold copies of these heads has it; target: below `MAX_FOUND`."""


@dataclass(frozen=True)
class ByHeads:
    """The exchange of ranks that have all slots of their heads. Attributes: per_head: whether each head is judged by
    itself, which then is all of its layer."""

    ranks: RequestRanks
    per_head: bool = False

    @classmethod
    def alone(cls) -> ByHeads:
        """Of one process."""
        return cls(RequestRanks.alone())

    def from_first_copy(self, tensor: Tensor) -> Tensor:
        """`tensor` of the first of the ranks that hold copies of these heads. One collective, if there are copies."""
        return self.ranks.from_first_copy(tensor)

    def lowest(
        self, ranking: Tensor, positions: Tensor, count: int, offered: Tensor | None, rates: Tensor | None
    ) -> Ranked:
        """As `Exchange.lowest`. Copies of a slot lie in the same place; what they rank by may differ by a last bit."""
        count = min(count, ranking.shape[1])
        slot = self.ranks.from_first_copy(lowest_first(ranking, positions, count))
        mine = torch.ones_like(slot, dtype=torch.bool)
        return Ranked(slot, positions.gather(1, slot), ranking.gather(1, slot) < torch.inf, mine)

    def everywhere(self, victims: Slots, picked: Ranked) -> Slots:
        """As `Exchange.everywhere`."""
        return victims

    def nearest(self, similarity: Tensor, position: Tensor, mine: Tensor) -> tuple[Tensor, None]:
        """As `Exchange.nearest`."""
        return similarity, None

    def gather(self, reports: Tensor) -> Tensor:
        """[B, h, X] of the KV heads at hand -> [B, H, X] of the whole layer, the same on every rank.

        A head with a budget of its own is all of its layer, as the first of the ranks that hold copies of it has it.
        """
        if self.per_head:
            return self.ranks.from_first_copy(reports)
        return self.ranks.gather_kv_heads(self.ranks.join_heads(reports))

    @property
    def own_heads(self) -> slice | None:
        """Which of the heads that `gather` gives are those at hand, where other ranks hold copies of them; None where
        there are no copies."""
        here = self.ranks.copied_heads
        return slice(0, 1) if here is not None and self.per_head else here

    def reports(
        self, reports: Tensor, similarity: Tensor, target: Tensor, takes: None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """As `Exchange.reports`. One collective."""
        if self.own_heads is None:
            return self.gather(reports), similarity, target, takes
        sent = self.gather(with_found(reports, similarity, target))
        everyone, similarity, target = found_of(sent, self.own_heads, reports.shape[-1], similarity.shape[-1])
        return everyone, similarity, target.long(), takes


@dataclass(frozen=True)
class BySequence:
    """The exchange of ranks that have some slots of all heads of their tensor rank."""

    ranks: RequestRanks

    def lowest(
        self, ranking: Tensor, positions: Tensor, count: int, offered: Tensor | None, rates: Tensor | None
    ) -> Ranked:
        """As `Exchange.lowest`. One collective, and one more between copies of KV heads."""
        sp, units, wanted = self.ranks.sp, len(ranking), count
        count = min(count, ranking.shape[1])
        slot = lowest_first(ranking, positions, count)
        # float64 holds statistics of either dtype, positions and slots exactly.
        columns = [ranking, positions] + ([] if rates is None else [rates])
        offer = torch.stack([*(column.gather(1, slot).double() for column in columns), slot.double()], -1)
        offer = self.ranks.from_first_copy(offer)
        slot, offer = offer[..., -1].long(), offer[..., :-1].flatten(0, 1)
        if offered is None:
            everyone = sp.all_gather(offer.unsqueeze(0), 0)
        else:
            everyone = offer.new_zeros(sp.size, *offer.shape)
            everyone[..., 0] = torch.inf
            everyone[:, offered] = sp.all_gather(offer[offered].unsqueeze(0), 0)
        flat = everyone.unflatten(1, (units, count)).transpose(0, 1).flatten(1, 2)  # [u, world x k, 2 or 3]
        order = lowest_first(flat[..., 0], flat[..., 1].long(), wanted)
        flat = flat.gather(1, order.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        owner = order // count
        return Ranked(
            slot=slot.gather(1, (order - sp.rank * count).clamp(0, count - 1)),
            positions=flat[..., 1].long(),
            is_candidate=flat[..., 0] < torch.inf,
            mine=owner == sp.rank,
            owner=owner,
            rates=None if rates is None else flat[..., 2].to(rates.dtype),
        )

    def everywhere(self, victims: Slots, picked: Ranked) -> Slots:
        """As `Exchange.everywhere`. One collective, unless each rank merges its own."""
        shape = victims.positions.shape
        both = torch.cat([victims.keys, victims.values], -1).masked_fill(~picked.mine.view(*shape, 1), 0)
        if self.ranks.parallel.merge_scope == "global":
            # One holder each, the others add zeros: the sum is exact in any dtype.
            both = self.ranks.sp.all_reduce(both)
        keys, values = both.tensor_split([victims.keys.shape[-1]], -1)
        rates = victims.rates if picked.rates is None else picked.rates.view(shape)
        return victims.replace(keys=keys, values=values, positions=picked.positions.view(shape), rates=rates)

    def nearest(self, similarity: Tensor, position: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
        """As `Exchange.nearest`. One collective."""
        if self.ranks.parallel.merge_scope == "local":
            return self.ranks.sp.all_reduce(torch.where(mine, similarity, 0)), mine
        best, lowest = self.ranks.max_with_position(similarity, position.clamp_min(0))
        return best, (best == similarity) & (lowest == position) & (best > -torch.inf)

    def reports(
        self, reports: Tensor, similarity: Tensor, target: Tensor, takes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Exchange.reports`. One collective."""
        if self.ranks.copied_heads is None:
            return self.ranks.gather_kv_heads(reports), similarity, target, takes
        sent = self.ranks.gather_kv_heads(with_found(reports, similarity, target, takes))
        found = found_of(sent, self.ranks.copied_heads, reports.shape[-1], similarity.shape[-1])
        everyone, similarity, target, takes = found
        return everyone, similarity, target.long(), takes.bool()


def lowest_first(ranking: Tensor, positions: Tensor, count: int) -> Tensor:
    """[u, count] int64: the lowest ranked of [u, C], lowest first; of equal ones the later position first."""
    if ranking.dtype == torch.float32:
        # One number that orders by both: the float's bits above, the position below, which ends at 2^31.
        key = (ordered(ranking) << 32) | (torch.iinfo(torch.int32).max - positions)
        return key.topk(count, largest=False).indices
    value, index = ranking.topk(count, largest=False)
    cut, number = value[:, -1:], torch.arange(count, device=ranking.device)
    below = (value < cut).sum(-1, keepdim=True)
    # Of those level with the last one, topk took any: the latest are wanted.
    level = positions.masked_fill(ranking != cut, -2).topk(count).indices
    index = torch.where(number < below, index, level.gather(1, (number - below).clamp_min(0)))
    later = positions.gather(1, index).argsort(dim=-1, descending=True, stable=True)
    index = index.gather(1, later)
    return index.gather(1, ranking.gather(1, index).argsort(dim=-1, stable=True))
