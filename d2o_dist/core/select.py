"""Which slots stay (paper section 3.3): sinks, the newest, and the best of the rest by score. Per KV head.

Shape legend: B rows, Hkv key/value heads, S slots in order of position, K kept, E evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import LayerBudget, Slots, compact

# What becomes of a slot. One byte each: ranks that hold copies of a head send it.
GONE, KEPT, TARGET = 0, 1, 2


@dataclass(frozen=True)
class Selection:
    """The outcome of one selection. Indices point into the slots, in order of position.

    Attributes:
        keep_idx: [B, Hkv, K] int64; keep_valid: [B, 1, K] bool (rows may keep fewer).
        evict_idx: [B, Hkv, E] int64; evict_valid: [B, 1, E] bool.
        is_target: [B, Hkv, K] bool: kept slots that evicted ones may be merged into.
    """

    keep_idx: Tensor
    keep_valid: Tensor
    evict_idx: Tensor
    evict_valid: Tensor
    is_target: Tensor


def ranking_rates(slots: Slots, config: D2OConfig, *, finalize: bool) -> Tensor:
    """The rates [B, Hkv, S] that slots rank by: at the end of a prefill those of their neighbours count too, if any."""
    return config.score.pooled_rates(slots, config.num_sink_tokens) if finalize else slots.rates


def rate_gain(slots: Slots, rates: Tensor, config: D2OConfig) -> Tensor | None:
    """What the rates [B, Hkv, S] gain where they ranked as `rates`, once evicted tokens are merged by them; None:
    nothing.

    Where the score rule says so, what stays keeps its pooled rate, and ranks by it while decoding.
    """
    return rates - slots.rates if config.score.keeps_pooled_rates and rates is not slots.rates else None


def add_rates(slots: Slots, gain: Tensor) -> Slots:
    """The slots with `gain` [B, Hkv, S] added to the rates of those in use."""
    return slots.replace(rates=torch.where(slots.positions >= 0, slots.rates + gain, slots.rates).clamp_min(0))


def choose(slots: Slots, budget: LayerBudget, ranking: Tensor, config: D2OConfig, *, finalize: bool) -> Tensor | None:
    """[B, Hkv, S] uint8, what becomes of each slot: `GONE`, `KEPT` or `TARGET`; None: every row is within its budget.

    Ties keep the lower position. A row within its budget keeps all it has.

    Args:
        slots: in order of position, unused slots last.
        ranking: [B, Hkv, S], from `ScoreRule.rank`.
        finalize: at the end of a prefill; while decoding the tail may be bounded.
    """
    num_heavy, num_recent, kv_len, surplus = _counts(slots, budget)
    if _most_evicted(surplus, budget) == 0:
        return None
    order = torch.arange(slots.positions.shape[-1], device=slots.positions.device)
    live = order < kv_len
    # A budget of fewer heavy slots than sinks keeps the first of them.
    sink = live & (slots.positions < config.num_sink_tokens) & (order < num_heavy)
    recent = live & (order >= kv_len - num_recent) & ~sink
    candidate = live & ~sink & ~recent
    quota = num_heavy - sink.sum(-1, keepdim=True)

    ranked = ranking.masked_fill(~candidate, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(-1, ranked, order.expand_as(ranked))
    chosen = candidate & (rank < quota)
    keep = live & (sink | recent | chosen)

    is_target = keep
    tail = config.merge.targets.tail_sizes(num_heavy + num_recent, finalize=finalize)
    if tail is not None:
        is_target = chosen & (rank >= quota - tail)
    elif config.merge.keeps_mass:
        is_target = keep & ~sink
    keep = keep | live & (surplus == 0)
    return keep.to(torch.uint8) + (keep & is_target).to(torch.uint8)


def selection_of(choice: Tensor, slots: Slots, budget: LayerBudget) -> Selection:
    """The selection that a choice [B, Hkv, S] of these slots means: integers alone, the same wherever it is asked."""
    _, _, kv_len, surplus = _counts(slots, budget)
    device, keep = choice.device, choice != GONE
    live = torch.arange(choice.shape[-1], device=device) < kv_len
    num_evicted = _most_evicted(surplus, budget)
    num_kept = int((kv_len - surplus).max()) if budget.most_kept is None else budget.most_kept
    keep_idx = compact(keep, num_kept)
    keep_valid = torch.arange(num_kept, device=device) < kv_len - surplus
    return Selection(
        keep_idx=keep_idx,
        keep_valid=keep_valid,
        evict_idx=compact(live & ~keep, num_evicted),
        evict_valid=torch.arange(num_evicted, device=device) < surplus,
        is_target=(choice == TARGET).gather(-1, keep_idx) & keep_valid,
    )


def _counts(slots: Slots, budget: LayerBudget) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each [B, 1, 1]: heavy and recent slots that stay, slots held, and how many of them are too many."""
    heavy, recent = (x[:, None, None] for x in budget.rows(slots.positions.shape[0], slots.positions.device))
    kv_len = slots.kv_len[:, None, None]
    return heavy, recent, kv_len, (kv_len - heavy - recent).clamp_min(0)


def _most_evicted(surplus: Tensor, budget: LayerBudget) -> int:
    return int(surplus.max()) if budget.most_evicted is None else budget.most_evicted
