"""Column sums from a part of the queries: far keys by one query in `stride`, near keys by all.

Token i of a running prefill (counted from 0 where the prefill began) is sampled if i + 1 is a multiple of the stride;
it stands for itself and the `stride - 1` tokens before it. The tokens after the last sampled one stand for themselves,
which is known only when the prefill ends (`rest_sums`). A pair is near if both are tokens of this prefill, and the key
is less than `near` before the query, or after it (in a run of tokens that attend to each other both ways). Near pairs
are summed exactly: they carry much of the attention, and each key has few of them. All of it depends on tokens alone,
so chunks, padding and ranks change nothing.

Shape legend: B rows, Hq query heads, Hkv KV heads, n queries, S slots, T tokens of a prompt, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.common import capped
from d2o_dist.policy.statistics import QuerySample


def sampled_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    softmax: Softmax,
    sample: QuerySample,
    *,
    start: int,
    num_old: int,
    tokens: Tensor,
    with_own: bool,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """What these queries bring to the column sums of these slots, but for `rest_sums`: [B, Hq, S].

    Args:
        q: [B, Hq, n, D], tokens start, start + 1, ... of the prefill; lse: [B, Hq, n], over all slots everywhere.
        k: [B, Hkv, S, D]: `num_old` slots from before the prefill, then `tokens` (int64 on the host, ascending, all
            below `start`), then, if `with_own`, the n tokens of the queries.
        bias: [B, Hkv, >= num_old], added to the logits of the old slots; others have none.
        causal: whether the queries see of their own tokens those up to themselves; else all.
    """
    stride, near = sample.stride, sample.near
    close = int((tokens > start - near).sum())  # tokens before the queries that are near one of them
    before = num_old + len(tokens)
    far = before - close
    assert k.shape[2] == before + with_own * q.shape[2]
    sums = torch.zeros(*q.shape[:2], k.shape[2], dtype=lse.dtype, device=q.device)
    strided = {"query_stride": stride, "stride_start": start}
    if far:
        if bias is not None:
            bias = torch.cat([bias[:, :, :num_old], bias.new_zeros(*bias.shape[:2], far - num_old)], 2)
        sums[:, :, :far] = column_sums(q, k[:, :, :far], lse, **softmax.logits, causal=False, bias=bias, **strided)
        sums[:, :, :far] *= stride
    if close:
        keys, distance = k[:, :, far:before], start + torch.arange(q.shape[2])[:, None] - tokens[-close:]
        first = slice((-1 - start) % stride, None, stride)
        sampled = pair_sums(q[:, :, first], keys, lse[:, :, first], softmax, distance[first] < near)
        first = slice(near - 1)  # later queries are near none of them
        exact = pair_sums(q[:, :, first], keys, lse[:, :, first], softmax, distance[first] >= near)
        sums[:, :, far:before] = sampled * stride + exact
    if with_own:
        own = k[:, :, before:]
        sums[:, :, before:] = column_sums(q, own, lse, **softmax.logits, q_start=-near, **strided)
        sums[:, :, before:] *= stride
        if not causal:
            sums[:, :, before:] += column_sums(q, own, lse, **softmax.logits, causal=False)
            sums[:, :, before:] -= column_sums(q, own, lse, **softmax.logits, q_start=-near)
        elif near:
            sums[:, :, before:] += column_sums(q, own, lse, **softmax.logits, window=near)
    return sums


def rest_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    softmax: Softmax,
    sample: QuerySample,
    *,
    query_tokens: Tensor,
    key_tokens: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """What the queries after the last sampled one bring to far keys, when the prefill has ended: [B, Hq, S].

    Args:
        q: [B, Hq, n, D], n < stride; lse: [B, Hq, n].
        k: [B, Hkv, S, D]: slots from before the prefill, then tokens of it.
        query_tokens: [n], which tokens the queries are; key_tokens: ascending, the last slots. Both may be counted from
            anywhere.
        bias: [B, Hkv, S], added to the logits of the old slots and 0 for others; -inf on an unused slot.
    """
    close = int((key_tokens > query_tokens[0] - sample.near).sum())
    near = query_tokens[:, None] - key_tokens[len(key_tokens) - close :] < sample.near
    return last_query_sums(q, k, lse, softmax, bias=bias, num_before=k.shape[2] - close, hidden=near)


def last_query_sums(
    q: Tensor, k: Tensor, lse: Tensor, softmax: Softmax, *, bias: Tensor | None, num_before: int, hidden: Tensor
) -> Tensor:
    """Column sums of a few queries at the end of a prompt: [B, Hq, S].

    Args:
        q: [B, Hq, n, D]; lse: [B, Hq, n]; k: [B, Hkv, S, D]. All queries see the first `num_before` slots.
        bias: [B, Hkv, >= num_before], added to the logits of those; -inf on an unused slot.
        hidden: [n, S - num_before] bool: which of the other slots a query does not count for. They are few.
    """
    sums = torch.zeros(*q.shape[:2], k.shape[2], dtype=lse.dtype, device=q.device)
    if num_before:
        bias = None if bias is None else bias[:, :, :num_before]
        sums[:, :, :num_before] = column_sums(q, k[:, :, :num_before], lse, **softmax.logits, bias=bias, causal=False)
    sums[:, :, num_before:] = pair_sums(q, k[:, :, num_before:], lse, softmax, hidden)
    return sums


def pair_sums(q: Tensor, k: Tensor, lse: Tensor, softmax: Softmax, hidden: Tensor) -> Tensor:
    """Column sums over the pairs that are not `hidden` [n, S], by a dense matrix: [B, Hq, S]."""
    keys = k.to(lse.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    probs = (capped(q.to(lse.dtype) @ keys.mT * softmax.scale, softmax.softcap) - lse.unsqueeze(-1)).exp()
    return probs.masked_fill(hidden.to(q.device), 0).sum(2)


def naive_prompt_column_sums(q: Tensor, k: Tensor, lse: Tensor, softmax: Softmax, sample: QuerySample) -> Tensor:
    """The oracle of `prompt_column_sums`: the dense matrix of probabilities, times how often each pair counts."""
    length, device = q.shape[2], q.device
    query = torch.arange(length, device=device)
    distance = query[:, None] - query
    rest = query >= length - length % sample.stride
    times = torch.where(rest, 1, ((query + 1) % sample.stride == 0) * sample.stride)[:, None]
    times = torch.where(distance < sample.near, 1, times).masked_fill(distance < 0, 0)
    logits = q.to(lse.dtype) @ k.to(lse.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).mT * softmax.scale
    probs = (capped(logits, softmax.softcap) - lse.unsqueeze(-1)).exp().masked_fill(distance < 0, 0)
    return (probs * times).sum(2)


def prompt_column_sums(q: Tensor, k: Tensor, lse: Tensor, softmax: Softmax, sample: QuerySample | None) -> Tensor:
    """Column sums of a whole prompt, exact (`sample` None) or estimated: q, k and lse of T tokens -> [B, Hq, T]."""
    if sample is None:
        return column_sums(q, k, lse, **softmax.logits)
    tokens = torch.arange(q.shape[2], device=q.device)
    sums = sampled_column_sums(q, k, lse, softmax, sample, start=0, num_old=0, tokens=tokens[:0].cpu(), with_own=True)
    last = slice(len(tokens) - len(tokens) % sample.stride, None)
    if last.start < len(tokens):
        sums += rest_sums(
            q[:, :, last], k, lse[:, :, last], softmax, sample, query_tokens=tokens[last], key_tokens=tokens
        )
    return sums
