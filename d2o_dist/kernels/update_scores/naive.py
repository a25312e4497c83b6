"""The oracle: one row and KV head at a time."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype


def naive_update_scores(
    logits: Tensor,
    lse: Tensor,
    scores: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    newest: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> None:
    """As `update_scores`, in place."""
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
