"""Attention of a chunk of prompt over what is held and over itself, and the statistics it leaves behind.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n queries of the chunk, S slots (the chunk's own are the
last n), D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.core.statistics import group_sum
from d2o_dist.core.types import stats_dtype
from d2o_dist.kernels.column_peaks import column_peaks
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.lse import merge_partials
from d2o_dist.kernels.prefill_attention import cross_attention, prefill_attention
from d2o_dist.kernels.scored_prefill import scored_prefill_attention

# Queries that attend biased slots at once: their logits are held in float32.
_BIASED_BLOCK = 256


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over every slot, with a bias per slot: output [B, Hq, n, D] and lse [B, Hq, n].

    Args:
        q: [B, Hq, n, D]; k, v: [B, Hkv, S, D]; bias: [B, Hkv, S], added to the logits.
    """
    dtype = stats_dtype(q.dtype)
    batch, num_heads, length, dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.view(batch, num_kv_heads, num_heads // num_kv_heads, length, dim)
    keys, values = k.to(dtype).transpose(-1, -2).unsqueeze(2), v.to(dtype).unsqueeze(2)
    out, lse = [], []
    for block in grouped.split(_BIASED_BLOCK, dim=3):
        logits = block.to(dtype) @ keys * scale + bias[:, :, None, None]
        part = logits.logsumexp(-1)
        out.append((logits - part.unsqueeze(-1)).exp_() @ values)
        lse.append(part)
    return torch.cat(out, 3).view(q.shape).to(q.dtype), torch.cat(lse, 3).view(batch, num_heads, length)


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, with_sums: bool, log_mass: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk over all slots before it and causally over itself.

    Args:
        with_sums: whether the column sums are wanted.
        log_mass: [B, Hkv, S] bias of each slot, or None; the chunk's own slots have none.

    Returns:
        output [B, Hq, n, D], lse [B, Hq, n], column sums [B, Hq, S] or None.
    """
    past = k.shape[2] - q.shape[2]
    if log_mass is None or past == 0:
        if with_sums:
            return scored_prefill_attention(q, k, v, scale, q_start=past)
        return *prefill_attention(q, k, v, scale, q_start=past), None
    before = biased_attention(q, k[:, :, :past], v[:, :, :past], log_mass[:, :, :past], scale)
    itself = prefill_attention(q, k[:, :, past:], v[:, :, past:], scale)
    out, lse = merge_partials([before[0], itself[0]], [before[1], itself[1]])
    sums = column_sums(q, k, lse, scale, q_start=past, bias=log_mass) if with_sums else None
    return out.to(q.dtype), lse, sums


def reread_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A chunk that is not kept: every query over all slots, and causally over the chunk itself.

    Args:
        q: [B, Hq, n, D]; k, v: [B, Hkv, n, D] of the chunk; keys, values: [B, Hkv, S, D] of the slots.

    Returns:
        output [B, Hq, n, D] in the dtype of q, and the column peaks of the slots [B, Hkv, S].
    """
    before, itself = cross_attention(q, keys, values, scale), prefill_attention(q, k, v, scale)
    out, lse = merge_partials([before[0], itself[0]], [before[1], itself[1]])
    return out.to(q.dtype), column_peaks(q, keys, lse, scale, causal=False)


def prompt_rates(q: Tensor, lse: Tensor, k: Tensor, scale: float, *, log_mass: Tensor | None = None) -> Tensor:
    """Mean attention each slot got from the last queries of the prompt, summed over the group.

    Args:
        q: [B, Hq, w, D] the last w queries, at the last w slots; lse: [B, Hq, w]; k: [B, Hkv, S, D].

    Returns:
        [B, Hkv, S].
    """
    window = q.shape[2]
    sums = column_sums(q, k, lse, scale, q_start=k.shape[2] - window, bias=log_mass)
    return group_sum(sums, k.shape[1]) / window


def shard_rates(
    q: Tensor, lse: Tensor, k: Tensor, scale: float, *, bias: Tensor, num_before: int, ahead: Tensor
) -> Tensor:
    """As `prompt_rates`, for the slots of one sequence rank: [B, Hkv, S].

    Args:
        q: [B, Hq, w, D] the last w queries of the prompt, from all ranks; lse: [B, Hq, w].
        k: [B, Hkv, S, D] of this rank. The first `num_before` lie before all of the queries.
        bias: [B, Hkv, num_before], added to their logits, -inf on an unused slot.
        ahead: [w, S - num_before] bool: whether a query lies before one of the other slots.
    """
    num_kv_heads = k.shape[1]
    group = q.shape[1] // num_kv_heads
    sums = q.new_zeros(*q.shape[:2], k.shape[2], dtype=lse.dtype)
    if num_before:
        sums[:, :, :num_before] = column_sums(q, k[:, :, :num_before], lse, scale, bias=bias, causal=False)
    # At most w slots: a dense matrix.
    newest = k[:, :, num_before:].to(lse.dtype).repeat_interleave(group, 1)
    probs = (q.to(lse.dtype) @ newest.mT * scale - lse.unsqueeze(-1)).exp()
    sums[:, :, num_before:] = probs.masked_fill(ahead, 0).sum(2)
    return group_sum(sums, num_kv_heads) / q.shape[2]
