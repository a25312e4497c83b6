"""Evictions of a cache's layers to their budgets: which are due, run alike on all ranks of the request.

At finalize one layer after the other, each with an exchange of its own; while decoding all layers that are due at once,
with one exchange between ranks.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2o_dist.cache.headwise import HeadwiseLayer
from d2o_dist.cache.layer import FullLayer
from d2o_dist.cache.layers import CompressedLayer
from d2o_dist.cache.sharded import ShardedLayer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.compression.agree import check_agreement
from d2o_dist.compression.budgets import eviction_budget, rows_due
from d2o_dist.compression.evict_arena import ArenaEvictions, DueBlocks
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.compression.shard_evict import evict_shards
from d2o_dist.compression.shard_finalize import finalize_shard
from d2o_dist.core.compress import evict_ordered
from d2o_dist.core.select import add_rates, choose, ranking_rates, rate_gain
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.arena import Arena, Block
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots

# The budget of a unit, and the slots of each row after its eviction.
_Budget = tuple[LayerBudget, list[int]]


class Due(NamedTuple):
    """What is due for an eviction while decoding: the slots of a layer that have one budget.

    Attributes:
        number: its place among all that have a budget here; index: of its layer in the model.
        kv_len: slots of each row afterwards.
    """

    number: int
    index: int
    unit: FullLayer | ShardedLayer
    kv_len: list[int]


@dataclass(frozen=True)
class LayerEvictions:
    """Of layers of which this rank holds all slots of some heads.

    Attributes:
        layers: those that are compressed, by their index in the model.
        num_seen: tokens seen by each row.
    """

    layers: Mapping[int, FullLayer | HeadwiseLayer]
    config: D2OConfig
    ranks: RequestRanks
    num_seen: Sequence[int]

    def at_finalize(self, *, in_arena: bool) -> ArenaEvictions | None:
        """Evict every layer to its budget.

        Args:
            in_arena: whether what is left goes into one arena, for evictions while decoding, which is returned.
        """
        units = _budgeted(self.layers)
        due = [_budget_of(unit) for _, unit in units]
        arena = self._make_arena([unit for _, unit in units], due) if in_arena and units else None
        for number, ((index, unit), job) in enumerate(zip(units, due, strict=True)):
            if job is None:
                slots, held = self._whole(index, unit), unit.kv_len
            else:
                slots, held = self._evicted(unit, *job), job[1]
            if arena is None:
                unit.store.replace(slots, held, max(*unit.slot_budgets, *held) + (self.config.eviction_interval or 0))
            else:
                unit.store.enter(arena.view(number), slots, held)
            if job is not None and not self._by_head:
                _check(self.layers, {index: [unit.store.slots.positions]}, self.ranks, by_sequence=False)
        self._end_of_heads(1)
        return None if arena is None else self._arena_evictions(arena, [unit for _, unit in units])

    def _whole(self, index: int, unit: FullLayer) -> Slots:
        """All of a unit of which no row is over its budget, [B, h, S, ...] in order."""
        slots = unit.store.slots
        gain = rate_gain(slots, ranking_rates(slots, self.config, finalize=True), self.config)
        if self._others_may_ask([self.layers[index]], 1):
            self._join(torch.uint8)
        return slots if gain is None else add_rates(slots, gain)

    def _evicted(self, unit: FullLayer, budget: LayerBudget, kv_len: Sequence[int]) -> Slots:
        """What is left of a unit, [B, h, S, ...] in order. Collectives: one, if anything is merged; one more between
        copies of KV heads."""
        slots = unit.store.slots
        seen = torch.tensor(self.num_seen, device=slots.positions.device)
        left, unit.state = evict_ordered(
            slots, budget, unit.state, self.config, num_seen_tokens=seen, nearest=nearest_kept, merge=merge_evicted,
            gather_heads=self._gather_reports, choice=self._choice(slots, budget, seen), here=self._own_heads,
        )  # fmt: skip
        if self._by_head and self.ranks.kv_replicas > 1 and self.config.merge.merges and not max(kv_len):
            # Nothing stays, so it asked nothing, and other heads may.
            self._gather_reports(self._nothing("scores"))
        return left

    def _choice(self, slots: Slots, budget: LayerBudget, seen: Tensor) -> Tensor | None:
        """What becomes of the slots of a unit, as the first of the ranks chose that hold copies of its heads; None
        where there are no copies. What they rank by may differ by a last bit."""
        if self.ranks.kv_replicas == 1:
            return None
        ranking = self.config.score.rank(slots, ranking_rates(slots, self.config, finalize=True), seen)
        return self.ranks.from_first_copy(choose(slots, budget, ranking, self.config, finalize=True))

    def _make_arena(self, units: Sequence[FullLayer], due: Sequence[_Budget | None]) -> Arena:
        """A block for each unit: room for the budget and what gathers between evictions."""
        blocks = []
        for unit, job in zip(units, due, strict=True):
            held = unit.kv_len if job is None else job[1]
            room = [max(slots, now) + self.config.eviction_interval
                    for slots, now in zip(unit.slot_budgets, held, strict=True)]  # fmt: skip
            blocks.append(Block(unit.store.shape[0], max(room), tuple(room)))
        return Arena(blocks, units[0].store.slots.keys)

    def _arena_evictions(self, arena: Arena, units: Sequence[FullLayer]) -> ArenaEvictions:
        device = arena.start.device
        arena.settle([unit.kv_len for unit in units])
        most = max(1, *(self.config.split(slots)[1] for unit in units for slots in unit.slot_budgets))
        back = torch.arange(most, device=device) - most
        newest = []
        for number, unit in enumerate(units):
            # The slots still lie in order, from the first one on.
            place = torch.tensor(unit.kv_len, device=device)[:, None, None] + back
            positions = arena.view(number).positions
            place = place.expand(-1, positions.shape[1], -1)
            newest.append(positions.gather(-1, place.clamp_min(0)).masked_fill(place < 0, -1).flatten(0, 1))
        seen = torch.tensor(self.num_seen, device=device)
        return ArenaEvictions(
            arena, self.config, torch.cat(newest), seen, nearest_kept, self._gather_reports,
            self.ranks.from_first_copy, self._own_heads,
        )  # fmt: skip

    def while_decoding(self, slack: int, seen: Tensor, evictions: ArenaEvictions | None) -> bool:
        """Evict the rows that hold `slack` slots or more over their budget, all layers at once; whether any was due.

        Args:
            seen: [B] int64 tokens seen, on the device.
            evictions: of the arena that the layers lie in.
        """
        jobs = _all_due(self.layers, slack)
        if jobs:
            self._run(jobs, seen, evictions)
        elif self._others_may_ask(self.layers.values(), slack):
            # Collectives are for all tensor ranks: those that have nothing due join in with nothing.
            self._join(torch.int64)
        self._end_of_heads(slack)
        return bool(jobs)

    def _run(self, jobs: Sequence[Due], seen: Tensor, evictions: ArenaEvictions) -> None:
        both = [(held, left) for job in jobs for held, left in zip(job.unit.kv_len, job.kv_len, strict=True)]
        due = DueBlocks(
            blocks=tuple(job.number for job in jobs),
            surplus=tuple(held - left for held, left in both),
            slots=tuple(slots for job in jobs for slots in job.unit.slot_budgets),
        )
        state, victims = evictions.run(due, D2OState.cat([job.unit.state for job in jobs]), seen)
        rows = len(self.num_seen)
        for job, own in zip(jobs, state.split(rows), strict=True):
            job.unit.state = own
            job.unit.store.kv_len = list(job.kv_len)
        if not self._by_head:
            decided = {job.index: [part] for job, part in zip(jobs, victims.split(rows), strict=True)}
            _check(self.layers, decided, self.ranks, by_sequence=False)

    def _join(self, dtype: torch.dtype) -> None:
        """Take part in the exchanges of an eviction of which this rank has nothing; dtype: of what others choose."""
        self.ranks.from_first_copy(self._nothing("positions").to(dtype))
        if self.config.merge.merges:
            self._gather_reports(self._nothing("scores"))

    def _others_may_ask(self, layers: Collection[FullLayer | HeadwiseLayer], slack: int) -> bool:
        """Whether any head with a budget of its own is due, on whichever rank, where several ranks hold each: those
        exchange what they decide, and a collective is for all tensor ranks. All know all lengths."""
        if not self._by_head or self.ranks.kv_replicas == 1:
            return False
        heads = [head for layer in layers for head in layer.budgeted if head.slot_budgets is not None]
        return any(
            held >= slots + slack for head in heads for held, slots in zip(head.kv_len, head.slot_budgets, strict=True)
        )

    def _nothing(self, name: str) -> Tensor:
        """An empty tensor [1, 1, 0] like the statistics `name` of this rank's slots."""
        unit = next(iter(self.layers.values())).units[0]
        return getattr(unit.store.slots, name).new_empty(1, 1, 0)

    @property
    def _own_heads(self) -> slice | None:
        """Which of the heads in the answer of `_gather_reports` are those at hand, where other ranks hold copies of
        them; None where there are no copies."""
        here = self.ranks.copied_heads
        return slice(0, 1) if here is not None and self._by_head else here

    @property
    def _by_head(self) -> bool:
        """Whether each KV head is evicted by itself: which of them are due then differs from rank to rank."""
        return self.config.budget.per_head

    def _end_of_heads(self, slack: int) -> None:
        """Of heads with budgets of their own: count what other ranks have evicted, and compare."""
        if self._by_head:
            for layer in self.layers.values():
                for head in layer.elsewhere:
                    head.evict(slack)
            self._check_heads()

    def _gather_reports(self, reports: Tensor) -> Tensor:
        """[B, h, X] of the KV heads at hand -> [B, H, X] of the whole layer, the same on every rank.

        A head with a budget of its own is all of its layer, as the first of the ranks that hold copies of it has it.
        """
        if self._by_head:
            return self.ranks.from_first_copy(reports)
        return self.ranks.gather_kv_heads(self.ranks.join_heads(reports))

    def _check_heads(self) -> None:
        """As `_check`, of all layers at once, due or not: ranks that differ may disagree on what is due.

        All ranks know the lengths and budgets of all heads; those that hold copies of one, its slots and its threshold.
        """
        if not self.ranks.parallel.check_replicas:
            return
        lengths = {
            index: torch.tensor([[head.kv_len, head.slot_budgets or head.kv_len] for head in layer.budgeted])
            for index, layer in self.layers.items()
        }
        copies = {
            index: [tensor for unit in layer.units for tensor in (unit.store.slots.positions, unit.state.threshold)]
            for index, layer in self.layers.items()
        }
        check_agreement(lengths, copies, self.ranks, by_sequence=False, what="lengths or budgets of heads")


@dataclass(frozen=True)
class ShardEvictions:
    """Of layers of which every sequence rank holds some slots of all heads. Attributes: as in `LayerEvictions`."""

    layers: Mapping[int, ShardedLayer]
    config: D2OConfig
    ranks: RequestRanks
    num_seen: list[int]

    def at_finalize(self, *, in_arena: bool) -> None:
        """Evict every layer to its budget, and make the shards of its heads level."""
        for index, layer in self.layers.items():
            if layer.slot_budgets is None:
                layer.settle_whole(self.num_seen)
            else:
                self._finalize(index, layer)

    def _finalize(self, index: int, layer: ShardedLayer) -> None:
        slots = layer.slots_for_finalize()
        # No row is due: a budget of all that is held evicts nothing, and the shards are made level all the same.
        budget, kv_len = _budget_of(layer) or (LayerBudget(max(layer.kv_len), 0), layer.kv_len)
        shard, state = finalize_shard(
            slots, budget, layer.state, self.config, self.ranks,
            num_seen_tokens=torch.tensor(self.num_seen, device=slots.positions.device), nearest=nearest_kept,
            room=max(*layer.slot_budgets, *kv_len) + (self.config.eviction_interval or 0),
        )  # fmt: skip
        layer.settle(shard, state, kv_len, self.num_seen)
        _check(self.layers, {index: [shard.positions, shard.held]}, self.ranks, by_sequence=True)

    def while_decoding(self, slack: int, seen: Tensor, evictions: None) -> bool:
        """As `LayerEvictions.while_decoding`."""
        jobs = _all_due(self.layers, slack)
        if not jobs:
            return False
        shards = [
            job.unit.job([old - new for old, new in zip(job.unit.kv_len, job.kv_len, strict=True)], self.num_seen)
            for job in jobs
        ]
        evictions = evict_shards(shards, self.config, self.ranks, num_seen_tokens=seen, nearest=nearest_kept)
        for job, eviction in zip(jobs, evictions, strict=True):
            job.unit.take_eviction(eviction, job.kv_len)
        decided = {job.index: [one.victims, one.held] for job, one in zip(jobs, evictions, strict=True)}
        _check(self.layers, decided, self.ranks, by_sequence=True)
        return True


def _budgeted(layers: Mapping[int, CompressedLayer]) -> list[tuple[int, FullLayer | ShardedLayer]]:
    """What has a budget and slots here, with the index of its layer in the model; in an arena, its blocks."""
    return [(index, unit) for index, layer in layers.items() for unit in layer.units if unit.slot_budgets is not None]


def _all_due(layers: Mapping[int, CompressedLayer], slack: int) -> list[Due]:
    jobs = []
    for number, (index, unit) in enumerate(_budgeted(layers)):
        due, left = rows_due(unit.slot_budgets, unit.kv_len, slack)
        if any(due):
            jobs.append(Due(number, index, unit, left))
    return jobs


def _budget_of(unit: FullLayer | ShardedLayer) -> _Budget | None:
    """At the end of a prompt; None if no row holds more than its budget."""
    return eviction_budget(unit.slot_budgets, unit.kv_len, unit.config, unit.store.slots.positions.device)


def _check(
    layers: Mapping[int, CompressedLayer],
    decided: dict[int, list[Tensor]],
    ranks: RequestRanks,
    *,
    by_sequence: bool,
) -> None:
    """With `check_replicas`: compare between the ranks what was just decided in some layers."""
    if ranks.parallel.check_replicas:
        thresholds = {index: layers[index].state.threshold for index in decided}
        check_agreement(thresholds, decided, ranks, by_sequence=by_sequence)
