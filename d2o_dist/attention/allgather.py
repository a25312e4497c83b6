"""Prefill over sequence shards, keys and values gathered head by head.

Each rank attends from its own queries to the gathered keys of one KV head at a time, so that no rank holds more than
one head of all tokens. Column sums are each rank's sums over its own queries, added up and cut by a reduce-scatter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.attention.prefill import chunk_attention
from d2o_dist.attention.shard import ShardView
from d2o_dist.comm.collectives import Collectives, Pending
from d2o_dist.core.softmax import Softmax
from d2o_dist.policy.statistics import QuerySample
from d2o_dist.slots.slots import stats_dtype


def allgather_attention(
    sp: Collectives, q: Tensor, view: ShardView, softmax: Softmax, *, with_sums: bool, sample: QuerySample | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output and lse of this rank's queries, column sums of this rank's slots over the queries of all ranks.

    Args:
        q: [b, Hq, n, D], the queries of `view.segments`; n may be 0. Every rank of sp must call.
        sample: which queries the column sums are taken from; None: all.

    Returns:
        [b, Hq, n, D] in the dtype of q, [b, Hq, n] and [b, Hq, W] (or None) in the statistics' dtype.
    """
    batch, num_heads, _, dim = q.shape
    num_kv_heads = view.keys.shape[1]
    group = num_heads // num_kv_heads
    dtype = stats_dtype(q.dtype)
    out, lse = q.new_empty(*q.shape[:3], view.values.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)
    sums = q.new_zeros(batch, num_heads, len(view.order), dtype=dtype) if with_sums else None
    bias = None if view.bias is None else sp.all_gather(view.bias, 2)
    before = view.world * view.past

    def ask(head: int) -> Pending:
        return sp.all_gather_async(torch.cat([one[:, head : head + 1] for one in view.vectors], -1), 2)

    pending = ask(0)
    for head in range(num_kv_heads):
        gathered = pending.wait()
        if head + 1 < num_kv_heads:
            pending = ask(head + 1)  # travels while this head is worked on
        keys, values = view.keys_values(gathered.index_select(2, view.order).tensor_split([dim], -1))
        of_head, at = slice(head * group, (head + 1) * group), 0
        own = softmax.of_heads(lambda heads, of_head=of_head: heads[:, of_head])
        for start, stop, part in view.queries(q[:, of_head]):
            seen, here = before + stop, slice(at, at + stop - start)
            log_mass = None
            if bias is not None:
                log_mass = torch.cat([bias[:, head : head + 1], bias.new_zeros(batch, 1, stop)], 2)
            result = chunk_attention(
                part, keys[:, :, :seen], values[:, :, :seen], own,
                with_sums=with_sums, sample=sample, num_old=before, log_mass=log_mass,
            )  # fmt: skip
            out[:, of_head, here], lse[:, of_head, here] = result[0], result[1]
            if sums is not None:
                sums[:, of_head, :seen] += result[2]
            at += stop - start
    return out, lse, None if sums is None else _to_owners(sp, sums, view)


def _to_owners(sp: Collectives, sums: Tensor, view: ShardView) -> Tensor:
    """[b, Hq, world x C + T] of this rank's queries -> [b, Hq, W] of all queries, at the rank that holds the slot."""
    padded = torch.cat([sums, sums.new_zeros(*sums.shape[:2], 1)], -1)
    return sp.reduce_scatter(padded.index_select(-1, view.home), -1, in_rank_order=True)
