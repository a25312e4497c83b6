"""Evictions of a cache's layers to their budgets: which are due, run alike on all ranks of the request.

At the end of a prompt one block of heads after the other, each with an exchange of its own; while decoding all blocks
that are due at once, with one exchange between ranks.

Shape legend: B rows, M newest slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2o_dist.cache.block import HeadBlock
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.moving import Move
from d2o_dist.comm.request import RequestRanks
from d2o_dist.evict.agree import check_agreement
from d2o_dist.evict.arena import ArenaEvictions, DueBlocks
from d2o_dist.evict.budgets import eviction_budget, rows_due
from d2o_dist.evict.exchange import ByHeads
from d2o_dist.evict.merge import merge_evicted
from d2o_dist.evict.prompt import Order, PromptSlots, Whole, evict_by, with_gain
from d2o_dist.evict.prompt_shards import Shards
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.arena import Arena
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots, join_values, last_of


class Due(NamedTuple):
    """A block of heads that is due for an eviction while decoding.

    Attributes:
        number: its place among all that have a budget here; index: of its layer in the model.
        kv_len: slots of each row afterwards.
    """

    number: int
    index: int
    block: HeadBlock
    kv_len: list[int]


@dataclass(frozen=True)
class Evictions:
    """Of all layers that are compressed.

    Attributes:
        layers: by their index in the model.
        num_seen: tokens seen by each row.
    """

    layers: Mapping[int, Layer]
    config: D2OConfig
    ranks: RequestRanks
    num_seen: Sequence[int]

    # ---- the end of a prompt ---------------------------------------------------------------------------------------

    def at_prompt_end(self, *, is_last: bool = True) -> None:
        """Evict every block to its budget; is_last: whether the budgets stay, or are trimmed once more."""
        for index, layer in self.layers.items():
            for block in layer.blocks:
                if not block.layout.is_spread:
                    if block.slot_budgets is not None:
                        self._evict_heads(index, block, is_last)
                elif block.slot_budgets is None:
                    if is_last:
                        block.layout.settle_whole()
                else:
                    self._evict_spread(index, block, is_last)
        self._end_of_heads(1)

    def _step(
        self, held: PromptSlots, block: HeadBlock, budget: LayerBudget | None, is_last: bool
    ) -> Slots:
        """What an eviction of a block leaves here, of slots that rank as at its first one."""
        order = block.order
        if order is None:
            seen = torch.tensor(self.num_seen, device=block.store.buffers.positions.device)
            order = Order.of(held, self.config, seen, finalize=True)
        left, block.state, order = evict_by(
            held, order, budget or _all_of(block), block.state, self.config, nearest=nearest_kept
        )
        block.order = None if is_last else order
        return with_gain(left, held, order) if is_last else left

    def _evict_heads(self, index: int, block: HeadBlock, is_last: bool) -> None:
        """Of a block of which all slots are here. Collectives: one, if anything is merged; one more between copies of
        KV heads."""
        slots = block.store.slots
        budget, kv_len = self._budget_of(block)
        if budget is None and self._others_may_ask([self.layers[index]], 1):
            self._join(torch.uint8)
        left = self._step(Whole(slots, self._by_heads, merge_evicted), block, budget, is_last)
        block.store.hold(left, kv_len)
        if budget is not None and not self._per_head:
            self._check({index: [left.positions]})

    def _evict_spread(self, index: int, block: HeadBlock, is_last: bool) -> None:
        """Of a block of which every rank has some slots; makes the shards of its heads level, whether any row is due or
        not."""
        held = Shards(block.layout.slots, self.ranks)
        budget, kv_len = self._budget_of(block)
        left = self._step(held, block, budget, is_last)
        room = max(*block.slot_budgets, *kv_len) + (self.config.eviction_interval or 0)
        slots, counts, positions = held.level(join_values(left, block.store.latent), room)
        most = max(self.config.split(slots)[1] for slots in block.slot_budgets)
        block.layout.settle(slots, counts, kv_len, last_of(positions, kv_len, most))
        self._check({index: [positions, counts]})

    def _budget_of(self, block: HeadBlock) -> tuple[LayerBudget | None, list[int]]:
        """Of the rows that are due when a prompt ends, None if none is; and what each holds afterwards."""
        device = block.store.buffers.positions.device
        return eviction_budget(block.slot_budgets, block.kv_len, self.config, device) or (None, block.kv_len)

    # ---- while decoding --------------------------------------------------------------------------------------------

    def in_arena(self, move: Move | None = None) -> ArenaEvictions | None:
        """Move every block that has a budget into one arena, where it stays while decoding; None if there is none.

        Args:
            move: that all of them have taken part in already.
        """
        blocks = [block for _, block in self._budgeted]
        if not blocks:
            return None
        if move is None:
            move = Move.of(blocks, self.config, self.ranks)
            for block in blocks:
                move.enter(block)
        evictions = move.end(self.num_seen, self._by_heads)
        self.hold_shares(evictions.arena)
        return evictions

    def hold_shares(self, arena: Arena) -> None:
        """Let spread blocks count in the arena's table, of which each has a part."""
        if arena.shares is not None:
            for (_, block), part in zip(self._budgeted, arena.split_shares(), strict=True):
                block.layout.shares = part

    def while_decoding(self, seen: Tensor, evictions: ArenaEvictions | None) -> bool:
        """Evict the rows that are an eviction interval over their budget, all layers at once; whether any was due.

        Args:
            seen: [B] int64 tokens seen, on the device.
            evictions: of the arena that the layers lie in.
        """
        jobs, slack = [], self.config.eviction_interval
        for number, (index, block) in enumerate(self._budgeted):
            due, left = rows_due(block.slot_budgets, block.kv_len, slack)
            if any(due):
                jobs.append(Due(number, index, block, left))
        if jobs:
            self._run(jobs, seen, evictions)
        elif self._others_may_ask(self.layers.values(), slack):
            # Collectives are for all tensor ranks: those that have nothing due join in with nothing.
            self._join(torch.int64)
        self._end_of_heads(slack)
        return bool(jobs)

    def _run(self, jobs: Sequence[Due], seen: Tensor, evictions: ArenaEvictions) -> None:
        both = [(held, left) for job in jobs for held, left in zip(job.block.kv_len, job.kv_len, strict=True)]
        due = DueBlocks(
            blocks=tuple(job.number for job in jobs),
            surplus=tuple(held - left for held, left in both),
            slots=tuple(slots for job in jobs for slots in job.block.slot_budgets),
        )
        rows, decided = len(self.num_seen), {}
        before = D2OState.cat([job.block.state for job in jobs], [rows] * len(jobs))
        state, victims = evictions.run(due, before, seen)
        for job, own, part in zip(jobs, state.split(rows), victims.split(rows), strict=True):
            job.block.state = own
            job.block.layout.evicted(job.kv_len)
            shares = job.block.layout.shares if job.block.layout.is_spread else None
            decided[job.index] = [part] if shares is None else [part, shares.held]
        if not self._per_head:
            self._check(decided)

    # ---- ranks -----------------------------------------------------------------------------------------------------

    @property
    def _budgeted(self) -> list[tuple[int, HeadBlock]]:
        """What has a budget and slots here, with the index of its layer in the model; the blocks of the arena."""
        return [(index, block) for index, layer in self.layers.items() for block in layer.blocks
                if block.slot_budgets is not None]  # fmt: skip

    @property
    def _per_head(self) -> bool:
        """Whether each KV head is evicted by itself: which of them are due then differs from rank to rank."""
        return self.config.budget.per_head

    @property
    def _by_heads(self) -> ByHeads:
        return ByHeads(self.ranks, self._per_head)

    def _join(self, dtype: torch.dtype) -> None:
        """Take part in the exchanges of an eviction of which this rank has nothing; dtype: of what others choose."""
        self.ranks.from_first_copy(self._nothing("positions").to(dtype))
        if self.config.merge.merges:
            self._by_heads.gather(self._nothing("scores"))

    def _others_may_ask(self, layers: Collection[Layer], slack: int) -> bool:
        """Whether other ranks may have heads that are due, and copies of them whose holders decide together."""
        if not self._per_head or self.ranks.kv_replicas == 1:
            return False
        heads = [head for layer in layers for head in layer.budgeted if head.slot_budgets is not None]
        return any(
            held >= slots + slack for head in heads for held, slots in zip(head.kv_len, head.slot_budgets, strict=True)
        )

    def _nothing(self, name: str) -> Tensor:
        """An empty tensor [1, 1, 0] like the statistics `name` of this rank's slots."""
        block = next(iter(self.layers.values())).blocks[0]
        return getattr(block.store.buffers, name).new_empty(1, 1, 0)

    def _end_of_heads(self, slack: int) -> None:
        """Of heads with budgets of their own: count what other ranks have evicted, and compare."""
        if self._per_head:
            for layer in self.layers.values():
                for head in layer.elsewhere:
                    head.evict(slack)
            self._check_heads()

    def _check(self, decided: dict[int, list[Tensor]]) -> None:
        """With `check_replicas`: compare between the ranks what was just decided in some layers."""
        if self.ranks.parallel.check_replicas:
            blocks = {index: self.layers[index].blocks[0] for index in decided}
            thresholds = {index: block.state.threshold for index, block in blocks.items()}
            spread = any(block.layout.is_spread for block in blocks.values())
            check_agreement(thresholds, decided, self.ranks, spread=spread)

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
            index: [tensor for one in layer.blocks for tensor in (one.store.slots.positions, one.state.threshold)]
            for index, layer in self.layers.items()
        }
        check_agreement(lengths, copies, self.ranks, spread=False, what="lengths or budgets of heads")


def _all_of(block: HeadBlock) -> LayerBudget:
    """A budget of all that is held, which evicts nothing."""
    return LayerBudget(max(block.kv_len), 0, most_kept=max(block.kv_len), most_evicted=0)
