"""The oracle: one query head at a time, over the valid slots only."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, capped


def naive_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`: q [B, Hq, D], k, v [B, Hkv, S, D] -> (out [B, Hq, D], lse [B, Hq], probs [B, Hkv, S])."""
    acc, group = acc_dtype(q.dtype), q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[3], dtype=acc, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=acc, device=q.device)
    probs = torch.zeros(k.shape[:3], dtype=acc, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // group
            live = torch.ones(k.shape[2], dtype=torch.bool, device=q.device)
            if valid is not None:
                live = valid[b] if valid.dim() == 2 else valid[b, g]
            slots = live.nonzero().squeeze(1)
            if len(slots) == 0:
                continue
            logits = capped(k[b, g, slots].to(acc) @ q[b, h].to(acc) * scale, softcap)
            if log_mass is not None:
                logits = logits + log_mass[b, g, slots].to(acc)
            lse[b, h] = logits.logsumexp(0)
            weights = torch.exp(logits - lse[b, h])
            out[b, h] = weights @ v[b, g, slots].to(acc)
            probs[b, g, slots] += weights
    return out.to(q.dtype), lse, probs


def naive_decode_with_logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_with_logits`: -> (out [B, Hq, D], lse [B, Hq], logits [B, Hq, S])."""
    acc, group = acc_dtype(q.dtype), q.shape[1] // k.shape[1]
    logits = torch.full((*q.shape[:2], k.shape[2]), -torch.inf, dtype=acc, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // group
            row = capped(k[b, g].to(acc) @ q[b, h].to(acc) * scale, softcap)
            if log_mass is not None:
                row = row + log_mass[b, g].to(acc)
            if valid is not None:
                row = row.masked_fill(~(valid[b] if valid.dim() == 2 else valid[b, g]), -torch.inf)
            logits[b, h] = row
    out, lse, _ = naive_decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap)
    return out, lse, logits
