"""The oracle: the dense matrix of probabilities, one query head at a time, summed over queries."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, capped


def naive_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    k_start: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
    num_last: int | None = None,
    query_stride: int = 1,
    stride_start: int | None = None,
) -> Tensor:
    """As `column_sums`: q [B, Hq, Tq, D], k [B, Hkv, Tk, D], lse [B, Hq, Tq] -> [B, Hq, Tk]."""
    acc, group = acc_dtype(q.dtype), q.shape[1] // k.shape[1]
    query = torch.arange(q.shape[2], device=q.device)[:, None] + q_start
    key = torch.arange(k.shape[2], device=q.device)[None, :] + k_start
    seen = key <= query if causal else torch.ones_like(key <= query)
    if window is not None:
        seen = seen & (key > query - window)
    if num_last is not None:
        seen = seen & (query >= q_start + q.shape[2] - num_last)
    count = query if stride_start is None else query - q_start + stride_start
    seen = seen & ((count + 1) % query_stride == 0)
    sums = torch.zeros(*q.shape[:2], k.shape[2], dtype=acc, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = capped(q[b, h].to(acc) @ k[b, h // group].to(acc).T * scale, softcap)
            live = seen & torch.isfinite(lse[b, h])[:, None]
            if bias is not None:
                logits = logits + bias[b, h // group].to(acc)
                live = live & (bias[b, h // group] > -torch.inf)
            probs = torch.exp(logits - lse[b, h].to(acc)[:, None])
            sums[b, h] = torch.where(live, probs, torch.zeros_like(probs)).sum(0)
    return sums
