"""Decode attention on a CPU, row by row: each row is computed as if it were alone.

A row of a batch has as many columns as the widest row. Neither a matrix product nor a sum gives the same last bits for
another width, nor does `exp2` in another place; so each row is cut to its own width first. It costs nothing: softmax in
one operator saves more than the loop over rows takes, and no padding is computed.

Shape legend: B rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, S slots, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, group_size

CONVERTED_ELEMENTS = 1 << 18  # of K or V at a time: 1 MiB in float32


@torch.no_grad()
def decode_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor, log_mass: Tensor | None, softcap: float | None,
    sinks: Tensor | None, widths: Sequence[int], sees: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `scored_decode`: -> (out [B, Hq, D] in q.dtype, probs [B, Hkv, S] in acc dtype, summed over the group).

    sees: every head of every row has a valid slot, that of its token.
    """
    batch, num_heads, head_dim, value_dim = *q.shape, v.shape[3]
    num_kv_heads, num_slots, acc = k.shape[1], k.shape[2], acc_dtype(q.dtype)
    group = group_size(num_heads, num_kv_heads)
    out = torch.zeros(batch, num_kv_heads, group, value_dim, dtype=acc)
    probs = torch.zeros(batch, num_kv_heads, num_slots, dtype=acc)
    if q.numel() == 0 or num_slots == 0:
        return out.view(batch, num_heads, value_dim).to(q.dtype), probs
    queries = (q.to(acc) * scale).view(batch, num_kv_heads, group, head_dim)
    sink = None if sinks is None else sinks.to(acc).view(num_kv_heads, group, 1)
    valid = (valid.unsqueeze(1) if valid.dim() == 2 else valid).expand(probs.shape)
    bias = (torch.zeros_like(probs) if log_mass is None else log_mass.to(acc)).masked_fill(~valid, -torch.inf)
    size = num_slots if k.dtype == acc else max(1, CONVERTED_ELEMENTS // (num_kv_heads * head_dim))
    for row, width in enumerate(widths):
        spans = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        mine = queries[row]
        if softcap is None:
            parts = [torch.baddbmm(bias[row, :, None, here], mine, k[row, :, here].to(acc).mT) for here in spans]
        else:
            products = ((here, torch.bmm(mine, k[row, :, here].to(acc).mT)) for here in spans)
            parts = [softcap * (one / softcap).tanh() + bias[row, :, None, here] for here, one in products]
        parts += [] if sink is None else [sink]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        weights = logits.softmax(-1)[..., :width]
        torch.sum(weights, 1, out=probs[row, :, :width])
        if len(spans) == 1:
            torch.bmm(weights, v[row, :, :width].to(acc), out=out[row])
            continue
        for here in spans:
            out[row] += torch.bmm(weights[:, :, here], v[row, :, here].to(acc))
    if sees:
        return out.view(batch, num_heads, value_dim).to(q.dtype), probs
    # A head that sees nothing: its softmax was no number.
    blind = ~valid.any(-1, keepdim=True)
    probs.masked_fill_(blind, 0)
    return out.masked_fill_(blind.unsqueeze(-1), 0).view(batch, num_heads, value_dim).to(q.dtype), probs
