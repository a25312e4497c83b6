"""Decode attention on a CPU, row by row: each row is computed as if it were alone.

A row of a batch has as many columns as the widest row. Neither a matrix product nor a sum gives the same last bits for
another width, nor does `exp2` in another place; so each row is cut to its own width first. It costs nothing: softmax in
one operator saves more than the loop over rows takes, and no padding is computed.

Shape legend: B rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, S slots, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.kernels.common import acc_dtype, capped, group_size

CONVERTED_ELEMENTS = 1 << 18  # of K or V at a time: 1 MiB in float32


def bias_of(valid: Tensor, log_mass: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What is added to the logits of slots [B, Hkv, S]: log_mass or 0, -inf where not valid ([B, S] or [B, Hkv, S])."""
    valid = (valid.unsqueeze(1) if valid.dim() == 2 else valid).expand(shape)
    bias = torch.zeros(shape, dtype=dtype, device=valid.device) if log_mass is None else log_mass.to(dtype)
    return bias.masked_fill(~valid, -torch.inf)


class Row(NamedTuple):
    """Views of one row's slots, in spans that are converted one after the other.

    Attributes:
        keys, values, bias: of each span, [Hkv, D, n], [Hkv, n, D] and [Hkv, 1, n].
        width: slots of all of them.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: list[Tensor]
    width: int


def rows_of(k: Tensor, v: Tensor, bias: Tensor, widths: Sequence[int]) -> list[Row]:
    """k, v [B, Hkv, S, D] and their bias [B, Hkv, S], as `bias_of` makes it, cut to the width of each row."""
    num_kv_heads, num_slots, head_dim = k.shape[1:]
    size = num_slots if k.dtype == bias.dtype else max(1, CONVERTED_ELEMENTS // (num_kv_heads * head_dim))
    rows = []
    for row, width in enumerate(widths):
        spans = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        rows.append(Row(
            [k[row, :, here].mT for here in spans], [v[row, :, here] for here in spans],
            [bias[row, :, None, here] for here in spans], width,
        ))  # fmt: skip
    return rows


def attend_row(q: Tensor, row: Row, scale: float, softcap: float | None, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """One row: q [Hkv, G, D] in acc dtype -> (out [Hkv, G, Dv], probs [Hkv, width]), no numbers where all is hidden.

    Args:
        sink: [Hkv, G, 1] in acc dtype, or None.
    """
    logits = []
    for keys, bias in zip(row.keys, row.bias, strict=True):
        keys = keys if keys.dtype == q.dtype else keys.to(q.dtype)
        if softcap is None:
            logits.append(torch.baddbmm(bias, q, keys, alpha=scale))
        else:
            logits.append(capped(scale * torch.bmm(q, keys), softcap) + bias)
    if sink is not None:
        logits.append(sink)
    weights = (logits[0] if len(logits) == 1 else torch.cat(logits, 2)).softmax(-1)
    if sink is not None:
        weights = weights[..., : row.width]
    if len(row.values) == 1 and row.values[0].dtype == q.dtype:
        return torch.bmm(weights, row.values[0]), weights.sum(1)
    out, start = None, 0
    for values in row.values:
        part = torch.bmm(weights[..., start : start + values.shape[1]], values.to(q.dtype))
        out, start = part if out is None else out.add_(part), start + values.shape[1]
    return out, weights.sum(1)


def attend_rows(
    q: Tensor, rows: Sequence[Row], num_slots: int, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, D] -> (out [B, Hq, Dv] in acc dtype, probs [B, Hkv, num_slots]), 0 beyond the width of a row."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads, acc = rows[0].keys[0].shape[0], acc_dtype(q.dtype)
    queries = q.to(acc).view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sink = None if sinks is None else sinks.to(acc).view(num_kv_heads, -1, 1)
    outs, probs = [], []
    for mine, row in zip(queries.unbind(0), rows, strict=True):
        out, of_slots = attend_row(mine, row, scale, softcap, sink)
        outs.append(out)
        probs.append(of_slots if row.width == num_slots else pad(of_slots, (0, num_slots - row.width)))
    if batch == 1:
        return outs[0].view(1, num_heads, -1), probs[0].unsqueeze(0)
    return torch.stack(outs).view(batch, num_heads, -1), torch.stack(probs)


def decode_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor, softcap: float | None, sinks: Tensor | None,
    widths: Sequence[int], sees: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `scored_decode`: -> (out [B, Hq, D] in q.dtype, probs [B, Hkv, S] in acc dtype, summed over the group).

    Args:
        bias: [B, Hkv, S] in acc dtype, as `bias_of` makes it.
        sees: every head of every row has a valid slot, that of its token.
    """
    batch, num_heads, _ = q.shape
    num_kv_heads, num_slots = k.shape[1], k.shape[2]
    group = group_size(num_heads, num_kv_heads)
    if q.numel() == 0 or num_slots == 0:
        return q.new_zeros(batch, num_heads, v.shape[3]), bias.new_zeros(batch, num_kv_heads, num_slots)
    out, probs = attend_rows(q, rows_of(k, v, bias, widths), num_slots, scale, softcap, sinks)
    if not sees:
        # A head that sees nothing: its softmax was no number.
        blind = (bias == -torch.inf).all(-1, keepdim=True)
        probs, out = probs.masked_fill(blind, 0), out.masked_fill(blind.repeat_interleave(group, 1), 0)
    return out.to(q.dtype), probs
