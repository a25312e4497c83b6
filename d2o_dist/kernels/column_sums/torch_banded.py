"""Column sums of a narrow band, where each query sees few keys before it: torch ops only, without a loop over blocks.

Queries go in blocks of a window (at least 16), each with the keys of its own block and of the one before it. All
blocks of a head are one batch of small matmuls, so that two pairs are computed for each that counts. By large blocks
(`torch_blocked.py`) it is five, and calls cost as much as the work: 17 ms where this takes 7 (4096 queries, 9/3 heads
of 64, a window of 16, one AVX2 thread).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.kernels.common import LOG2_E, acc_dtype, bits_of, group_size, zero_hidden_

# Windows that are narrow: what lies in memory for a chunk of queries grows with them.
BAND = 64
# Numbers of the queries of one chunk, or of its logits, 2 MiB in float32. Buffers that come and go stay below what the
# system's allocator maps anew each time: with four times as many it takes two to three times as long.
_CHUNK = 1 << 19


@torch.no_grad()
def banded_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int,
    k_start: int,
    q_step: int = 1,
    bias: None = None,
    softcap: None = None,
    causal: bool,
    window: int,
) -> Tensor:
    """As `column_sums`, of a window of at most `BAND`: q [B, Hq, Tq, D], k [B, Hkv, Tk, D] -> [B, Hq, Tk]."""
    assert q_step == 1 and causal and window <= BAND and bias is None and softcap is None
    num_kv, num_keys, group = k.shape[1], k.shape[2], group_size(q.shape[1], k.shape[1])
    sums = torch.zeros(*q.shape[:2], num_keys, dtype=acc_dtype(q.dtype), device=q.device)
    block = max(16, window)
    chunk = max(1, _CHUNK // (q.shape[1] * max(q.shape[3], 2 * block) * block)) * block
    # Column c of a block is the key `block - c` before the one that its first query stands at.
    row, column = torch.arange(block, device=q.device)[:, None], torch.arange(2 * block, device=q.device)
    seen = ((column - block <= row) & (column - block > row - window)).repeat(group, 1)
    bits = bits_of(seen, sums.dtype)
    for index in range(q.shape[0]):
        for begin in range(0, q.shape[2], chunk):
            queries, their_lse = q[index, :, begin : begin + chunk], lse[index, :, begin : begin + chunk]
            spare = -queries.shape[1] % block
            if spare:
                queries, their_lse = pad(queries, (0, 0, 0, spare)), pad(their_lse, (0, spare), value=torch.inf)
            low = q_start + begin - k_start - block
            high = low + block + queries.shape[1]
            here = slice(max(low, 0), min(high, num_keys))
            if here.start >= here.stop:
                continue
            outside = (here.start - low, high - here.stop)
            keys = pad(k[index, :, here].to(sums.dtype), (0, 0, *outside)).unflatten(1, (-1, block))
            queries = queries.unflatten(0, (num_kv, group)).unflatten(2, (-1, block)).transpose(1, 2)
            their_lse = their_lse.unflatten(0, (num_kv, group)).unflatten(2, (-1, block)).transpose(1, 2)
            found = _sum_blocks(queries, keys, their_lse, scale, bits)
            sums[index].unflatten(0, (num_kv, group))[..., here] += found[..., outside[0] : high - low - outside[1]]
    return sums


def _sum_blocks(q: Tensor, k: Tensor, lse: Tensor, scale: float, bits: Tensor) -> Tensor:
    """q [Hkv, n, G, w, D], k [Hkv, n + 1, w, D], lse [Hkv, n, G, w] -> what each key got, [Hkv, G, (n + 1) w]."""
    heads, count, group, block, dim = q.shape
    # In the order of the batch, by the product itself: to copy them first would take as long as all the rest. Half
    # numbers are converted before it, for their products are rounded to half.
    queries = torch.mul(q.to(k.dtype), scale * LOG2_E, out=k.new_empty(q.shape))
    their_lse = torch.mul(lse, LOG2_E, out=k.new_empty(lse.shape))
    dead = ~torch.isfinite(their_lse)
    if bool(dead.any()):
        queries.masked_fill_(dead.unsqueeze(-1), 0)
        their_lse.masked_fill_(dead, torch.inf)
    keys = torch.cat([k[:, :-1], k[:, 1:]], 2).flatten(0, 1)
    logits = torch.bmm(queries.view(-1, group * block, dim), keys.mT)
    logits -= their_lse.view(-1, group * block, 1)
    # Hidden pairs are zeroed after exp2, by assignment: their values (even inf or NaN) never matter.
    probs = zero_hidden_(logits.exp2_(), bits)
    sums = probs.view(heads, count, group, block, -1).sum(3).transpose(1, 2)
    found = sums.new_zeros(heads, group, count + 1, block)
    found[:, :, :-1] += sums[..., :block]
    found[:, :, 1:] += sums[..., block:]
    return found.flatten(2)
