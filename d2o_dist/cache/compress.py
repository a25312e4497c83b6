"""The end of a prompt: statistics are completed, budgets set, and every layer is evicted to its own.

All layers at once, or each layer as soon as its attention over the whole prompt is done. Then, where budgets depend on
the attention of all layers, a layer is evicted to what it may need at most, and trimmed as others are read. What it
ranks by does not change, so that what stays in the end is what would have stayed at once, unless it had too few slots
(`RowBudgets.num_short`). Every step merges: all but the last into slots that are expected to go with the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2o_dist.cache.evictions import Evictions
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.moving import Move
from d2o_dist.cache.plans import (
    RowBudgets,
    assign_budgets,
    head_counts,
    head_variances,
    measures_layers,
    plan_budgets,
)
from d2o_dist.comm.request import RequestRanks
from d2o_dist.policy.config import D2OConfig

# Until the shares of all layers are known a layer may hold so much more than an equal share. Once so many of the layers
# are read, these are trimmed to so much more than the share that they would have among themselves.
HEADROOM = 1.5
TRIM_AFTER, TRIM_TO = 2 / 3, 1.2
# What all layers then hold at once, over what they keep in the end.
HELD_AT_MOST = TRIM_AFTER * TRIM_TO + (1 - TRIM_AFTER) * HEADROOM


def _before_trim(config: D2OConfig, factor: float) -> D2OConfig:
    """The rules of an eviction to `factor` times what is expected to stay: slots are merged into what is not."""
    targets = config.merge.targets.before_trim((1 - 1 / factor) * (1 - config.recent_fraction))
    if targets == config.merge.targets:
        return config
    return config.replace(merge=dataclasses.replace(config.merge, targets=targets))


class Compression:
    """Of the prompt that was read, or of a later turn.

    Args:
        layers: those that are compressed, by their index in the model; at least one.
        plans: of an earlier prompt, whose weights stay; None at the first.
        counted: `config` with `protected_layers` counted among `layers`.
        num_seen: tokens seen by each row, this prompt's included; num_kv_heads: of a layer of the whole model.

    Attributes:
        move: into the arena, which layers have made as soon as they were compressed; None: they have not.
    """

    def __init__(
        self,
        layers: Mapping[int, Layer],
        plans: list[RowBudgets] | None,
        config: D2OConfig,
        counted: D2OConfig,
        num_seen: Sequence[int],
        num_kv_heads: int,
        ranks: RequestRanks,
    ) -> None:
        self._layers, self._plans, self._ranks = dict(layers), plans, ranks
        self._config, self._counted = config, counted
        self._num_seen, self._num_kv_heads = list(num_seen), num_kv_heads
        self._is_first = plans is None
        self._deviations: list[Tensor] = []
        self._num_done = 0
        self.move: Move | None = None

    def at_once(self) -> list[RowBudgets]:
        """Compress all layers; the plan of each row's budgets."""
        layers = self._layers.values()
        for layer in layers:
            layer.complete_statistics()
        for layer in layers:
            self._close(layer)
        highest = None
        if self._is_first:
            highest = head_counts(layers, self._counted, self._num_seen, self._num_kv_heads, self._ranks)
            for layer in layers:
                self._part(layer)
        self._plans = self._plan(self._plans, highest)
        self._assign_and_evict()
        return self._plans

    # ---- layer by layer --------------------------------------------------------------------------------------------

    def of_layer(self, index: int) -> None:
        """Compress a layer that has read the whole prompt, as far as its budget is known. Layers come in order."""
        layer, is_known = self._layers[index], not self._is_first or self._config.knows_budgets
        assert not (self._is_first and self._config.budget.by_ranking)
        layer.complete_statistics()
        self._close(layer)
        self._part(layer)
        if self._num_done == 0:
            self._plans = self._plan(self._plans) if is_known else self._plan(None, factor=HEADROOM, count=0)
            self.move = self._begin_move(layer) if is_known else None
        assign_budgets([layer], self._num_done, self._plans, self._counted)
        self._evict({index: layer}, None if is_known else HEADROOM)
        if self.move is not None:
            for block in layer.blocks:
                if block.slot_budgets is not None:
                    self.move.enter(block)
        self._num_done += 1
        if not is_known and self._num_done == math.ceil(TRIM_AFTER * len(self._layers)) < len(self._layers):
            self._trim()

    def end(self) -> list[RowBudgets]:
        """After the last layer: the plan of each row's budgets, to which every layer is evicted."""
        assert self._num_done == len(self._layers)
        if self._is_first and not self._config.knows_budgets:
            held, self._plans = self._plans, self._plan(None)
            for plan, most in zip(self._plans, held, strict=True):
                both = zip(plan.slots, most.slots, strict=True)
                plan.num_short = sum(max(0, min(slots, plan.num_tokens) - had) for slots, had in both)
            self._assign_and_evict()
        return self._plans

    def _trim(self) -> None:
        """Evict the layers that are done to what they may still need, as far as these tell."""
        done = list(self._layers)[: self._num_done]
        for plan, wanted in zip(self._plans, self._plan(None, factor=TRIM_TO), strict=True):
            units = len(plan.slots) // len(self._layers) * len(done)
            less = map(min, plan.slots[:units], wanted.slots[:units])
            plan.slots = [*less, *plan.slots[units:]]
        layers = {index: self._layers[index] for index in done}
        assign_budgets(layers.values(), 0, self._plans, self._counted)
        self._evict(layers, TRIM_TO)

    def _begin_move(self, layer: Layer) -> Move | None:
        """Where budgets are known and slots will not be spread: the whole arena, before layers have anything to put in.
        Else what they hold by then lies in memory twice."""
        if self._config.eviction_interval is None or self._ranks.deals_tokens:
            return None
        units = len(layer.budgeted)
        here = [unit for unit, one in enumerate(layer.budgeted) if one in layer.blocks]
        evicted = set(range(len(self._layers))) - self._counted.budget.protected(len(self._layers))
        budgets = [[plan.slots[n * units + unit] for plan in self._plans] for n in sorted(evicted) for unit in here]
        heads = [block.store.shape[0] for block in layer.blocks] * len(evicted)
        return Move(budgets, heads, self._config, layer.blocks[0].store, self._ranks) if budgets else None

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _close(self, layer: Layer) -> None:
        """Free what only the reading needs."""
        if self._is_first and measures_layers(self._config):
            self._deviations.append(layer.blocks[0].deviations())
        layer.finish_prefill()

    def _part(self, layer: Layer) -> None:
        """At the first prompt: let heads that have budgets of their own be blocks of their own."""
        if self._is_first and self._config.budget.per_head:
            here = self._ranks.kv_heads(layer.shape[0], spread=layer.blocks[0].layout.is_spread)
            layer.part_heads(here, self._num_kv_heads)

    def _plan(
        self, plans: list[RowBudgets] | None, highest: Tensor | None = None, *, factor: float = 1.0,
        count: int | None = None,
    ) -> list[RowBudgets]:  # fmt: skip
        """The plan of each row, of `factor` times what is to be kept.

        Where budgets depend on the variance of attention: those of the first `count` layers, by default of all that
        were measured, and for the others the mean of these.
        """
        if not self._layers:
            return []
        layer, total, variances = next(iter(self._layers.values())), len(self._layers), None
        device = layer.blocks[0].store.buffers.positions.device
        units = self._num_kv_heads if self._config.budget.per_head else 1
        if plans is None and measures_layers(self._config):
            measured = self._deviations[:count]
            if measured:
                variances = head_variances(measured, layer, self._num_seen, self._ranks)
                # Of one layer to the last bit: rules that standardise would make much of the difference.
                mean = variances if len(measured) == 1 else variances.log().mean(1, keepdim=True).exp()
                variances = torch.cat([variances, mean.expand(-1, total - len(measured), -1)], 1)
            else:
                variances = torch.ones(len(self._num_seen), total, units, device=device)
        config = self._counted if factor == 1 else self._counted.replace(**self._counted.size.times(factor))
        return plan_budgets(plans, variances, highest, config, (total, units), self._num_seen, self._ranks, device)

    def _assign_and_evict(self) -> None:
        assign_budgets(self._layers.values(), 0, self._plans, self._counted)
        self._evict(self._layers)

    def _evict(self, layers: Mapping[int, Layer], factor: float | None = None) -> None:
        """To their budgets; factor: how many times what they are expected to keep in the end, None: these are it."""
        config = self._config if factor is None else _before_trim(self._config, factor)
        Evictions(layers, config, self._ranks, self._num_seen).at_prompt_end(is_last=factor is None)
