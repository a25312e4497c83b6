"""Attention of a chunk of prompt over what is held and over itself, and the statistics it leaves behind.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n queries of the chunk, S slots (the chunk's own are the
last n), D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.attention.sampled import sampled_column_sums
from d2o_dist.core.softmax import Softmax
from d2o_dist.core.statistics import group_sum
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.lse import merge_partials, with_sinks
from d2o_dist.kernels.prefill_attention import cross_attention, prefill_attention
from d2o_dist.kernels.scored_prefill import scored_prefill_attention
from d2o_dist.policy.statistics import QuerySample


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax: Softmax,
    *,
    with_sums: bool,
    sample: QuerySample | None = None,
    num_old: int = 0,
    log_mass: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk over all slots before it and causally over itself.

    Args:
        with_sums: whether the column sums are wanted.
        sample: which queries they are taken from; None: all. Then what `rest_sums` gives is still missing.
        num_old: slots from before the prefill that the chunk is part of; tokens of the prefill follow them in order.
        log_mass: [B, Hkv, S] bias of each slot, or None; only old slots have one.
        causal: False: its tokens attend to each other both ways, to all of the chunk.

    Returns:
        output [B, Hq, n, D], lse [B, Hq, n], column sums [B, Hq, S] or None.
    """
    past = k.shape[2] - q.shape[2]
    if causal and log_mass is None and with_sums and sample is None and softmax.sinks is None:
        return scored_prefill_attention(q, k, v, **softmax.logits, q_start=past)
    if causal:
        out, lse = prefill_attention(q, k, v, **softmax.logits, q_start=past, bias=log_mass)
    else:
        out, lse = cross_attention(q, k, v, **softmax.logits, bias=log_mass)
    out, lse = with_sinks(out, lse, softmax.sinks)
    if not with_sums:
        return out, lse, None
    if sample is None:
        return out, lse, column_sums(q, k, lse, **softmax.logits, q_start=past, bias=log_mass, causal=causal)
    start = past - num_old
    sums = sampled_column_sums(
        q, k, lse, softmax, sample, start=start, num_old=num_old, tokens=torch.arange(start), with_own=True,
        bias=log_mass, causal=causal,
    )  # fmt: skip
    return out, lse, sums


def reread_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """A chunk that is not kept: every query over all slots, and causally over the chunk itself.

    Args:
        q: [B, Hq, n, D]; k, v: [B, Hkv, n, D] of the chunk; keys, values: [B, Hkv, S, D] of the slots.

    Returns:
        output [B, Hq, n, D] in the dtype of q, lse [B, Hq, n].
    """
    before = cross_attention(q, keys, values, **softmax.logits)
    itself = prefill_attention(q, k, v, **softmax.logits)
    out, lse = with_sinks(*merge_partials(*zip(before, itself, strict=True)), softmax.sinks)
    return out.to(q.dtype), lse


def prompt_rates(q: Tensor, lse: Tensor, k: Tensor, softmax: Softmax, *, log_mass: Tensor | None = None) -> Tensor:
    """Mean attention each slot got from the last queries of the prompt, summed over the group.

    Args:
        q: [B, Hq, w, D] the last w queries, at the last w slots; lse: [B, Hq, w]; k: [B, Hkv, S, D].

    Returns:
        [B, Hkv, S].
    """
    window = q.shape[2]
    sums = column_sums(q, k, lse, **softmax.logits, q_start=k.shape[2] - window, bias=log_mass)
    return group_sum(sums, k.shape[1]) / window
