"""The end of a decode step with torch ops only, any device: scores and rates in place, no loop over rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E
from d2o_dist.kernels.lse import merge_partials, with_sinks


@torch.no_grad()
def torch_slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """exp(logits - lse) [B, Hq, S] summed over each group: [B, Hkv, S]. exp2, which is fast where it underflows."""
    shift = lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)
    return ((logits - shift) * LOG2_E).exp2_().unflatten(1, (num_kv_heads, -1)).sum(2)


@torch.no_grad()
def torch_finish_decode(
    outs: Tensor,
    lses: Tensor,
    logits: Tensor,
    dtype: torch.dtype,
    *,
    num_kv_heads: int,
    sinks: Tensor | None,
    scores: Tensor | None,
    rates: Tensor | None,
    peaks: bool,
    newest: Tensor | None,
    rate_window: int,
    present: Tensor | None,
    total: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """As `finish_decode`."""
    out, lse = with_sinks(*merge_partials(outs.unbind(0), lses.unbind(0)), sinks)
    if scores is not None or rates is not None:
        probs = torch_slot_probabilities(logits, lse, num_kv_heads)
        options = dict(newest=newest, rate_window=rate_window, present=present, peaks=peaks)
        add_probabilities(probs if total is None else total(probs), scores, rates, **options)
    out = out.to(dtype)
    return out if present is None else out * present[:, None, None]


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
    """What `finish_decode` does to scores and rates, from the slots' probabilities [B, Hkv, S], which it may overwrite.

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
