"""Evictions while decoding, of layers whose slots are spread over sequence ranks; all layers in the same collectives.

How many bytes are sent depends on how much is evicted, not on how much is held: each rank offers its lowest ranked
candidates, from which all pick the same; the victims' keys and values reach all ranks, each finds its own nearest
target, and the nearest of all takes the victim in.

Shape legend: B rows, H KV heads of the tensor rank, C slots of a rank, k candidates offered by a rank, E victims, D
head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.compression.level import count_held
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.core.compress import Nearest, count_dropped, judge
from d2o_dist.core.select import compact
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.slots.slots import D2OState, Slots


@dataclass(frozen=True)
class ShardJob:
    """One layer that is due.

    Attributes:
        slots: [B, H, C, ...] of this rank, each head's from slot 0 on by ascending position; C the same on all ranks.
        held: [B, H, world] int64 slots of each rank.
        recent_from: [B, H] int64: slots of this position or later are recent.
        slot_budgets: per row; surplus: per row how many slots over it, 0 for a row that is not due.
        state: before the eviction.
    """

    slots: Slots
    held: Tensor
    recent_from: Tensor
    slot_budgets: Sequence[int]
    surplus: Sequence[int]
    state: D2OState

    @property
    def num_victims(self) -> int:
        """E, of the row with most."""
        return max(self.surplus)

    def num_tail(self, config: D2OConfig) -> list[int]:
        """Per row how many of the lowest ranked kept slots are targets; 0 if targets are not told by rank."""
        tail = config.merge.targets.tail_sizes(torch.tensor(self.slot_budgets), finalize=False)
        return [0] * len(self.surplus) if tail is None else tail.tolist()

    def num_offered(self, config: D2OConfig) -> int:
        """k."""
        wanted = self.num_victims + max(self.num_tail(config))
        return min(wanted, self.slots.positions.shape[-1])


@dataclass(frozen=True)
class ShardEviction:
    """What an eviction leaves of a layer.

    Attributes:
        slots: [B, H, C, ...] of this rank; held: [B, H, world] slots of each rank.
        victims: [B, H, E] int64 positions that were evicted, the same on all sequence ranks.
    """

    slots: Slots
    held: Tensor
    victims: Tensor
    state: D2OState


@dataclass(frozen=True)
class _Picked:
    """The victims of a layer, by position, and what of this rank's slots becomes what.

    positions, rates: [B, H, E]; valid: [B, 1, E]; mine: [B, H, E] whether the victim is here, in slot `local`;
    kept, is_target: [B, H, C] masks of this rank's slots; held: [B, H, world] after the eviction.
    """

    positions: Tensor
    rates: Tensor | None
    valid: Tensor
    mine: Tensor
    local: Tensor
    kept: Tensor
    is_target: Tensor
    held: Tensor


def evict_shards(
    jobs: Sequence[ShardJob], config: D2OConfig, ranks: RequestRanks, *, num_seen_tokens: Tensor, nearest: Nearest
) -> list[ShardEviction]:
    """Evict the layers.

    Every rank of the request must call it with the same layers. Collectives over sp: 1 without merging, 3 with
    `merge_scope: global`, 2 with `local`; one more over tp if there are tensor ranks.
    """
    picked = _pick_victims(jobs, config, ranks, num_seen_tokens)
    results = []
    if not config.merge.merges:
        for job, pick in zip(jobs, picked, strict=True):
            state = count_dropped(pick.valid, job.slots.positions.shape[1], job.state)
            results.append(ShardEviction(_keep(job.slots, pick.kept), pick.held, pick.positions, state))
        return results

    is_global = ranks.parallel.merge_scope == "global"
    kept = [_keep(job.slots, pick.kept) for job, pick in zip(jobs, picked, strict=True)]
    victims = _victims_everywhere(jobs, picked, ranks) if is_global else [
        _victims_here(job, pick) for job, pick in zip(jobs, picked, strict=True)
    ]  # fmt: skip
    found = []
    for stay, victim, pick in zip(kept, victims, picked, strict=True):
        width = stay.positions.shape[-1]
        is_target = pick.is_target.gather(-1, compact(pick.kept, width)) & (stay.positions >= 0)
        found.append(nearest(victim.keys, stay.keys, is_target))
    similarities, takes = _nearest_of_all(found, kept, picked, ranks)

    reports = [
        head_reports(similarity, pick.valid.expand_as(similarity), config.merge.gate)
        for similarity, pick in zip(similarities, picked, strict=True)
    ]
    everyone = ranks.gather_kv_heads(torch.cat(reports, -1)).split([one.shape[-1] for one in reports], -1)
    for number, (job, pick) in enumerate(zip(jobs, picked, strict=True)):
        merged, state = judge(similarities[number], pick.valid, everyone[number], job.state, config)
        slots = merge_evicted(
            kept[number], victims[number], similarities[number], found[number][1], merged & takes[number], config.merge
        )
        results.append(ShardEviction(slots, pick.held, pick.positions, state))
    return results


def lowest_first(ranking: Tensor, positions: Tensor) -> Tensor:
    """Order [..., n] in which slots are evicted: the lowest ranked first, of equal ones the later position."""
    latest = positions.argsort(dim=-1, descending=True, stable=True)
    return latest.gather(-1, ranking.gather(-1, latest).argsort(dim=-1, stable=True))


def _pick_victims(
    jobs: Sequence[ShardJob], config: D2OConfig, ranks: RequestRanks, num_seen_tokens: Tensor
) -> list[_Picked]:
    offers, orders = [], []
    for job in jobs:
        slots, device = job.slots, job.slots.positions.device
        heavy = torch.tensor([config.split(budget)[0] for budget in job.slot_budgets], device=device)
        sinks = heavy.clamp_max(config.num_sink_tokens)[:, None, None]
        candidate = slots.live & (slots.positions >= sinks) & (slots.positions < job.recent_from.unsqueeze(-1))
        ranking = config.score.rank(slots, slots.rates, num_seen_tokens)
        ranking = ranking.masked_fill(~candidate, torch.inf)
        order = lowest_first(ranking, slots.positions)[..., : job.num_offered(config)]
        columns = [ranking.gather(-1, order), slots.positions.gather(-1, order)]
        if config.merge.keeps_mass:
            columns.append(slots.rates.gather(-1, order))
        # float64 holds statistics of either dtype and positions exactly.
        offers.append(torch.stack([column.double() for column in columns], -1))
        orders.append(order)
    gathered = ranks.sp.all_gather(torch.cat(offers, 2).unsqueeze(0), 0)
    parts = gathered.split([offer.shape[2] for offer in offers], 3)
    return [
        _pick(job, order, part, config, ranks) for job, order, part in zip(jobs, orders, parts, strict=True)
    ]


def _pick(job: ShardJob, order: Tensor, offers: Tensor, config: D2OConfig, ranks: RequestRanks) -> _Picked:
    """From all ranks' offers [world, B, H, k, 2 or 3] the victims of one layer."""
    world, batch, heads, offered, _ = offers.shape
    device, rank = offers.device, ranks.sp.rank
    flat = offers.permute(1, 2, 0, 3, 4).reshape(batch, heads, world * offered, -1)
    ranking, positions = flat[..., 0], flat[..., 1].long()
    overall = lowest_first(ranking, positions)
    surplus = torch.tensor(job.surplus, device=device)[:, None, None]
    tail = torch.tensor(job.num_tail(config), device=device)[:, None, None]

    # This rank's slots: which are victims, and which are the lowest ranked of those that stay.
    numbers = torch.arange(world * offered, device=device).expand_as(overall)
    place = torch.empty_like(overall).scatter_(-1, overall, numbers)
    own = place[..., rank * offered : (rank + 1) * offered]
    real = ranking[..., rank * offered : (rank + 1) * offered] < torch.inf
    none = torch.zeros_like(job.slots.positions, dtype=torch.bool)
    is_victim = none.scatter(-1, order, (own < surplus) & real)
    is_tail = none.scatter(-1, order, (own >= surplus) & (own < surplus + tail) & real)
    kept = job.slots.live & ~is_victim
    if any(job.num_tail(config)):
        is_target = is_tail
    elif config.merge.keeps_mass:
        heavy = torch.tensor([config.split(budget)[0] for budget in job.slot_budgets], device=device)
        is_target = kept & (job.slots.positions >= heavy.clamp_max(config.num_sink_tokens)[:, None, None])
    else:
        is_target = kept

    # The victims, by position.
    chosen = overall[..., : job.num_victims]
    valid = torch.arange(job.num_victims, device=device) < surplus
    by_position = positions.gather(-1, chosen).masked_fill(~valid, torch.iinfo(torch.int64).max).argsort(dim=-1)
    chosen = chosen.gather(-1, by_position)
    owner = chosen // offered
    return _Picked(
        positions=positions.gather(-1, chosen),
        rates=flat[..., 2].gather(-1, chosen).to(job.slots.rates.dtype) if config.merge.keeps_mass else None,
        valid=valid,
        mine=(owner == rank) & valid,
        local=order.gather(-1, (chosen - rank * offered).clamp(0, offered - 1)),
        kept=kept,
        is_target=is_target,
        held=job.held - count_held(owner, valid, world),
    )


def _keep(slots: Slots, kept: Tensor) -> Slots:
    """The slots of a mask [B, H, C], each head's from slot 0 on: [B, H, C, ...]."""
    index = compact(kept, kept.shape[-1])
    return slots.take(index, torch.arange(kept.shape[-1], device=kept.device) < kept.sum(-1, keepdim=True))


def _victims_here(job: ShardJob, pick: _Picked) -> Slots:
    """[B, H, E, ...] the victims that this rank holds; the others are zeros."""
    return job.slots.take(pick.local, pick.mine)


def _victims_everywhere(jobs: Sequence[ShardJob], picked: Sequence[_Picked], ranks: RequestRanks) -> list[Slots]:
    """[B, H, E, ...] of each layer, with the keys and values of all ranks' victims. One collective."""
    here = [_victims_here(job, pick) for job, pick in zip(jobs, picked, strict=True)]
    # One holder each, the others add zeros: the sum is exact in any dtype.
    both = ranks.sp.all_reduce(torch.cat([torch.cat([one.keys, one.values], -1) for one in here], 2))
    parts = both.split([one.positions.shape[-1] for one in here], 2)
    victims = []
    for one, pick, part in zip(here, picked, parts, strict=True):
        keys, values = part.split(one.keys.shape[-1], -1)
        rates = one.rates if pick.rates is None else torch.where(pick.valid, pick.rates, 0)
        positions = pick.positions.masked_fill(~pick.valid, -1)
        victims.append(one.replace(keys=keys, values=values, rates=rates, positions=positions))
    return victims


def _nearest_of_all(
    found: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Slots], picked: Sequence[_Picked], ranks: RequestRanks
) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer the similarities [B, H, E] of all victims, alike on all ranks, and whether this rank takes them in."""
    lengths = [similarity.shape[-1] for similarity, _ in found]
    if ranks.parallel.merge_scope == "local":
        own = [torch.where(pick.mine, similarity, 0) for (similarity, _), pick in zip(found, picked, strict=True)]
        return list(ranks.sp.all_reduce(torch.cat(own, -1)).split(lengths, -1)), [pick.mine for pick in picked]
    similarity = torch.cat([one for one, _ in found], -1)
    target = torch.cat(
        [stay.positions.gather(-1, index) for stay, (_, index) in zip(kept, found, strict=True)], -1
    ).clamp_min(0)
    best, position = ranks.max_with_position(similarity, target)
    takes = (best == similarity) & (position == target) & (best > -torch.inf)
    return list(best.split(lengths, -1)), list(takes.split(lengths, -1))
