"""The budgets of a cache: what they derive from, and how layers get them.

Shape legend: B rows, L compressed layers, Hq query heads of the model, h KV heads at hand, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.cache.layer import Layer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.select import ranking_rates
from d2o_dist.evict.budgets import highest_of_heads, row_log_weights, row_slots
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.statistics import COLUMN_SUMS
from d2o_dist.slots.windows import Window


@dataclass
class RowBudgets:
    """What one row's budgets derive from: set at its first finalize, read again at later ones.

    Attributes:
        num_short: slots that layers lack, for they had been evicted to fewer before all shares were known.
    """

    log_weights: list[float]
    dispersions: list[float]
    num_tokens: int
    slots: list[int] = field(default_factory=list)
    num_short: int = 0

    def copy(self) -> RowBudgets:
        """One whose slots may change."""
        return dataclasses.replace(self, slots=list(self.slots))


def on_full_layers(config: D2OConfig, windows: list[Window | None]) -> D2OConfig:
    """The configuration with `protected_layers` counted among the compressed layers only.

    Layer indices in a configuration are the model's; layers with windows need no protection and take no part in
    the budget.
    """
    full = [index for index, window in enumerate(windows) if window is None]
    protected = config.budget.protected(len(windows))
    return config.replace(budget={"protected_layers": tuple(n for n, index in enumerate(full) if index in protected)})


def on_units(config: D2OConfig, per_layer: int) -> D2OConfig:
    """The configuration with `protected_layers` counted among the `per_layer` budgets of each layer."""
    if per_layer == 1:
        return config
    layers = config.budget.protected_layers
    units = tuple(n * per_layer + unit for n in layers for unit in range(per_layer))
    return config.replace(budget={"protected_layers": units})


def check_gathered(config: D2OConfig, prefill: D2OConfig, *, reread_chunk: int | None) -> None:
    """Whether a prefill under the configuration `prefill` gathered what `config` needs.

    Args:
        reread_chunk: in forwards of how many tokens the prompt was read a second time; None: it was not.

    Raises:
        ValueError: it did not; which of the two differs in what.
    """
    for name in ("needs_column_sums", "needs_rates"):
        if getattr(config, name) and not getattr(prefill, name):
            raise ValueError(f"the new configuration {name.replace('_', ' ')}, and the prefill did not gather them")
    if config.needs_reread and reread_chunk is None:
        raise ValueError("the new configuration needs a second reading of the prompt, and there was none")
    if config.needs_reread and config.score.chunk != reread_chunk:
        raise ValueError(f"score.chunk ({config.score.chunk}) must be the {reread_chunk} of the second reading")
    if config.needs_column_sums and config.query_sample != prefill.query_sample:
        raise ValueError(
            f"the new configuration takes column sums from {_queries(config)}, and the prefill took them from "
            f"{_queries(prefill)}"
        )
    if config.needs_rates and config.statistics.rate_window > prefill.statistics.rate_window:
        raise ValueError(
            f"statistics.rate_window ({config.statistics.rate_window}) must be at most the "
            f"{prefill.statistics.rate_window} of the prefill"
        )


def _queries(config: D2OConfig) -> str:
    """Which queries column sums are taken from, in words."""
    sample = config.query_sample
    return "all queries" if sample is None else f"one query in {sample.stride} (all within {sample.near} tokens)"


def measures_layers(config: D2OConfig) -> bool:
    """Whether budgets depend on the variance of attention in all layers."""
    return COLUMN_SUMS in config.budget.statistics and not config.keeps_everything


def head_variances(sums: Sequence[Tensor], layer: Layer, num_seen: Sequence[int], ranks: RequestRanks) -> Tensor:
    """[B, L, Hq] variance of the column sums of all query heads of the model: one exchange for all layers.

    Args:
        sums: L tensors [B, h, P], of `HeadBlock.deviations` at the end of the first prefill.
        layer: one of those that are compressed; num_seen: tokens seen by each row.
    """
    powers = max(one.shape[-1] for one in sums)
    # Layers without sinks have the mean.
    whole = torch.stack([pad(one, (0, powers - one.shape[-1])) for one in sums], -1)
    squares, *shifts = layer.blocks[0].layout.add_up(whole).unbind(2)
    seen = torch.tensor(num_seen, device=squares.device)[:, None, None]
    for shift in shifts:
        squares = (squares - shift.square() / seen.clamp_min(1)).clamp_min(0)
    return ranks.gather_query_heads(squares / (seen - 1).clamp_min(1)).transpose(1, 2).contiguous()


def head_counts(
    layers: Collection[Layer], config: D2OConfig, num_seen: Sequence[int], num_kv_heads: int, ranks: RequestRanks
) -> Tensor | None:
    """[B, L, Hkv] int64, how many of the model's highest ranked tokens each KV head has.

    None where no budget depends on them.

    Args:
        layers: those that are compressed, their first prefill finished.
        num_kv_heads: of a layer of the whole model; num_seen: as for `head_variances`.
    """
    if not config.budget.by_ranking or config.keeps_everything or not layers:
        return None
    rankings, live = [], []
    for layer in layers:
        # Over sequence ranks the statistics are gathered: a rank may be a maximum over neighbours on another rank.
        slots = layer.blocks[0].layout.everyone()
        seen = torch.tensor(num_seen, device=slots.positions.device)
        rates = ranking_rates(slots, config, finalize=True)
        rankings.append(config.score.rank(slots, rates, seen))
        live.append(slots.live)
    spread = next(iter(layers)).blocks[0].layout.is_spread
    return highest_of_heads(rankings, live, num_seen, num_kv_heads, config, ranks, spread=spread)


def plan_budgets(
    plans: list[RowBudgets] | None,
    variances: Tensor | None,
    highest: Tensor | None,
    config: D2OConfig,
    shape: tuple[int, int],
    num_seen: Sequence[int],
    ranks: RequestRanks,
    device: torch.device,
) -> list[RowBudgets]:
    """The plan of each row: slots of every layer, or of each of its heads where these have budgets of their own. Heads
    of other ranks too: the first rank's numbers are sent to all.

    Args:
        plans: of an earlier prompt, whose weights stay; None at the first.
        variances, highest: of `head_variances` and `head_counts`, at the first prompt.
        config: with `protected_layers` counted among the layers that are compressed.
        shape: compressed layers, at least one, and budgets of each.
        num_seen: tokens seen by each row.
    """
    config, count = on_units(config, shape[1]), shape[0] * shape[1]
    if plans is None:
        plans = []
        for row, num_tokens in enumerate(num_seen):
            log_weights, dispersions = row_log_weights(
                None if variances is None else variances[row].reshape(count, -1), config, count,
                None if highest is None else highest[row].reshape(count, -1).sum(-1).tolist(),
            )  # fmt: skip
            plans.append(RowBudgets(log_weights, dispersions, num_tokens))
    for plan, num_tokens in zip(plans, num_seen, strict=True):
        plan.slots = row_slots(plan.log_weights, num_tokens, plan.slots or None, config)
        plan.num_tokens = num_tokens
    if ranks.is_shared:
        _take_first(plans, ranks, device)
    return plans


def assign_budgets(
    layers: Collection[Layer], first: int, plans: Sequence[RowBudgets], config: D2OConfig
) -> None:
    """Give layers, or each of their heads, the slots of each row.

    Args:
        layers: compressed ones that follow each other; first: which of all the first of them is.
        config: as for `plan_budgets`.
    """
    for number, layer in enumerate(layers, first):
        per_layer = len(layer.budgeted)
        protected = config.budget.protected(len(plans[0].slots) // per_layer)
        for unit, one in enumerate(layer.budgeted, number * per_layer):
            one.slot_budgets = None if number in protected else [plan.slots[unit] for plan in plans]


def _take_first(plans: Sequence[RowBudgets], ranks: RequestRanks, device: torch.device) -> None:
    """Let the plans be those of the request's first rank: logarithms and powers may round otherwise on another."""
    mine = [[*plan.slots, *plan.log_weights, *plan.dispersions] for plan in plans]
    sent = ranks.from_first(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
    for plan, numbers in zip(plans, sent, strict=True):
        count = len(plan.slots)
        plan.slots = [int(number) for number in numbers[:count]]
        plan.log_weights, plan.dispersions = numbers[count : 2 * count], numbers[2 * count :]
