"""The oracle: one kept row at a time, its merged rows added up in order."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype


def naive_merge_into(
    kept: tuple[Tensor, ...],
    evicted: tuple[Tensor, ...],
    weight: Tensor,
    target: Tensor,
    merged: Tensor,
    own: Tensor | float,
    *,
    share: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """As `merge_into`: kept [B, Hkv, K, D], evicted [B, Hkv, E, D], own [B, Hkv, K], the rest [B, Hkv, E]."""
    batch, num_kv_heads, num_kept, _ = kept[0].shape
    acc = acc_dtype(kept[0].dtype)
    share = weight if share is None else share
    own = torch.as_tensor(own, dtype=acc, device=weight.device).expand(batch, num_kv_heads, num_kept)
    means = tuple(x.clone() for x in kept)
    total, touched = own.clone(), torch.zeros(own.shape, dtype=torch.bool, device=own.device)
    for b in range(batch):
        for h in range(num_kv_heads):
            for j in range(num_kept):
                rows = (merged[b, h] & (target[b, h] == j)).nonzero().squeeze(1)
                if len(rows) == 0:
                    continue
                touched[b, h, j] = True
                total[b, h, j] = own[b, h, j] + share[b, h, rows].to(acc).sum()
                for mean, old, new in zip(means, kept, evicted, strict=True):
                    added = weight[b, h, rows].to(acc) @ new[b, h, rows].to(acc)
                    mean[b, h, j] = ((own[b, h, j] * old[b, h, j].to(acc) + added) / total[b, h, j]).to(old.dtype)
    return means, total, touched
