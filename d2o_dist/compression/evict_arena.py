"""Evictions while decoding, of all layers that are due at once, in the arena that holds their slots.

Propose the victims of each unit and the slots that may take them in, exchange what the gate must hear from the KV heads
of other ranks, commit: merge into the targets and free the victims' slots. Nothing else moves. The number of operators
does not grow with the layers (but for targets among all kept slots, whose keys are read where they lie).

Shape legend: G groups (a row of a layer, or of a KV head with a budget of its own), h KV heads of a group, u = G x h
units, C slots of the widest segment, E victims of a unit, K targets, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o_dist.core.compress import MAX_FOUND, GatherHeads, Nearest, count_dropped, found_of, judge, with_found
from d2o_dist.core.ranked import ordered
from d2o_dist.policy import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.policy.merge import MergeSums, apply_merge, unit
from d2o_dist.policy.statistics import COLUMN_SUMS, PEAKS, RATES
from d2o_dist.slots.arena import Arena
from d2o_dist.slots.slots import D2OState, Slots, stats_dtype


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
    """The numbers of `DueBlocks`, by unit and on the device."""

    units: Tensor
    columns: Tensor  # [u, C] in the storage
    surplus: Tensor  # [u]
    sinks: Tensor  # [u]
    recent: Tensor  # [u]
    tail: Tensor | None  # [u]
    most_tail: int
    row: Tensor  # [u]


@dataclass
class ArenaEvictions:
    """Evictions of one arena.

    Args:
        newest: [U, M] int64 positions of the newest slots of each unit when it was compressed, the last at the end;
            they tell what is recent until M tokens more were seen. seen_then: [B] int64, tokens seen at that time.
        gather_heads: brings together what the heads of all ranks report.
        from_first_copy: of ranks that hold copies of these heads, what the first of them has.
        own_heads: which of the heads that `gather_heads` gives are these, as the first of those ranks has them; None
            where there are no copies.
    """

    arena: Arena
    config: D2OConfig
    newest: Tensor
    seen_then: Tensor
    nearest: Nearest
    gather_heads: GatherHeads
    from_first_copy: Callable[[Tensor], Tensor] = lambda tensor: tensor
    own_heads: slice | None = None
    _tables: dict[DueBlocks, _Tables] = field(default_factory=dict)

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
        positions = slots.positions[where].view(groups, heads, number)
        valid = (torch.arange(number, device=where.device) < tables.surplus[:, None]).view(groups, heads, -1)[:, :1]
        if not self.config.merge.merges:
            state = count_dropped(valid, heads, state)
        else:
            evicted = _take(slots, where, groups)
            similarity, target = self._nearest(tables, evicted, victim, tail, due)
            reports = head_reports(similarity, valid.expand_as(similarity), self.config.merge.gate)
            if self.own_heads is None:
                everyone = self.gather_heads(reports)
            else:
                # Whole numbers: which of the unit's own slots the target is.
                starts = self.arena.start[tables.units].view(groups, heads, 1)
                assert tables.columns.shape[1] < MAX_FOUND
                sent = self.gather_heads(with_found(reports, similarity, target - starts))
                everyone, similarity, target = found_of(sent, self.own_heads, reports.shape[-1], number)
                target = target.long() + starts
            merged, state = judge(similarity, valid, everyone, state, self.config)
            self._merge(evicted, similarity, target, merged)
        self.arena.release(tables.units, where, victim.slot, tables.surplus > 0)
        return state, positions

    def select_rows(self, index: Tensor) -> ArenaEvictions:
        """Of rows `index`, in that order, repeated where repeated."""
        before = self.arena.units_of_rows(index)
        arena, newest = self.arena.select_rows(index), self.newest[before]
        seen_then = self.seen_then[index.to(self.seen_then.device)]
        return dataclasses.replace(self, arena=arena, newest=newest, seen_then=seen_then, _tables={})

    # ---- propose -------------------------------------------------------------------------------------------------

    def _propose(self, tables: _Tables, seen: Tensor, number: int) -> tuple[_Found, _Found | None]:
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
        lowest = lowest_first(ranking, positions, min(number + tables.most_tail, positions.shape[1]))
        # Copies of a slot lie in the same place; what they rank by may differ by a last bit.
        lowest = self.from_first_copy(lowest)
        count = torch.arange(number, device=lowest.device)
        victim = _by_position(lowest[:, :number], positions, count < tables.surplus[:, None])
        if tables.tail is None:
            return victim, None
        count = torch.arange(tables.most_tail, device=lowest.device)
        place = (tables.surplus[:, None] + count).clamp_max(lowest.shape[1] - 1)
        inside = (count < tables.tail[:, None]) & (tables.surplus[:, None] + count < lowest.shape[1])
        chosen = lowest.gather(1, place)
        inside &= candidate.gather(1, chosen)
        return victim, _by_position(chosen, positions, inside)

    def _ranking(self, columns: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """[u, C] what slots rank by."""
        storage, score = self.arena.storage, self.config.score
        nothing = storage.scores[:1, None, None].expand(len(positions), 1, 1)
        scores = storage.scores[columns][:, None] if score.statistics & {COLUMN_SUMS, PEAKS} else nothing
        rates = storage.rates[columns][:, None] if RATES in score.statistics else nothing
        held = Slots(nothing, nothing, positions[:, None], scores, rates, nothing)
        return score.rank(held, held.rates, seen)[:, 0]

    def _where(self, tables: _Tables, found: _Found) -> Tensor:
        """[u, n] in the storage; N where nothing was found."""
        return tables.columns.gather(1, found.slot).masked_fill(~found.valid, self.arena.num_slots)

    # ---- the nearest target --------------------------------------------------------------------------------------

    def _nearest(
        self, tables: _Tables, evicted: Slots, victim: _Found, tail: _Found | None, due: DueBlocks
    ) -> tuple[Tensor, Tensor]:
        """[G, h, E] cosine of each victim to its nearest target, and where in the storage that is."""
        groups, heads = evicted.positions.shape[:2]
        if tail is not None:
            where = self._where(tables, tail).view(groups, heads, -1)
            keys = self.arena.storage.keys[where]
            similarity, index = self.nearest(evicted.keys, keys, tail.valid.view(groups, heads, -1))
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
            similarity, index = nearest_of_set(evicted.keys[part], view.keys, can, view.positions)
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
        kept = apply_merge(_take(storage, where.flatten(0, 1), groups), added, rule)
        flat = where.flatten()
        keys, mass = ("keys",) * rule.averages_keys, ("rates", "log_mass") * rule.keeps_mass
        for name in ("values", *keys, *mass):
            getattr(storage, name)[flat] = getattr(kept, name).flatten(0, 2)

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

        def by_unit(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), device=device).repeat_interleave(heads)

        made = _Tables(
            units=units.to(device),
            columns=arena.columns(due.blocks),
            surplus=by_unit(due.surplus),
            sinks=by_unit([min(heavy, config.num_sink_tokens) for heavy, _ in splits]),
            recent=by_unit([recent for _, recent in splits]),
            tail=None if tails is None else by_unit(tails.tolist()),
            most_tail=0 if tails is None else int(tails.max()),
            row=arena.row[units.to(device)],
        )
        if len(self._tables) > 64:
            self._tables.clear()
        self._tables[due] = made
        return made


@dataclass(frozen=True)
class _Found:
    """Slots of each unit, [u, n], counted from its start, by position; valid: bool, which of them there are."""

    slot: Tensor
    valid: Tensor


def _by_position(slot: Tensor, positions: Tensor, valid: Tensor) -> _Found:
    """Slots [u, n] of units whose slots have `positions` [u, C]; those that are not valid come last."""
    order = positions.gather(1, slot).masked_fill(~valid, torch.iinfo(torch.int64).max).argsort(dim=-1)
    return _Found(slot.gather(1, order), valid.gather(1, order))


def _take(storage: Slots, where: Tensor, groups: int) -> Slots:
    """The slots at `where` [u, n] of the storage: [G, h, n, ...]."""
    return storage.map(lambda tensor: tensor[where].unflatten(0, (groups, -1)))


def nearest_of_set(evicted: Tensor, kept: Tensor, can: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each evicted key to its nearest target, and which that is; of equal ones the lowest position.

    For slots that lie in any order.

    Args:
        evicted: [B, h, E, D], few; kept: [B, h, C, D]; can: [B, h, C] bool, the targets; positions: [B, h, C] int64.
    """
    dtype = stats_dtype(kept.dtype)
    kept, own = kept.to(dtype), unit(evicted)
    norm = kept.norm(dim=-1)
    cosine = own @ kept.mT / torch.where(norm > 0, norm, 1).unsqueeze(-2)
    cosine = cosine.masked_fill(~can.unsqueeze(-2), -torch.inf)
    best = cosine.amax(-1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    index = positions.unsqueeze(-2).masked_fill((cosine < best) | ~can.unsqueeze(-2), last).argmin(-1)
    return best.squeeze(-1), index


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
