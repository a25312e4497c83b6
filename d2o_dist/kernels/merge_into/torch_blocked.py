"""Weighted segment means with torch ops only, any device: rows are added to their targets in order of their index.

Only merged rows are read. On a CPU `index_add_` adds one row after the other; on CUDA it would use atomics, so there it
is `index_put_`, which sorts: the same rows give the same bits in every run on both.
"""

import torch
from torch import Tensor

_ROWS = 1 << 16  # merged rows that are converted and weighted at a time


@torch.no_grad()
def blocked_merge_into(
    kept: tuple[Tensor, ...],
    evicted: tuple[Tensor, ...],
    weight: Tensor,
    target: Tensor,
    merged: Tensor,
    own: Tensor,
    share: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """As `merge_into`: weight, share [B, Hkv, E], own [B, Hkv, K], all in acc dtype."""
    num_kept = own.shape[-1]
    rows = merged.reshape(-1).nonzero().squeeze(1)
    lead = rows // max(1, weight.shape[-1])
    slots = target.reshape(-1)[rows] + lead * num_kept
    touched = torch.zeros(own.numel(), dtype=torch.bool, device=own.device)
    touched[slots] = True
    total = own.reshape(-1).clone()
    _add(total, slots, share.reshape(-1)[rows])
    weights = weight.reshape(-1)[rows].unsqueeze(1)
    means = []
    for old, new in zip(kept, evicted, strict=True):
        head_dim = old.shape[-1]
        source = new.reshape(-1, head_dim)
        sums = torch.zeros(own.numel(), head_dim, dtype=own.dtype, device=own.device)
        for start in range(0, rows.numel(), _ROWS):
            part = slice(start, start + _ROWS)
            _add(sums, slots[part], source[rows[part]].to(own.dtype) * weights[part])
        mean = sums.view(old.shape).addcmul_(own.unsqueeze(-1), old.to(own.dtype))
        mean.div_(total.view(own.shape).unsqueeze(-1))
        means.append(torch.where(touched.view(own.shape).unsqueeze(-1), mean.to(old.dtype), old))
    return tuple(means), total.view(own.shape), touched.view(own.shape)


def _add(sums: Tensor, slots: Tensor, rows: Tensor) -> None:
    """sums[slots] += rows, in order."""
    if sums.device.type == "cpu":
        sums.index_add_(0, slots, rows)
    else:
        sums.index_put_((slots,), rows, accumulate=True)
