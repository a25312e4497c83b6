"""Scores and rates with torch ops only, any device: in place, no Python loop."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E


@torch.no_grad()
def torch_slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """exp(logits - lse) [B, Hq, S] summed over each group: [B, Hkv, S]. exp2, which is fast where it underflows."""
    shift = lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)
    return ((logits - shift) * LOG2_E).exp2_().unflatten(1, (num_kv_heads, -1)).sum(2)


@torch.no_grad()
def torch_update_scores(
    logits: Tensor,
    lse: Tensor,
    num_kv_heads: int,
    *,
    scores: Tensor | None,
    rates: Tensor | None,
    newest: Tensor | None,
    rate_window: int,
    present: Tensor | None,
) -> None:
    """As `update_scores`."""
    probs = torch_slot_probabilities(logits, lse, num_kv_heads)
    add_probabilities(probs, scores, rates, newest=newest, rate_window=rate_window, present=present)


@torch.no_grad()
def add_probabilities(
    probs: Tensor,
    scores: Tensor | None,
    rates: Tensor | None,
    *,
    newest: Tensor | None,
    rate_window: int,
    present: Tensor | None,
    peaks: bool = False,
) -> None:
    """As `update_scores`, from the slots' probabilities [B, Hkv, S] themselves, which it may overwrite.

    Args:
        peaks: scores become the larger of themselves and the probabilities, instead of their sum.
    """
    if present is not None:
        probs *= present[:, None, None]
    if scores is not None and peaks:
        torch.maximum(scores, probs, out=scores)
    elif scores is not None:
        scores.add_(probs)
    if rates is not None:
        slots = torch.arange(rates.shape[-1], device=rates.device)
        aged = torch.lerp(rates, probs, 1 / rate_window)
        fresh = torch.where(slots == newest[..., None], probs, aged)
        rates.copy_(fresh if present is None else torch.where(present[:, None, None], fresh, rates))
