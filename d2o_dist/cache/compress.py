"""The end of a prompt: statistics are completed, budgets set, and every layer is evicted to its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from d2o_dist.cache.evictions import Evictions
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.plans import RowBudgets, head_counts, head_variances, set_budgets
from d2o_dist.comm.request import RequestRanks
from d2o_dist.policy.config import D2OConfig


def compress(
    layers: Mapping[int, Layer],
    plans: list[RowBudgets] | None,
    config: D2OConfig,
    counted: D2OConfig,
    num_seen: Sequence[int],
    num_kv_heads: int,
    ranks: RequestRanks,
) -> list[RowBudgets]:
    """Compress all layers, which have read a prompt; the plan of each row's budgets.

    Args:
        layers: those that are compressed, by their index in the model.
        plans: of an earlier prompt, whose weights stay; None at the first.
        counted: the configuration with `protected_layers` counted among `layers`.
        num_seen: tokens seen by each row; num_kv_heads: of a layer of the whole model.
    """
    each, variances, highest = layers.values(), None, None
    for layer in each:
        layer.complete_statistics()
    if plans is None:
        variances = head_variances(each, counted, num_seen, ranks)
    for layer in each:
        layer.finish_prefill()
    if plans is None:
        highest = head_counts(each, counted, num_seen, num_kv_heads, ranks)
        if config.budget.per_head:
            for layer in each:
                here = ranks.kv_heads(layer.shape[0], spread=layer.blocks[0].layout.is_spread)
                layer.part_heads(here, num_kv_heads)
    plans = set_budgets(each, plans, variances, highest, counted, num_seen, ranks)
    Evictions(layers, config, ranks, num_seen).at_prompt_end()
    return plans
