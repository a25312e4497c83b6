"""Evictions while decoding, of all layers that are due at once, in the arena that holds their slots.

Propose the victims of each unit and the slots that may take them in, exchange what the gate must hear from the KV heads
of other ranks, commit: merge into the targets and free the victims' slots. Nothing else moves. The number of operators
does not grow with the layers (but for targets among all kept slots, whose keys are read where they lie).

Shape legend: G groups (a row of a layer, or of a KV head with a budget of its own), h KV heads of a group, u = G x h
units, C slots of the widest segment, E victims of a unit, K targets, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.evict.exchange import Exchange, Ranked
from d2o_dist.evict.judge import MAX_FOUND, Nearest, count_dropped, judge
from d2o_dist.policy import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.policy.merge import MergeSums, apply_merge, unit
from d2o_dist.policy.statistics import COLUMN_SUMS, PEAKS, RATES
from d2o_dist.slots.arena import Arena
from d2o_dist.slots.shares import count_held
from d2o_dist.slots.slots import D2OState, Slots, stats_dtype

# Columns of a matrix product have the same last bits in any width that is a multiple of it.
_MULTIPLE = 16


@dataclass(frozen=True)
class DueBlocks:
    """What is evicted: some blocks of an arena, with numbers that follow from lengths alone.

    Attributes:
        blocks: which of the arena's.
        surplus, slots: per group how many slots it evicts, 0 for one that is not due, and how many it holds then.
    """

    blocks: tuple[int, ...]
    surplus: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class _Tables:
    """The numbers of `DueBlocks`, by unit and on the device.

    most: slots that are needed of a unit at most; offered: which of u x k of them, k at most C, if not all.
    """

    units: Tensor
    columns: Tensor  # [u, C] in the storage
    surplus: Tensor  # [u]
    sinks: Tensor  # [u]
    recent: Tensor  # [u]
    tail: Tensor | None  # [u]
    most: int
    offered: Tensor | None
    row: Tensor  # [u]


@dataclass
class ArenaEvictions:
    """Evictions of one arena.

    Args:
        newest: [U, M] int64 positions of the newest slots of each unit when it was compressed, the last at the end;
            they tell what is recent until M tokens more were seen. seen_then: [B] int64, tokens seen at that time.
        exchange: with the other ranks of the request.
    """

    arena: Arena
    config: D2OConfig
    newest: Tensor
    seen_then: Tensor
    nearest: Nearest
    exchange: Exchange
    _tables: dict[DueBlocks, _Tables] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: tables are made again."""
        return {**vars(self), "_tables": {}}

    def run(self, due: DueBlocks, state: D2OState, seen: Tensor) -> tuple[D2OState, Tensor]:
        """Evict.

        Args:
            state: [G] of the groups; seen: [B] int64, tokens seen.

        Returns:
            The state after it, and the positions of the victims, [G, h, E], by position, -1 where a group is not due.
        """
        tables = self._tables_of(due)
        slots, number, groups = self.arena.storage, max(due.surplus), len(due.surplus)
        heads = len(tables.units) // groups
        victim, tail = self._propose(tables, seen, number)
        where = self._where(tables, victim)
        valid = (torch.arange(number, device=where.device) < tables.surplus[:, None]).view(groups, heads, -1)[:, :1]
        if not self.config.merge.merges:
            state = count_dropped(valid, heads, state)
        else:
            evicted = self.exchange.everywhere(self._take(where, groups), victim)
            similarity, target = self._nearest(tables, evicted, victim, tail, due)
            found = slots.positions[target]
            similarity, takes = self.exchange.nearest(similarity, found, victim.mine.view(groups, heads, -1))
            reports = head_reports(similarity, valid.expand_as(similarity), self.config.merge.gate)
            # Whole numbers: which of the unit's own slots the target is.
            starts = self.arena.start[tables.units].view(groups, heads, 1)
            assert tables.columns.shape[1] < MAX_FOUND
            everyone, similarity, target, takes = self.exchange.reports(reports, similarity, target - starts, takes)
            merged, state = judge(similarity, valid, everyone, state, self.config)
            self._merge(evicted, similarity, target + starts, merged if takes is None else merged & takes)
        self.arena.release(tables.units, where, victim.slot, victim.mine)
        if victim.owner is not None:
            held = self.arena.shares.held
            held[tables.units] -= count_held(victim.owner, victim.is_candidate, held.shape[-1])
        return state, victim.positions.view(groups, heads, number)

    def select_rows(self, index: Tensor) -> ArenaEvictions:
        """Of rows `index`, in that order, repeated where repeated."""
        before = self.arena.units_of_rows(index)
        arena, newest = self.arena.select_rows(index), self.newest[before]
        seen_then = self.seen_then[index.to(self.seen_then.device)]
        return dataclasses.replace(self, arena=arena, newest=newest, seen_then=seen_then, _tables={})

    def join(self, others: Sequence[ArenaEvictions]) -> ArenaEvictions:
        """Of the rows of several, one after the other."""
        everyone = [self, *others]
        most = max(one.newest.shape[1] for one in everyone)
        newest = [pad(one.newest, (most - one.newest.shape[1], 0), value=-1) for one in everyone]
        arenas = [one.arena for one in everyone]
        seen_then = torch.cat([one.seen_then for one in everyone])
        arena, newest = self.arena.join(arenas[1:]), Arena.by_unit(arenas, newest)
        return dataclasses.replace(self, arena=arena, newest=newest, seen_then=seen_then, _tables={})

    # ---- propose -------------------------------------------------------------------------------------------------

    def _propose(self, tables: _Tables, seen: Tensor, number: int) -> tuple[Ranked, Ranked | None]:
        """The victims and, where only a tail takes them in, the tail: both by position."""
        columns = tables.columns
        positions = self.arena.storage.positions[columns]
        now, then = seen[tables.row], self.seen_then[tables.row]
        new = now - then
        # The M-th newest slot: one of those at the last compression while fewer than M tokens have come since.
        most = self.newest.shape[1]
        place = (most - tables.recent + new).clamp(0, most - 1)
        old = self.newest[tables.units].gather(1, place[:, None])[:, 0]
        recent_from = torch.where(new >= tables.recent, now - tables.recent, old)
        candidate = (positions >= tables.sinks[:, None]) & (positions < recent_from[:, None])
        ranking = self._ranking(columns, positions, now).masked_fill(~candidate, torch.inf)
        rates = self.arena.storage.rates[columns] if self.config.merge.keeps_mass else None
        lowest = self.exchange.lowest(ranking, positions, tables.most, tables.offered, rates)
        count = torch.arange(number, device=columns.device).expand(len(columns), -1)
        victim = lowest.pick(count, count < tables.surplus[:, None])
        if tables.tail is None:
            return victim, None
        count = torch.arange(tables.most - number, device=columns.device)
        place = tables.surplus[:, None] + count
        inside = (count < tables.tail[:, None]) & (place < lowest.slot.shape[1])
        return victim, lowest.pick(place.clamp_max(lowest.slot.shape[1] - 1), inside)

    def _ranking(self, columns: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """[u, C] what slots rank by."""
        storage, score = self.arena.storage, self.config.score
        nothing = storage.scores[:1, None, None].expand(len(positions), 1, 1)
        scores = storage.scores[columns][:, None] if score.statistics & {COLUMN_SUMS, PEAKS} else nothing
        rates = storage.rates[columns][:, None] if RATES in score.statistics else nothing
        held = Slots(nothing, nothing, positions[:, None], scores, rates, nothing)
        return score.rank(held, held.rates, seen)[:, 0]

    def _where(self, tables: _Tables, picked: Ranked) -> Tensor:
        """[u, n] in the storage; N where nothing was picked that is here."""
        return tables.columns.gather(1, picked.slot).masked_fill(~picked.mine, self.arena.num_slots)

    # ---- the nearest target --------------------------------------------------------------------------------------

    def _nearest(
        self, tables: _Tables, evicted: Slots, victim: Ranked, tail: Ranked | None, due: DueBlocks
    ) -> tuple[Tensor, Tensor]:
        """[G, h, E] cosine of each victim to its nearest target, and where in the storage that is."""
        groups, heads = evicted.positions.shape[:2]
        if tail is not None:
            where = self._where(tables, tail).view(groups, heads, -1)
            keys = self.arena.codec.decode(self.arena.storage.keys[where])
            similarity, index = self.nearest(evicted.keys, keys, tail.mine.view(groups, heads, -1))
            return similarity, where.gather(-1, index)
        # Every kept slot may take one in: keys are read where they lie, one block after the other.
        is_victim = torch.zeros_like(self.arena.storage.positions, dtype=torch.bool)
        is_victim.index_fill_(0, self._where(tables, victim).flatten(), True)
        victims = self.arena.split_slots(is_victim[: self.arena.num_slots])
        found, first = [], 0
        for number in due.blocks:
            block, view = self.arena.blocks[number], self.arena.view(number)
            part = slice(first, first + len(block.room))
            first = part.stop
            can = (view.positions >= 0) & ~victims[number]
            if self.config.merge.keeps_mass:
                can &= view.positions >= tables.sinks.view(groups, heads)[part].unsqueeze(-1)
            similarity, index = nearest_of_set(
                evicted.keys[part], self.arena.codec.decode(view.keys), can, view.positions
            )
            starts = self.arena.start[self.arena.units(number)].view(-1, block.heads, 1)
            found.append((similarity, starts + index))
        similarities, targets = zip(*found, strict=True)
        return torch.cat(similarities), torch.cat(targets)

    # ---- commit --------------------------------------------------------------------------------------------------

    def _merge(self, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor) -> None:
        """Fold the victims in. Those of one target are added up, in order of position, at the first of them."""
        storage, rule = self.arena.storage, self.config.merge
        groups, heads, number = target.shape
        together = (target.unsqueeze(-1) == target.unsqueeze(-2)) & merged.unsqueeze(-1) & merged.unsqueeze(-2)
        earlier = torch.ones(number, number, dtype=torch.bool, device=target.device).tril(-1)
        leads = merged & ~(together & earlier).any(-1)
        share = (together & leads.unsqueeze(-1)).to(similarity.dtype)
        weight = rule.evicted_weight(evicted, similarity).masked_fill(~merged, 0)

        def sums(tensor: Tensor) -> Tensor:
            return share @ (weight.unsqueeze(-1) * tensor.to(share.dtype))

        added = MergeSums(
            count=share.sum(-1),
            weight=(share @ weight.unsqueeze(-1)).squeeze(-1),
            keys=sums(evicted.keys) if rule.averages_keys else None,
            values=sums(evicted.values),
        )
        where = target.masked_fill(~leads, self.arena.num_slots)
        kept = apply_merge(self._take(where.flatten(0, 1), groups), added, rule)
        flat = where.flatten()
        for name in ("values", "keys") if rule.averages_keys else ("values",):
            getattr(storage, name)[flat] = self.arena.codec.encode(getattr(kept, name)).flatten(0, 2)
        for name in ("rates", "log_mass") if rule.keeps_mass else ():
            getattr(storage, name)[flat] = getattr(kept, name).flatten(0, 2)

    def _take(self, where: Tensor, groups: int) -> Slots:
        """The slots at `where` [u, n] of the storage: [G, h, n, ...]."""
        taken = self.arena.storage.map(lambda tensor: tensor[where].unflatten(0, (groups, -1)))
        return self.arena.codec.decode_slots(taken)

    def _tables_of(self, due: DueBlocks) -> _Tables:
        """Made once for the same numbers, which come again and again."""
        if due in self._tables:
            return self._tables[due]
        arena, config, device = self.arena, self.config, self.arena.start.device
        units = torch.cat([torch.arange(part.start, part.stop) for part in map(arena.units, due.blocks)])
        heads = len(units) // len(due.surplus)
        splits = [config.split(slots) for slots in due.slots]
        targets = config.merge.targets
        tails = targets.tail_sizes(torch.tensor(due.slots), finalize=False) if config.merge.merges else None
        columns = arena.columns(due.blocks)
        needed = torch.tensor(due.surplus) + (0 if tails is None else tails)
        most = max(due.surplus) + (0 if tails is None else int(tails.max()))
        # Each rank names so many of its own.
        named = torch.arange(min(most, columns.shape[1])) < needed.repeat_interleave(heads)[:, None]

        def by_unit(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), device=device).repeat_interleave(heads)

        made = _Tables(
            units=units.to(device),
            columns=columns,
            surplus=by_unit(due.surplus),
            sinks=by_unit([min(heavy, config.num_sink_tokens) for heavy, _ in splits]),
            recent=by_unit([recent for _, recent in splits]),
            tail=None if tails is None else by_unit(tails.tolist()),
            most=most,
            offered=None if bool(named.all()) else named.flatten().nonzero().flatten().to(device),
            row=arena.row[units.to(device)],
        )
        if len(self._tables) > 64:
            self._tables.clear()
        self._tables[due] = made
        return made


def nearest_of_set(evicted: Tensor, kept: Tensor, can: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each evicted key to its nearest target, and which that is; of equal ones the lowest position.

    For slots that lie in any order.

    Args:
        evicted: [B, h, E, D], few; kept: [B, h, C, D]; can: [B, h, C] bool, the targets; positions: [B, h, C] int64.
    """
    dtype, width = stats_dtype(kept.dtype), kept.shape[-2]
    kept, own = pad(kept.to(dtype), (0, 0, 0, -width % _MULTIPLE)), unit(evicted)
    norm = kept.norm(dim=-1)
    cosine = (own @ kept.mT / torch.where(norm > 0, norm, 1).unsqueeze(-2))[..., :width]
    cosine = cosine.masked_fill(~can.unsqueeze(-2), -torch.inf)
    best = cosine.amax(-1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    index = positions.unsqueeze(-2).masked_fill((cosine < best) | ~can.unsqueeze(-2), last).argmin(-1)
    return best.squeeze(-1), index
