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
        pace = None if rates is None else pace_of(rates, newest, rate_window, present)
        probs = probs if total is None else total(probs)
        add_probabilities(probs, scores, rates, pace, present=present, peaks=peaks)
    out = out.to(dtype)
    return out if present is None else out * present[:, None, None]


def pace_of(rates: Tensor, newest: Tensor, rate_window: int, present: Tensor | None) -> Tensor:
    """How far rates [B, Hkv, S] go towards the probabilities of a step: [B, Hkv or 1, S] in their dtype.

    All the way at the newest slot [B, Hkv] or [B, 1], a `rate_window`-th of it at others; in rows that take no step
    (present: [B] bool; None: all take it), 0.
    """
    slots = torch.arange(rates.shape[-1], device=rates.device)
    pace = (slots == newest[..., None]).to(rates.dtype).clamp_min_(1 / rate_window)
    return pace if present is None else pace * present[:, None, None]


def add_probabilities(
    probs: Tensor, scores: Tensor | None, rates: Tensor | None, pace: Tensor | None, *, present: Tensor | None,
    peaks: bool = False,
) -> None:  # fmt: skip
    """What `finish_decode` does to scores and rates, from the slots' probabilities [B, Hkv, S], which it may overwrite.

    Args:
        pace: as `pace_of` makes it; read only where rates are kept.
        peaks: scores become the larger of themselves and the probabilities, instead of their sum.
    """
    if present is not None:
        probs *= present[:, None, None]
    if scores is not None and peaks:
        torch.maximum(scores, probs, out=scores)
    elif scores is not None:
        scores.add_(probs)
    if rates is not None:
        rates.lerp_(probs, pace)
