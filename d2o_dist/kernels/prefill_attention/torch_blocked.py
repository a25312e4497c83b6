"""Any device, any dtype: blocks of queries over the keys that they can see, logits in acc dtype. Differentiable."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, capped, group_size

LOGIT_BYTES = 64 << 20  # one block of logits; a row of 16 queries is the least, so a very long T may take more
MIN_BLOCK, MAX_BLOCK = 16, 1024


def blocked_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, window: int | None, bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`. No T x T tensor: [B, Hq, block, keys seen by the block] at a time."""
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    return _attend(q, k, v, scale, q_start, window, bias, softcap)


def blocked_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`: blocks of queries over all keys."""
    return _attend(q, k, v, scale, None, None, bias, softcap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, q_start: int | None, window: int | None, bias: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """q_start None: every query sees all keys."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, acc = k.shape[1], acc_dtype(q.dtype)
    group = group_size(num_heads, num_kv_heads)
    if bias is not None:
        bias = bias.to(acc)
        dead = (bias == -torch.inf).unsqueeze(-1)
        k, v = k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    if q_start is None:
        k, v = k.to(acc), v.to(acc)  # once, for all blocks read all of them
    row_bytes = batch * num_heads * min(k.shape[2], window or k.shape[2]) * acc.itemsize
    block = min(max(LOGIT_BYTES // row_bytes, MIN_BLOCK), MAX_BLOCK)
    outs, lses = [], []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        end_key = k.shape[2] if q_start is None else q_start + stop
        first_key = 0 if window is None else max(0, q_start + start - window + 1)
        queries = q[:, :, start:stop].to(acc).mul(scale).reshape(batch, num_kv_heads, -1, head_dim)
        logits = capped(queries @ k[:, :, first_key:end_key].to(acc).mT, softcap)  # [B, Hkv, G * rows, keys]
        logits = logits.unflatten(2, (group, stop - start))
        if bias is not None:
            logits = logits + bias[:, :, None, None, first_key:end_key]
        if q_start is not None:
            ahead = torch.arange(first_key, end_key, device=q.device)[None, :]
            ahead = ahead - torch.arange(q_start + start, end_key, device=q.device)[:, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(-1)
        shift = lse if bias is None else lse.masked_fill(lse == -torch.inf, 0)
        probs = torch.exp(logits - shift.unsqueeze(-1)).flatten(2, 3)
        out = probs @ v[:, :, first_key:end_key].to(acc)
        outs.append(out.unflatten(2, (group, stop - start)).flatten(1, 2).to(q.dtype))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)
