"""Budgets of a whole model: a barrier after the last layer of the first prefill, since layers share one total."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.ranked import count_highest, deal_level
from d2o_dist.policy.budget import num_ranked
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.layer_slots import layer_slots
from d2o_dist.slots.slots import LayerBudget

NOT_FINITE_BECAUSE = (
    "weights of the model are not finite, or numbers became too large for its dtype (those of float16 end at 65504)"
)


class NotFiniteError(ValueError):
    """A prompt whose attention is no number. Raised by all ranks of its request alike."""


def row_log_weights(
    variances: Tensor | None, config: D2OConfig, num_layers: int, num_highest: Sequence[int] | None = None
) -> tuple[list[float], list[float]]:
    """`(log_weights, dispersions)` of one row, each of `num_layers` floats; no dispersions unless they are used.

    Args:
        variances: [L, Hq] variance of the column sums of every query head of the model; None if not computed.
        num_highest: L numbers of tokens that are among the highest ranked; only where shares are by ranking.

    Raises:
        NotFiniteError: a variance that is no number: the model's attention was none.
    """
    if config.keeps_everything:
        return [0.0] * num_layers, []
    if variances is None:
        return config.budget.log_weights(num_layers, num_highest), []
    variances = variances.cpu()
    wrong = [index for index, heads in enumerate(variances) if not bool(heads.isfinite().all())]
    if wrong:
        raise NotFiniteError(
            f"the prompt's attention is not finite in {len(wrong)} of {num_layers} layers, the first of them "
            f"{wrong[0]}: {NOT_FINITE_BECAUSE}"
        )
    dispersions = config.budget.dispersions(variances).double().tolist()
    return config.budget.log_weights(num_layers, dispersions), dispersions


def highest_of_heads(
    rankings: Sequence[Tensor],
    live: Sequence[Tensor],
    num_tokens: Sequence[int],
    num_kv_heads: int,
    config: D2OConfig,
    ranks: RequestRanks,
    *,
    spread: bool,
) -> Tensor:
    """[B, L, H] int64, the same on all ranks: how many of the model's highest ranked tokens each KV head has.

    Args:
        rankings: L tensors [B, h, S], what all slots of the heads at hand are ranked by; live: [B, h, S] bool, which of
            them count.
        num_tokens: of each row; num_kv_heads: H, of a layer of the whole model.
        spread: whether every sequence rank has all heads of its tensor rank at hand, rather than some of them.
    """
    num_highest = [num_ranked(count, len(rankings) * num_kv_heads, config.size) for count in num_tokens]
    wanted = torch.tensor(num_highest, device=rankings[0].device)

    def over_ranks(counts: Tensor) -> Tensor:
        # Of the copies of a KV head, which may differ by a last bit, the first counts.
        mine = counts if ranks.is_first_copy else torch.zeros_like(counts)
        return ranks.tp.all_reduce(mine if spread else ranks.sp.all_reduce(mine))

    both = torch.cat(count_highest(rankings, live, wanted, over_ranks), -1)
    both = both if spread else ranks.join_heads(both)
    above, level = ranks.gather_kv_heads(both).chunk(2, -1)
    return deal_level(above, level, wanted)


def row_slots(
    log_weights: Sequence[float], num_tokens: int, previous: Sequence[int] | None, config: D2OConfig
) -> list[int]:
    """Slots `S_l` of each layer for one row; absolute budgets stay as they were set first."""
    if previous is not None and config.keep_tokens is not None:
        return list(previous)
    return layer_slots(log_weights, num_tokens, config.budget, config.size)


def rows_due(slot_budgets: Sequence[int], kv_len: Sequence[int], slack: int) -> tuple[list[bool], list[int]]:
    """Which rows hold `slack` slots or more over their budget, and what each holds once those are evicted."""
    due = [held >= slots + slack for held, slots in zip(kv_len, slot_budgets, strict=True)]
    return due, [slots if now else held for now, slots, held in zip(due, slot_budgets, kv_len, strict=True)]


def eviction_budget(
    slot_budgets: Sequence[int], kv_len: Sequence[int], config: D2OConfig, device: torch.device
) -> tuple[LayerBudget, list[int]] | None:
    """The budget of the rows that hold more than theirs when a prompt ends, and what each row holds after the eviction;
    None when none does. Other rows keep all they have."""
    due, after = rows_due(slot_budgets, kv_len, 1)
    if not any(due):
        return None
    sizes = (max(after), max(held - left for held, left in zip(kv_len, after, strict=True)))
    if all(due) and min(after) == max(after):
        return LayerBudget(*config.split(after[0]), *sizes), after
    splits = [config.split(slots) if now else (slots, 0) for now, slots in zip(due, after, strict=True)]
    heavy, recent = zip(*splits, strict=True)
    return LayerBudget(_counts(heavy, device), _counts(recent, device), *sizes), after


@lru_cache(maxsize=1024)
def _counts(values: tuple[int, ...], device: torch.device) -> Tensor:
    """[B] int64, to be read only. Evictions of one batch ask for the same again and again, and a copy would wait."""
    return torch.tensor(values, device=device)
