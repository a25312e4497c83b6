"""The oracle: the oracles of its two parts, one after the other."""

import torch
from torch import Tensor

from d2o_dist.kernels.decode_attention.naive import naive_decode_with_logits
from d2o_dist.kernels.update_scores.naive import naive_update_scores


def naive_scored_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor,
    newest: Tensor,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
    peaks: bool = False,
    rates: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> Tensor:
    """As `scored_decode`."""
    out, lse, logits = naive_decode_with_logits(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap)
    if sinks is not None:
        out = (out.to(lse.dtype) * torch.sigmoid(lse - sinks)[..., None]).to(q.dtype)
        lse = torch.log(lse.exp() + sinks.to(lse.dtype).exp())
    if scores is not None or rates is not None:
        before = None if scores is None else scores.clone()
        naive_update_scores(logits, lse, scores, rates, newest=newest, rate_window=rate_window, present=present)
        if peaks and scores is not None:
            scores.copy_(torch.maximum(before, scores - before))
    return out if present is None else torch.where(present[:, None, None], out, 0)
