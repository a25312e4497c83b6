"""The oracle: one row and head at a time."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype


def naive_finish_decode(
    outs: Tensor,
    lses: Tensor,
    logits: Tensor,
    dtype: torch.dtype,
    *,
    num_kv_heads: int,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
    rates: Tensor | None = None,
    peaks: bool = False,
    newest: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> Tensor:
    """As `finish_decode`."""
    parts, batch, num_heads, dim = outs.shape
    out = torch.zeros(batch, num_heads, dim, dtype=outs.dtype, device=outs.device)
    lse = torch.full((batch, num_heads), -torch.inf, dtype=lses.dtype, device=outs.device)
    for b in range(batch):
        for h in range(num_heads):
            known = [part for part in range(parts) if lses[part, b, h] > -torch.inf]
            seen = [lses[part, b, h] for part in known] + ([] if sinks is None else [sinks[0, h].to(lses.dtype)])
            if not seen:
                continue
            lse[b, h] = torch.stack(seen).logsumexp(0)
            for part in known:
                out[b, h] += torch.exp(lses[part, b, h] - lse[b, h]) * outs[part, b, h]
            if present is not None and not present[b]:
                out[b, h] = 0
    if scores is not None or rates is not None:
        options = dict(newest=newest, rate_window=rate_window, present=present)
        before = None if scores is None else scores.clone()
        _update(logits, lse, scores, rates, **options)
        if peaks and scores is not None:
            scores.copy_(torch.maximum(before, scores - before))
    return out.to(dtype)


def _update(
    logits: Tensor,
    lse: Tensor,
    scores: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    newest: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> None:
    """What `finish_decode` does to scores and rates [B, Hkv, S], from logits [B, Hq, S] and the lse [B, Hq]."""
    num_kv_heads = (scores if scores is not None else rates).shape[1]
    group = logits.shape[1] // num_kv_heads
    for b in range(logits.shape[0]):
        if present is not None and not present[b]:
            continue
        for g in range(num_kv_heads):
            probs = torch.zeros(logits.shape[2], dtype=acc_dtype(logits.dtype), device=logits.device)
            for h in range(g * group, (g + 1) * group):
                if lse[b, h] > -torch.inf:
                    probs += torch.exp(logits[b, h] - lse[b, h])
            if scores is not None:
                scores[b, g] += probs
            if rates is not None:
                aged = (1 - 1 / rate_window) * rates[b, g] + probs / rate_window
                slot = newest.expand(-1, num_kv_heads)[b, g]
                if 0 <= slot < aged.shape[0]:
                    aged[slot] = probs[slot]
                rates[b, g] = aged
