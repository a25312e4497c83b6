"""Evictions of a cache's layers to their budgets: which are due, run alike on all ranks of the request.

At finalize one layer after the other, so that no more than one is held twice; while decoding all layers that are due
with one exchange between ranks, since little is held.

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
from d2o_dist.compression.budgets import eviction_budget
from d2o_dist.compression.evict import run_evictions, steps_in_place
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.compression.shard_evict import evict_shards
from d2o_dist.compression.shard_finalize import finalize_shard
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.compress import EvictionSteps, eviction_steps
from d2o_dist.core.select import add_rates, choose, rank_scores, ranking_rates, rate_gain
from d2o_dist.core.types import D2OState, LayerBudget, Slots
from d2o_dist.kernels.backend import cuda_leaves
from d2o_dist.kernels.nearest_kept import nearest_kept


class DueUnit(NamedTuple):
    """What is to be evicted: of which layer, the slots of it that have one budget, that budget, and the slots of each
    row after it."""

    index: int
    unit: FullLayer | ShardedLayer
    budget: LayerBudget
    kv_len: list[int]


def due_unit(index: int, unit: FullLayer | ShardedLayer, slack: int) -> DueUnit | None:
    """The eviction of a layer (or head) with budgets; None if no row holds `slack` slots or more over its own."""
    due = eviction_budget(unit.slot_budgets, unit.kv_len, slack, unit.config, unit.store.slots.positions.device)
    return None if due is None else DueUnit(index, unit, *due)


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

    def at_finalize(self) -> None:
        """Evict every layer to its budget."""
        for index, layer in self.layers.items():
            for unit in layer.units:
                if unit.slot_budgets is not None:
                    self._finalize(index, unit)
        self._end_of_heads(1)

    def _finalize(self, index: int, unit: FullLayer) -> None:
        due = due_unit(index, unit, 1)
        held = unit.kv_len if due is None else due.kv_len
        # From here on the buffers never move: room for the budget and what gathers between evictions.
        capacity = max(*unit.slot_budgets, *held) + (self.config.eviction_interval or 0)
        if due is None:
            slots = unit.store.slots
            gain = rate_gain(slots, ranking_rates(slots, self.config, finalize=True), self.config)
            if gain is not None:
                slots.rates.copy_(add_rates(slots, gain).rates)
            unit.store.reserve(capacity)
            if self._others_may_ask([self.layers[index]], 1):
                self._evict([], None, finalize=True)
            return
        seen = torch.tensor(self.num_seen, device=unit.store.slots.positions.device)
        [(slots, unit.state)] = self._evict([due], seen, finalize=True)
        unit.store.replace(slots, due.kv_len, capacity)
        self._check([due])

    def while_decoding(self, slack: int, seen: Tensor) -> bool:
        """Evict the rows that hold `slack` slots or more over their budget; whether any row was due.

        Args:
            seen: [B] int64 tokens seen, on the device.
        """
        jobs = _all_due(self.layers, slack)
        if jobs or self._others_may_ask(self.layers.values(), slack):
            results = self._evict(jobs, seen, finalize=False)
            for job, (slots, state) in zip(jobs, results, strict=True):
                job.unit.state = state
                job.unit.store.replace(slots, job.kv_len)
            self._check(jobs)
        self._end_of_heads(slack)
        return bool(jobs)

    def _evict(self, jobs: Sequence[DueUnit], seen: Tensor | None, *, finalize: bool) -> list[tuple[Slots, D2OState]]:
        """What the evictions leave. Collectives: one, if anything is merged; one more between copies of KV heads."""
        choices = self._choices(jobs, seen, finalize=finalize)
        steps = [
            (None if finalize else self._steps_in_place(job)) or self._steps(job, choice, seen, finalize=finalize)
            for job, choice in zip(jobs, choices, strict=True)
        ]
        asks = self._by_head and self.ranks.kv_replicas > 1 and self.config.merge != "none"
        return run_evictions(steps, self._gather_reports, self._nothing("scores") if asks else None)

    def _choices(
        self, jobs: Sequence[DueUnit], seen: Tensor | None, *, finalize: bool
    ) -> Sequence[Tensor | None]:
        """What becomes of the slots of each job, as the first of the ranks chose that hold copies of its heads; None
        where there are no copies. What they rank by may differ by a last bit."""
        if self.ranks.kv_replicas == 1:
            return [None] * len(jobs)
        chosen = []
        for job in jobs:
            slots, config = job.unit.store.slots, self.config
            ranking = rank_scores(
                slots, ranking_rates(slots, config, finalize=finalize), config, num_seen_tokens=seen
            )
            chosen.append(choose(slots, job.budget, ranking, config, finalize=finalize))
        mine = torch.cat(chosen, -1) if chosen else self._nothing("positions").to(torch.uint8)
        return self.ranks.from_first_copy(mine).split([one.shape[-1] for one in chosen] or [0], -1)[: len(jobs)]

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
    def _by_head(self) -> bool:
        """Whether each KV head is evicted by itself: which of them are due then differs from rank to rank."""
        return self.config.budget_per == "head"

    def _end_of_heads(self, slack: int) -> None:
        """Of heads with budgets of their own: count what other ranks have evicted, and compare."""
        if self._by_head:
            for layer in self.layers.values():
                for head in layer.elsewhere:
                    head.evict(slack)
            self._check_heads()

    def _steps_in_place(self, job: DueUnit) -> EvictionSteps | None:
        if self._by_head:
            cuda_leaves("evictions of heads with budgets of their own")
            return None
        if self.ranks.kv_replicas > 1:
            cuda_leaves("evictions of KV heads that several ranks hold")
            return None
        alone = self.ranks.tp.size == 1 and not self.ranks.deals_tokens
        return steps_in_place(
            job.unit.store.slots, job.unit.state, self.config, held=job.unit.kv_len, kept=job.kv_len,
            num_seen=self.num_seen, all_heads_here=alone,
        )  # fmt: skip

    def _steps(self, job: DueUnit, choice: Tensor | None, seen: Tensor, *, finalize: bool) -> EvictionSteps:
        here = self.ranks.copied_heads
        return eviction_steps(
            job.unit.store.slots, job.budget, job.unit.state, self.config, finalize=finalize,
            num_seen_tokens=seen, nearest=nearest_kept, merge=merge_evicted, choice=choice,
            here=slice(0, 1) if here is not None and self._by_head else here,
        )  # fmt: skip

    def _gather_reports(self, reports: Tensor) -> Tensor:
        """[B, h, X] of the KV heads at hand -> [B, H, X] of the whole layer, the same on every rank.

        A head with a budget of its own is all of its layer, as the first of the ranks that hold copies of it has it.
        """
        if self._by_head:
            return self.ranks.from_first_copy(reports)
        return self.ranks.gather_kv_heads(self.ranks.join_heads(reports))

    def _check(self, jobs: Sequence[DueUnit]) -> None:
        if not self._by_head:
            decided = {job.index: [job.unit.store.slots.positions] for job in jobs}
            _check(self.layers, decided, self.ranks, by_sequence=False)

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

    def at_finalize(self) -> None:
        """Evict every layer to its budget, and make the shards of its heads level."""
        for index, layer in self.layers.items():
            if layer.slot_budgets is None:
                layer.settle_whole(self.num_seen)
            else:
                self._finalize(index, layer)

    def _finalize(self, index: int, layer: ShardedLayer) -> None:
        slots, due = layer.slots_for_finalize(), due_unit(index, layer, 1)
        # No row is due: a budget of all that is held evicts nothing, and the shards are made level all the same.
        budget = LayerBudget(max(layer.kv_len), 0) if due is None else due.budget
        kv_len = layer.kv_len if due is None else due.kv_len
        shard, state = finalize_shard(
            slots, budget, layer.state, self.config, self.ranks,
            num_seen_tokens=torch.tensor(self.num_seen, device=slots.positions.device), nearest=nearest_kept,
            room=max(*layer.slot_budgets, *kv_len) + (self.config.eviction_interval or 0),
        )  # fmt: skip
        layer.settle(shard, state, kv_len, self.num_seen)
        _check(self.layers, {index: [shard.positions, shard.held]}, self.ranks, by_sequence=True)

    def while_decoding(self, slack: int, seen: Tensor) -> bool:
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


def _all_due(layers: Mapping[int, CompressedLayer], slack: int) -> list[DueUnit]:
    jobs = [
        due_unit(index, unit, slack)
        for index, layer in layers.items()
        for unit in layer.units
        if unit.slot_budgets is not None
    ]
    return [job for job in jobs if job is not None]


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
