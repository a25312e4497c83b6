"""The oracle: the dense matrix of probabilities, one query head at a time, added up over a group, then the maximum."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, capped


def naive_column_peaks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """As `column_peaks`: q [B, Hq, Tq, D], k [B, Hkv, Tk, D], lse [B, Hq, Tq] -> [B, Hkv, Tk]."""
    acc, group = acc_dtype(q.dtype), q.shape[1] // k.shape[1]
    query = torch.arange(q.shape[2], device=q.device)[:, None] + q_start
    key = torch.arange(k.shape[2], device=q.device)[None, :]
    peaks = torch.zeros(k.shape[:3], dtype=acc, device=q.device)
    for b in range(q.shape[0]):
        for g in range(k.shape[1]):
            received = torch.zeros(q.shape[2], k.shape[2], dtype=acc, device=q.device)
            for h in range(g * group, (g + 1) * group):
                logits = capped(q[b, h].to(acc) @ k[b, g].to(acc).T * scale, softcap)
                live = torch.isfinite(lse[b, h])[:, None]
                if causal:
                    live = live & (key <= query)
                if bias is not None:
                    logits = logits + bias[b, g].to(acc)
                    live = live & (bias[b, g] > -torch.inf)
                probs = torch.exp(logits - lse[b, h].to(acc)[:, None])
                received += torch.where(live, probs, torch.zeros_like(probs))
            if q.shape[2]:
                peaks[b, g] = received.amax(0)
    return peaks
