"""Prefill over sequence shards, keys and values travelling around a ring.

First trip: every rank attends from its own queries to the block that is with it, and merges the part by its lse, while
the block is on its way to the next rank. Column sums need the final lse, so the keys travel a second time, with the
sums that they have collected, and come home. A block is the slots of one rank (see `shard`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.attention.sampled import sampled_column_sums
from d2o_dist.attention.shard import ShardView
from d2o_dist.comm.collectives import Collectives
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.lse import merge_partials, with_sinks
from d2o_dist.kernels.prefill_attention import cross_attention, prefill_attention
from d2o_dist.policy.statistics import QuerySample
from d2o_dist.slots.slots import stats_dtype


def ring_attention(
    sp: Collectives, q: Tensor, view: ShardView, softmax: Softmax, *, with_sums: bool, sample: QuerySample | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output and lse of this rank's queries, column sums of this rank's slots over the queries of all ranks.

    Args:
        q: [b, Hq, n, D], the queries of `view.segments`; n may be 0. Every rank of sp must call.
        sample: which queries the column sums are taken from; None: all.

    Returns:
        [b, Hq, n, D] in the dtype of q, [b, Hq, n] and [b, Hq, W] (or None) in the statistics' dtype.
    """
    biases = None if view.bias is None else sp.all_gather(view.bias.unsqueeze(0), 0)
    queries = view.queries(q)
    merged: list[tuple[Tensor, Tensor] | None] = [None] * len(queries)
    vectors = view.vectors
    for step in range(sp.size):
        source = (sp.rank - step) % sp.size
        pending = sp.ring_shift(vectors) if step + 1 < sp.size else None
        keys, values = view.keys_values(vectors)
        for number, (start, stop, part) in enumerate(queries):
            bias = None if biases is None else biases[source]
            seen = _visible(view, source, start, stop)
            if seen:
                result = _attend(part, keys[:, :, :seen], values[:, :, :seen], bias, softmax, source == sp.rank)
                # Merged as it comes: what is held does not grow with the number of ranks.
                before = merged[number]
                merged[number] = result if before is None else merge_partials(*zip(before, result, strict=True))
        if pending is not None:
            vectors = pending.wait()
    merged = [with_sinks(*one, softmax.sinks) for one in merged]
    dtype = stats_dtype(q.dtype)
    out = torch.cat([out for out, _ in merged], 2).to(q.dtype) if merged else q.new_empty(*q.shape[:3], values.shape[3])
    lse = torch.cat([lse for _, lse in merged], 2) if merged else q.new_empty(q.shape[:3], dtype=dtype)
    if not with_sums:
        return out, lse, None
    sums = q.new_zeros(*q.shape[:2], view.width, dtype=dtype)
    return out, lse, _second_trip(sp, queries, [lse for _, lse in merged], view, biases, sums, softmax, sample)


def _visible(view: ShardView, source: int, start: int, stop: int) -> int:
    """Slots of a rank's block that queries [start, stop) may see: its past and its tokens before them.

    Segments of different ranks never overlap, so a block's tokens lie before all of the queries or after all of them;
    of the own block the queries' own tokens are the last that are seen.
    """
    end = stop if source == view.rank else start
    tokens = int((view.tokens[source] < end).sum())
    return view.past + tokens


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax: Softmax, is_own: bool
) -> tuple[Tensor, Tensor]:
    """One part: output in the statistics' dtype, and lse."""
    if bias is not None:
        bias = _widened(bias, k.shape[2])
    if is_own:
        out, lse = prefill_attention(q, k, v, **softmax.logits, q_start=k.shape[2] - q.shape[2], bias=bias)
    else:
        out, lse = cross_attention(q, k, v, **softmax.logits, bias=bias)
    return out.to(lse.dtype), lse


def _widened(bias: Tensor, width: int) -> Tensor:
    """[b, Hkv, C] with zeros up to `width`: tokens of this prefill have no bias."""
    return torch.cat([bias, bias.new_zeros(*bias.shape[:2], width - bias.shape[2])], 2)


def _second_trip(
    sp: Collectives,
    queries: list[tuple[int, int, Tensor]],
    lses: list[Tensor],
    view: ShardView,
    biases: Tensor | None,
    sums: Tensor,
    softmax: Softmax,
    sample: QuerySample | None,
) -> Tensor:
    """[b, Hq, W]: the sums of this rank's slots, 0 at first, after they have been with every rank."""
    keys = view.keys
    for step in range(sp.size):
        source = (sp.rank - step) % sp.size
        pending = sp.ring_shift([keys]) if step + 1 < sp.size else None
        bias = None if biases is None else biases[source]
        for (start, stop, part), lse in zip(queries, lses, strict=True):
            seen = _visible(view, source, start, stop)
            if not seen:
                continue
            is_own = source == sp.rank
            if sample is None:
                wide = None if bias is None else _widened(bias, seen)
                sums[:, :, :seen] += column_sums(
                    part, keys[:, :, :seen], lse, **softmax.logits,
                    q_start=seen - part.shape[2], bias=wide, causal=is_own,
                )  # fmt: skip
                continue
            tokens = view.tokens[source]
            sums[:, :, :seen] += sampled_column_sums(
                part, keys[:, :, :seen], lse, softmax, sample,
                start=start, num_old=view.past, tokens=tokens[tokens < start], with_own=is_own, bias=bias,
            )  # fmt: skip
        sums = sp.ring_shift([sums]).wait()[0]
        if pending is not None:
            keys = pending.wait()[0]
    return sums
