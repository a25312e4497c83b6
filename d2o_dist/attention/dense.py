"""Attention whose softmax `sdpa` does not have, by a matrix of all pairs: with gradients, where there is no cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.common import acc_dtype, capped


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softmax: Softmax, dropout_p: float = 0.0
) -> Tensor:
    """q [B, Hq, n, D]; k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, Hq, n, Dv] in the dtype of q.

    Args:
        mask: what is added to the logits, or bool, False where a key is hidden: [n, S] or [B, 1, n, S]; None: nothing.
    """
    dtype, group = acc_dtype(query.dtype), query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    logits = capped(query.to(dtype) @ key.to(dtype).mT * softmax.scale, softmax.softcap)
    if mask is not None:
        # Not -inf: rows of padding may see no key at all.
        hidden = torch.finfo(dtype).min
        logits = logits.masked_fill(~mask, hidden) if mask.dtype == torch.bool else logits + mask
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(dtype)[..., None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return dropout(weights, dropout_p) @ value
