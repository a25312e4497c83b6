"""Output, lse and column sums in one pass, on a CPU: two matmuls and one exponential a logit.

A block of queries is multiplied with all the keys it sees at once, so its softmax is final before anything is summed:
the same probabilities give the column sums (weighted by 1 / row sum) and the output. The two-pass way must first know
the lse, and pays a third matmul. What is held is one block: rows x Tk logits a thread, within the last-level cache.

Two passes over the block are saved by an extra column of the matmul. A softmax subtracts the row's maximum, which costs
one pass to find and one to subtract; any bound will do that is not too far above it, and |q| max |k| is one that is
known beforehand: it rides along as q' = [q, -bound], k' = [k, 1]. Where it was too far above (the row sum shows it)
the block is done again with the maximum. The row sum is a pass of its own: as a column of ones beside v it would leave
the second matmul with one column more than its tiles are wide, which costs more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.kernels.common import LN_2, LOG2_E, acc_dtype, bits_of, group_size, zero_hidden_

# Logits of one block of one thread: 16 MiB in float32.
_BLOCK_LOGITS = 1 << 22
# Below this many rows a matmul is slower than what a smaller block saves. Above, what is computed beyond the diagonal
# costs more than longer matmuls save; those of small head dims gain nothing.
_MIN_ROWS, _MAX_ROWS, _MAX_ROWS_SMALL_DIM, _SMALL_DIM = 128, 512, 256, 64
# A row sum above this has lost nothing: what underflowed was below 2^-60 of it.
_SMALLEST_TOTAL = 2.0**-60


def block_queries(group: int, num_keys: int, head_dim: int) -> int:
    """Queries of one block: G * queries rows of Tk logits for each KV head worked on, one a thread."""
    most = _MAX_ROWS_SMALL_DIM if head_dim <= _SMALL_DIM else _MAX_ROWS
    rows = min(max(_BLOCK_LOGITS // num_keys, _MIN_ROWS), most)
    return max(1, rows // group)


@torch.no_grad()
def cpu_scored_prefill(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, softcap: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `scored_prefill_attention`; Tq >= 1."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    group, dtype = group_size(num_heads, num_kv_heads), acc_dtype(q.dtype)
    # The layout that a model's output projection reads without a copy.
    out = q.new_empty(batch, num_queries, num_heads, v.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, num_heads, num_queries, dtype=dtype)
    sums = torch.zeros(batch, num_heads, num_keys, dtype=dtype)
    # One KV head a thread: a batched matmul over heads runs without a barrier inside.
    heads = min(num_kv_heads, torch.get_num_threads())
    step = min(block_queries(group, num_keys, dim), num_queries)
    scratch = torch.empty(heads * group * step * num_keys, dtype=dtype)
    later = torch.ones(step, step, dtype=torch.bool).triu(1)
    bits = bits_of(~later, dtype)
    for row in range(batch):
        for first in range(0, num_kv_heads, heads):
            kv = slice(first, min(first + heads, num_kv_heads))
            of_kv = slice(kv.start * group, kv.stop * group)
            # In units of log2: the exponential below is exp2, much faster than exp where it underflows.
            keys = _with_column(k[row, kv].to(dtype), 1)
            keys[..., :dim] *= scale * LOG2_E
            values = v[row, kv].to(dtype)
            longest = keys[..., :dim].norm(dim=-1).amax(-1)[:, None]
            for start in range(0, num_queries, step):
                stop = min(start + step, num_queries)
                count, seen = stop - start, q_start + stop
                part = slice(start, stop)
                shape = (kv.stop - kv.start, group, count)
                queries = q[row, of_kv, part].to(dtype).reshape(shape[0], group * count, dim)
                bound = queries.norm(dim=-1) * longest
                queries = _with_column(queries, 0)
                queries[..., dim] = -bound
                logits = scratch[: shape[0] * group * count * seen].view(shape[0], group * count, seen)
                torch.bmm(queries, keys[:, :seen].mT, out=logits)
                probs = logits.exp2_()
                zero_hidden_(probs.view(*shape, seen)[..., seen - count :], bits[:count, :count])
                total = probs.sum(-1)
                if not bool(total.amin() > _SMALLEST_TOTAL):
                    torch.bmm(queries, keys[:, :seen].mT, out=logits)
                    logits.view(*shape, seen)[..., seen - count :].masked_fill_(later[:count, :count], -torch.inf)
                    peak = logits.amax(-1, keepdim=True)
                    bound = bound + peak.squeeze(-1)
                    probs = logits.sub_(peak).exp2_()
                    total = probs.sum(-1)
                result = torch.bmm(probs, values[:, :seen])
                weight = total.reciprocal()
                sums[row, of_kv, :seen] += torch.bmm(
                    weight.view(-1, 1, count), probs.view(-1, count, seen)
                ).squeeze(1)
                result *= weight.unsqueeze(-1)
                out[row, of_kv, part] = result.view(-1, count, v.shape[3]).to(q.dtype)
                lse[row, of_kv, part] = ((bound + total.log2()) * LN_2).view(-1, count)
    return out, lse, sums


def _with_column(x: Tensor, value: float) -> Tensor:
    """A copy of [..., D] with one more column: [..., D + 1]."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1), value)
    wide[..., :-1] = x
    return wide
