"""The eviction at the end of a prompt, of slots that lie in order: select, find the nearest, ask all heads, merge.

Written once. Where the slots lie, and what ranks must tell each other, is known by what holds them: `Whole` here, and
`prompt_shards.Shards`.

Shape legend: B rows, h KV heads at hand, H KV heads of the layer, S slots, K kept and E evicted slots (of all ranks), X
report width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.core.select import Selection, add_rates, choose, ranking_rates, rate_gain, selection_of
from d2o_dist.evict.exchange import ByHeads
from d2o_dist.evict.judge import MAX_FOUND, Nearest, count_dropped, judge
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.policy.merge import MergeRule, merge_into, nearest_kept
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots, pick

# Numbers of evicted keys that are copied out at once, 8 MiB in float32: the heads of a long prompt one after the other.
EVICTED_AT_ONCE = 1 << 21

# Folds evicted tokens into kept ones; the contract of `policy.merge.merge_into`.
Merge = Callable[[Slots, Slots, Tensor, Tensor, Tensor, MergeRule], Slots]


def heads_at_once(num_rows: int, num_evicted: int, head_dim: int) -> int:
    """Of how many heads the evicted slots are copied out at once."""
    return max(1, EVICTED_AT_ONCE // max(1, num_rows * num_evicted * head_dim))


class PromptSlots(Protocol):
    """The slots of a layer, or of some heads of it, as one rank holds them. Every rank makes the same calls."""

    @property
    def statistics(self) -> Slots:
        """[B, h, S, ...] of all ranks' slots, in order, unused ones last; keys and values may be left out."""

    def decide(self, choice: Tensor | None) -> Tensor | None:
        """What becomes of each slot, [B, h, S] (`core.select.choose`), as one of the ranks chose for all."""

    def keep(self, selection: Selection | None) -> Slots:
        """Of the slots here those that are kept, in order; None: all."""

    def nearest(self, kept: Slots, selection: Selection, find: Nearest) -> tuple[Tensor, Tensor]:
        """[B, h, E] of all evicted slots: the cosine of the nearest that may take one in, and which that is."""

    def reports(self, reports: Tensor, similarity: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, h, X] of the heads at hand -> [B, H, X] of all; the rest as the first holder of these heads has it."""

    def fold(
        self, kept: Slots, selection: Selection, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule
    ) -> Slots:
        """The kept slots here with all ranks' evicted ones folded in; of the last three [B, h, E] of all."""

    def own(self, tensor: Tensor) -> Tensor:
        """[B, h, K] of all kept slots -> of those here."""

    def nothing_stays(self) -> None:
        """Nothing is kept, so nothing is asked; other heads may ask."""


@dataclass(frozen=True)
class Order:
    """By what the slots of all ranks [B, h, S] are chosen. A prompt that is evicted in steps keeps to its first one.

    Attributes:
        ranking: the higher, the longer a slot stays.
        gain: what rates gain at the last step; None: nothing.
    """

    ranking: Tensor
    gain: Tensor | None

    @classmethod
    def of(cls, held: PromptSlots, config: D2OConfig, seen: Tensor, *, finalize: bool) -> Order:
        """As the score rule says; seen: [B] int64 tokens seen by each row."""
        everyone = held.statistics
        rates = ranking_rates(everyone, config, finalize=finalize)
        return cls(config.score.rank(everyone, rates, seen), rate_gain(everyone, rates, config))

    def map(self, change: Callable[[Tensor], Tensor]) -> Order:
        """Of other slots, or rows."""
        return Order(change(self.ranking), None if self.gain is None else change(self.gain))


def evict_ordered(
    held: PromptSlots,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    *,
    seen: Tensor,
    finalize: bool = True,
    nearest: Nearest = nearest_kept,
) -> tuple[Slots, D2OState]:
    """Evict each row down to its budget and merge what was evicted.

    Args:
        budget: of all ranks; state: `D2OState()` before the first eviction of the sequence.
        seen: [B] int64 tokens seen by each row.
        finalize: at the end of a prefill (rates are pooled for the selection) rather than while decoding.

    Returns:
        What is kept here, by ascending position, as many as the fullest row holds; and the new state.
    """
    order = Order.of(held, config, seen, finalize=finalize)
    kept, state, order = evict_by(held, order, budget, state, config, finalize=finalize, nearest=nearest)
    return with_gain(kept, held, order), state


def with_gain(kept: Slots, held: PromptSlots, order: Order) -> Slots:
    """After the last step: what is kept here, by the order of what all ranks keep."""
    if order.gain is None:
        return kept
    return add_rates(kept, held.own(order.gain)[..., : kept.positions.shape[-1]])


def evict_by(
    held: PromptSlots,
    order: Order,
    budget: LayerBudget,
    state: D2OState,
    config: D2OConfig,
    *,
    finalize: bool = True,
    nearest: Nearest = nearest_kept,
) -> tuple[Slots, D2OState, Order]:
    """One step of `evict_ordered`, by an order that may be an earlier step's; also what is left of it."""
    everyone = held.statistics
    width = everyone.positions.shape[-1]
    order = order.map(lambda tensor: pad(tensor, (0, width - tensor.shape[-1])))  # unused slots come last
    choice = held.decide(choose(everyone, budget, order.ranking, config, finalize=finalize))
    selection = None if choice is None else selection_of(choice, everyone, budget)
    kept = held.keep(selection)
    if selection is not None:
        valid, heads = selection.evict_valid, selection.evict_idx.shape[1]
        stays = selection.keep_idx.shape[-1] > 0
        if not config.merge.merges or not stays:
            state = count_dropped(valid, heads, state)
            if config.merge.merges:
                held.nothing_stays()
        else:
            similarity, target = held.nearest(kept, selection, nearest)
            reports = head_reports(similarity, valid.expand_as(similarity), config.merge.gate)
            reports, similarity, target = held.reports(reports, similarity, target)
            merged, state = judge(similarity, valid, reports, state, config)
            kept = held.fold(kept, selection, similarity, target, merged, config.merge)
    left = order if selection is None else order.map(lambda tensor: tensor.gather(-1, selection.keep_idx))
    return kept, state, left


@dataclass
class Whole:
    """All slots of some heads, on this rank.

    Args:
        slots: [B, h, S, ...] in order, unused ones last.
        exchange: with the ranks that have other heads, or copies of these.
        merge: what folds evicted slots in.
    """

    slots: Slots
    exchange: ByHeads
    merge: Merge = merge_into

    @property
    def statistics(self) -> Slots:
        """As `PromptSlots.statistics`."""
        return self.slots

    def decide(self, choice: Tensor | None) -> Tensor | None:
        """As `PromptSlots.decide`. What copies of a slot rank by may differ by a last bit."""
        return None if choice is None else self.exchange.from_first_copy(choice)

    def keep(self, selection: Selection | None) -> Slots:
        """As `PromptSlots.keep`."""
        if selection is None:
            return self.slots.map(lambda tensor: tensor[:, :, : int(self.slots.kv_len.max())])
        return self.slots.take(selection.keep_idx, selection.keep_valid)

    def nearest(self, kept: Slots, selection: Selection, find: Nearest) -> tuple[Tensor, Tensor]:
        """As `PromptSlots.nearest`."""
        index, valid = selection.evict_idx, selection.evict_valid.expand_as(selection.evict_idx)
        found = [
            find(pick(self.slots.keys[:, h], index[:, h], valid[:, h]), kept.keys[:, h], selection.is_target[:, h])
            for h in self._heads_at_once(index)
        ]
        return found[0] if len(found) == 1 else tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def _heads_at_once(self, evicted: Tensor) -> list[slice]:
        """In how many parts the evicted slots [B, h, E] of a layer are copied out: a long prompt's are most of it."""
        step = heads_at_once(evicted.shape[0], evicted.shape[2], self.slots.keys.shape[-1])
        return [slice(first, first + step) for first in range(0, evicted.shape[1], step)]

    def reports(self, reports: Tensor, similarity: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `PromptSlots.reports`."""
        assert self.slots.positions.shape[-1] < MAX_FOUND or self.exchange.own_heads is None
        return self.exchange.reports(reports, similarity, target, None)[:3]

    def fold(
        self, kept: Slots, selection: Selection, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule
    ) -> Slots:
        """As `PromptSlots.fold`."""
        index, valid = selection.evict_idx, selection.evict_valid.expand_as(selection.evict_idx)
        slots, parts = self.slots.for_merge(keys=rule.averages_keys), []
        for h in self._heads_at_once(index):
            mine, old = (one.map(lambda tensor, h=h: tensor[:, h]) for one in (slots, kept))
            evicted = mine.take(index[:, h], valid[:, h])
            parts.append(self.merge(old, evicted, similarity[:, h], target[:, h], merged[:, h], rule))
        return parts[0] if len(parts) == 1 else Slots.of_heads(parts)

    def own(self, tensor: Tensor) -> Tensor:
        """As `PromptSlots.own`."""
        return tensor

    def nothing_stays(self) -> None:
        """As `PromptSlots.nothing_stays`."""
        if self.exchange.own_heads is not None and self.exchange.per_head:
            self.exchange.gather(self.slots.scores[:1, :1, :0])


def compress_layer(
    slots: Slots, budget: LayerBudget, state: D2OState, config: D2OConfig, *, finalize: bool = True
) -> tuple[Slots, D2OState]:
    """`evict_ordered` of all KV heads of a layer on one device.

    Args:
        slots: [B, Hkv, S, ...]; unused slots have position -1; rows may hold different numbers.
        budget: `num_heavy` and `num_recent`, ints or [B].
    """
    slots = slots.in_order()
    seen = slots.positions.amax((1, 2)) + 1
    return evict_ordered(Whole(slots, ByHeads.alone()), budget, state, config, seen=seen, finalize=finalize)
