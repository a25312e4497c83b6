"""Prefill statistics: column sums and their variance (paper section 3.2).

Shape legend: B rows, Hq query heads, Hkv key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.slots.slots import stats_dtype

# A token that no query of the window looked at still counts a little, so that ratios of rates are defined.
RATE_FLOOR = 1e-9


def naive_column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention each key receives, summed over causal queries: `c[h, j] = sum_i A[h, i, j]`. Dense: for tests.

    Args:
        q: [B, Hq, T, D]; k: [B, Hkv, T, D]; `scale` multiplies the logits.

    Returns:
        [B, Hq, T] float32 (float64 for float64 input); `sum_j c[h, j] = T`.
    """
    dtype = stats_dtype(q.dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill(~causal, -torch.inf).softmax(-1).sum(-2)


def group_sum(per_query_head: Tensor, num_kv_heads: int) -> Tensor:
    """[B, Hq, ...] summed over the query heads of each group: [B, Hkv, ...]."""
    batch, num_heads, *rest = per_query_head.shape
    return per_query_head.view(batch, num_kv_heads, num_heads // num_kv_heads, *rest).sum(2)


def column_sum_variance(column_sums: Tensor) -> Tensor:
    """Unbiased variance over tokens of each head's column sums: [..., Hq, T] -> [..., Hq]; 0 for a single token.

    The mean is exactly 1 by construction, so deviations are taken from 1: shards can add theirs up.
    """
    return squared_deviations(column_sums) / max(column_sums.shape[-1] - 1, 1)


def squared_deviations(column_sums: Tensor) -> Tensor:
    """Sum over tokens of the squared deviation from the mean of 1: [..., Hq, T] -> [..., Hq]; adds up over shards."""
    return (column_sums - 1).square().sum(-1)
