"""Level shards: after a prefill every sequence rank holds as many slots of each head as any other, to one slot.

Where the kept tokens of a head lie is chance (the newest all lie on the rank of the last tokens). Kept slots are few,
so the surplus of some ranks is moved to others once, at finalize. While decoding nothing moves: a new token goes to the
rank that has the fewest, and an eviction that leaves a rank short is made up for by the tokens that follow.

Shape legend: B rows, H KV heads, K kept slots of all ranks by position, S slots of one rank, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.slots.shares import count_held
from d2o_dist.slots.slots import Slots, stats_dtype


def level_owners(owner: Tensor, valid: Tensor, world: int) -> Tensor:
    """[B, H, K] int64: the ranks that slots go to, so that all hold as many, to one; few move.

    The ranks that hold most keep the odd ones. A rank with too many gives its last ones (by position).
    """
    held = count_held(owner, valid, world)
    total = held.sum(-1, keepdim=True)
    most_first = held.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(most_first).scatter_(
        -1, most_first, torch.arange(world, device=owner.device).expand_as(most_first)
    )
    wanted = total // world + (place < total % world).long()
    ordinal = torch.zeros_like(owner)
    for rank in range(world):
        mine = (owner == rank) & valid
        ordinal = torch.where(mine, mine.cumsum(-1) - 1, ordinal)
    surplus = valid & (ordinal >= wanted.gather(-1, owner))
    number = surplus.cumsum(-1) - 1
    filled = (wanted - held).clamp_min(0).cumsum(-1)
    taker = (number.unsqueeze(-1) >= filled.unsqueeze(-2)).sum(-1)
    return torch.where(surplus, taker, owner)


def move_slots(
    kept: Slots, positions: Tensor, valid: Tensor, owner: Tensor, taker: Tensor, sp: Collectives, capacity: int
) -> Slots:
    """This rank's slots [B, H, capacity, ...] by position, once every slot is with its taker.

    Args:
        kept: [B, H, S, ...] this rank's slots, by position, from slot 0 on.
        positions, owner, taker: [B, H, K] of all ranks' slots, by position; valid: [B, 1 or H, K] bool.
    """
    batch, heads, dims = *kept.keys.shape[:2], [kept.keys.shape[-1], kept.values.shape[-1]]
    valid = valid.expand_as(owner)
    mine, to_me = (owner == sp.rank) & valid, (taker == sp.rank) & valid
    column = mine.cumsum(-1) - 1
    place = to_me.cumsum(-1) - 1
    wide = torch.cat([kept.keys, kept.values], -1)
    narrow = torch.stack([kept.scores, kept.rates, kept.log_mass], -1)
    new_wide = wide.new_zeros(batch, heads, capacity, sum(dims))
    new_narrow = narrow.new_zeros(batch, heads, capacity, 3)
    new_positions = torch.full((batch, heads, capacity), -1, dtype=torch.int64, device=owner.device)

    def entries(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
        return ((owner == source) & (taker == target) & valid).nonzero(as_tuple=True)

    arriving = {source: entries(source, sp.rank) for source in range(sp.size)}
    if bool((owner != taker).logical_and(valid).any()):  # the same on all ranks
        leaving = [entries(sp.rank, target) for target in range(sp.size)]
        rows = [(b, h, column[b, h, s]) for b, h, s in leaving]
        counts = [len(arriving[source][0]) for source in range(sp.size)]
        wides = sp.all_to_all_list([wide[row] for row in rows], [(count, sum(dims)) for count in counts])
        narrows = sp.all_to_all_list([narrow[row] for row in rows], [(count, 3) for count in counts])
    else:
        b, h, s = arriving[sp.rank]
        own = (b, h, column[b, h, s])
        wides, narrows = {sp.rank: wide[own]}, {sp.rank: narrow[own]}
    for source, (b, h, s) in arriving.items():
        if len(b):
            new_wide[b, h, place[b, h, s]] = wides[source]
            new_narrow[b, h, place[b, h, s]] = narrows[source]
            new_positions[b, h, place[b, h, s]] = positions[b, h, s]
    assert new_narrow.dtype == stats_dtype(kept.keys.dtype)
    return Slots(*new_wide.split(dims, -1), new_positions, *new_narrow.unbind(-1))
