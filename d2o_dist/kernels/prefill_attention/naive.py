"""The oracle: one dense softmax, computed in the accumulation dtype."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, capped


def naive_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    window: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`: q [B, Hq, Tq, D], k, v [B, Hkv, Tk, D] -> (out in q.dtype, lse [B, Hq, Tq])."""
    acc, group = acc_dtype(q.dtype), q.shape[1] // k.shape[1]
    keys, values = (x.to(acc).repeat_interleave(group, dim=1) for x in (k, v))
    logits = capped(q.to(acc) @ keys.mT * scale, softcap)
    query = torch.arange(q.shape[2], device=q.device)[:, None] + q_start
    key = torch.arange(k.shape[2], device=q.device)[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    if bias is not None:
        dead = (bias == -torch.inf).repeat_interleave(group, dim=1)
        logits = (logits + bias.to(acc).repeat_interleave(group, dim=1)[:, :, None]).masked_fill(
            dead[:, :, None], -torch.inf
        )
        values = values.masked_fill(dead.unsqueeze(-1), 0)
    logits = logits.masked_fill(hidden, -torch.inf)
    probs = logits.softmax(-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0)
    return (probs @ values).to(q.dtype), logits.logsumexp(-1)
