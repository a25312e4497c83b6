"""Column sums by blocked matmuls: torch ops only, any device.

A block is one matmul, one exp2 in place and one sum over its queries. Three choices make it fast on a CPU:
- lse and bias ride in the matmul as extra columns, q' = [q * scale * log2(e), -lse * log2(e), 1], k' = [k, 1, bias *
  log2(e)], so the block comes out of the matmul ready for exp2: no pass over it to subtract or to add;
- exp2, not exp: 0.4 ns against 0.7 ns an element on 2 AVX2 cores, and exp (Intel's VML) takes 25 ns an element where
  the result underflows, which most of a peaked attention matrix does;
- the G query heads of a KV head are the rows of one matmul, so keys are converted once for all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, acc_dtype, bits_of, capped_product, group_size, zero_hidden_


@dataclass(frozen=True)
class Blocks:
    """Sizes of one block: KV heads, queries, keys, and the keys converted at a time (a multiple of `keys`)."""

    heads: int
    queries: int
    keys: int
    converted_keys: int


def plan_blocks(
    device: torch.device,
    num_kv_heads: int,
    group: int,
    num_queries: int,
    num_keys: int,
    step: int = 1,
    window: int | None = None,
) -> Blocks:
    """CPU: one KV head a thread, 256K logits (1 MiB in float32) each, within the caches: a batched matmul over heads
    runs without a barrier inside. Elsewhere 8M logits, for occupancy.
    """
    cpu = device.type == "cpu"
    threads = torch.get_num_threads() if cpu else 1
    budget, rows = (threads << 18, 512) if cpu else (1 << 23, 8192)
    # At most 512 queries: what a block computes above the diagonal is wasted, about queries * step / T of the work.
    queries = min(num_queries, max(32, 512 // step), max(1, rows // group))
    if window is not None:
        queries = min(queries, max(64, window // step))  # a block computes window + queries * step keys a query
    keys = min(num_keys, 512 if cpu else max(512, budget // (group * queries)))
    if window is not None:
        keys = min(keys, window + queries * step)
    # Short prompts and few queries (num_last): several heads at once, or the calls would cost more than the work.
    heads = min(num_kv_heads, max(1, budget // (group * queries * keys)))
    return Blocks(heads, queries, keys, keys * max(1, 4096 // keys))


@torch.no_grad()
def blocked_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int,
    k_start: int,
    q_step: int = 1,
    bias: Tensor | None,
    softcap: float | None = None,
    causal: bool,
    window: int | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `column_sums`: q [B, Hq, Tq, D], k [B, Hkv, Tk, D], lse [B, Hq, Tq], bias [B, Hkv, Tk] -> [B, Hq, Tk].

    Query i has index q_start + i * q_step.
    """
    group = group_size(q.shape[1], k.shape[1])
    sums = torch.zeros(*q.shape[:2], k.shape[2], dtype=acc_dtype(q.dtype), device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return sums
    blocks = blocks or plan_blocks(q.device, k.shape[1], group, q.shape[2], k.shape[2], q_step, window)
    scratch = _Scratch(blocks, group, q.shape[3] + (1 if bias is None else 2), sums)
    for row in range(q.shape[0]):
        for head in range(0, k.shape[1], blocks.heads):
            kv = slice(head, head + blocks.heads)
            _sum_heads(
                q[row].unflatten(0, (-1, group))[kv],
                k[row, kv],
                lse[row].unflatten(0, (-1, group))[kv],
                None if bias is None else bias[row, kv],
                sums[row].unflatten(0, (-1, group))[kv],
                scale,
                softcap,
                q_start - k_start,
                q_step,
                causal,
                window,
                blocks,
                scratch,
            )
    return sums


class _Scratch:
    """Buffers made once a call and cut to the shape of each block, so that no block allocates."""

    def __init__(self, blocks: Blocks, group: int, width: int, like: Tensor):
        rows = blocks.heads * group * blocks.queries
        self.width = width
        self.queries = like.new_empty(rows * width)
        self.keys = like.new_empty(blocks.heads * blocks.converted_keys * width)
        self.logits = like.new_empty(rows * blocks.keys)
        self.partial = like.new_empty(blocks.heads * group * blocks.keys)

    @staticmethod
    def cut(buffer: Tensor, *shape: int) -> Tensor:
        numel = 1
        for size in shape:
            numel *= size
        return buffer[:numel].view(shape)


def _sum_heads(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sums: Tensor,
    scale: float,
    softcap: float | None,
    shift: int,
    step: int,
    causal: bool,
    window: int | None,
    blocks: Blocks,
    scratch: _Scratch,
) -> None:
    """Adds to sums [n, G, Tk]; q [n, G, Tq, D], k [n, Tk, D], lse [n, G, Tq], bias [n, Tk].

    Query i sees key j <= i * step + shift.
    """
    heads, group, num_queries, head_dim = q.shape
    num_keys = k.shape[1]
    factor = scale * LOG2_E if softcap is None else scale / softcap
    for first in range(0, num_keys, blocks.converted_keys):
        end = min(first + blocks.converted_keys, num_keys)
        # Queries that see some key of [first, end).
        query_begin = max(0, -((shift - first) // step)) if causal else 0
        query_end = num_queries if window is None else min(num_queries, -((shift - end + 1 - window) // step))
        if query_begin >= query_end:
            continue
        keys = _extended_keys(k[:, first:end], None if bias is None else bias[:, first:end], scratch)
        for i0 in range(query_begin, query_end, blocks.queries):
            i1 = min(i0 + blocks.queries, query_end)
            queries = _extended_queries(q[:, :, i0:i1], lse[:, :, i0:i1], factor, scratch)
            low, high = i0 * step + shift, (i1 - 1) * step + shift  # what the first and the last query see
            key_begin = first if window is None else max(first, low - window + 1)
            key_end = min(end, high + 1) if causal else end
            for j0 in range(key_begin, key_end, blocks.keys):
                j1 = min(j0 + blocks.keys, key_end)
                logits = scratch.cut(scratch.logits, heads, group * (i1 - i0), j1 - j0)
                here = keys[:, j0 - first : j1 - first]
                if softcap is None:
                    torch.bmm(queries, here.mT, out=logits)
                else:
                    capped_product(queries, here, head_dim, softcap, out=logits)
                probs = logits.exp2_().view(heads, group, i1 - i0, j1 - j0)
                # Hidden pairs are zeroed after exp2, by assignment: their values (even inf or NaN) never matter.
                if causal and j1 - 1 > low:
                    _hide_later(probs, low - j0, step)
                if window is not None and j0 <= high - window:
                    _hide_earlier(probs, low - j0 - window, step)
                partial = scratch.cut(scratch.partial, heads, group, j1 - j0)
                sums[:, :, j0:j1] += torch.sum(probs, 2, out=partial)
    if bias is not None:
        sums.masked_fill_((bias == -torch.inf).unsqueeze(1), 0)  # exact, even against NaN queries


def _hide_later(probs: Tensor, last: int, step: int) -> None:
    """Zero what row i of [..., rows, cols] sees behind column last + i * step."""
    if step == 1:
        probs.tril_(last)
    else:
        zero_hidden_(probs, bits_of(_columns_ahead(probs, step) <= last, probs.dtype))


def _hide_earlier(probs: Tensor, last: int, step: int) -> None:
    """Zero what row i of [..., rows, cols] sees up to column last + i * step."""
    if step == 1:
        probs.triu_(last + 1)
    else:
        zero_hidden_(probs, bits_of(_columns_ahead(probs, step) > last, probs.dtype))


def _columns_ahead(probs: Tensor, step: int) -> Tensor:
    """column - row * step: [rows, cols]."""
    rows, cols = (torch.arange(size, device=probs.device) for size in probs.shape[-2:])
    return cols - step * rows.unsqueeze(1)


def _extended_keys(k: Tensor, bias: Tensor | None, scratch: _Scratch) -> Tensor:
    """[k, 1] or [k, 1, bias * log2(e)] in acc dtype: [n, keys, width]; keys whose bias is -inf are zeroed first."""
    keys = scratch.cut(scratch.keys, k.shape[0], k.shape[1], scratch.width)
    head_dim = k.shape[2]
    keys[..., :head_dim].copy_(k)
    keys[..., head_dim] = 1
    if bias is not None:
        keys[..., :head_dim].masked_fill_((bias == -torch.inf).unsqueeze(-1), 0)
        keys[..., head_dim + 1].copy_(bias).mul_(LOG2_E)
    return keys


def _extended_queries(q: Tensor, lse: Tensor, factor: float, scratch: _Scratch) -> Tensor:
    """[q * factor, -lse * log2(e)], then 1 if there is a bias: [n, G * queries, width]. Dead rows give exp2(-inf)."""
    heads, group, num_queries, head_dim = q.shape
    queries = scratch.cut(scratch.queries, heads, group, num_queries, scratch.width)
    dead = ~torch.isfinite(lse)
    queries[..., :head_dim].copy_(q).mul_(factor).masked_fill_(dead.unsqueeze(-1), 0)
    queries[..., head_dim].copy_(lse).mul_(-LOG2_E).masked_fill_(dead, -torch.inf)
    queries[..., head_dim + 1 :] = 1
    return queries.view(heads, group * num_queries, scratch.width)
