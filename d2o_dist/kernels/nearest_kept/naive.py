"""The oracle: every cosine, and a scan in index order that only a strictly larger one may win."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype


def naive_nearest_kept(evicted: Tensor, kept: Tensor, target_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `nearest_kept`: evicted [..., E, D], kept [..., K, D], target_mask [..., K] -> two [..., E]."""
    acc = acc_dtype(evicted.dtype)
    left, right = evicted.to(acc), kept.to(acc)
    similarity = torch.full(evicted.shape[:-1], -torch.inf, dtype=acc, device=evicted.device)
    index = torch.zeros(evicted.shape[:-1], dtype=torch.int64, device=evicted.device)
    for j in range(kept.shape[-2]):
        key = right[..., j : j + 1, :]
        norms = left.norm(dim=-1) * key.norm(dim=-1)
        cosine = torch.where(norms > 0, (left * key).sum(-1) / norms, torch.zeros_like(norms))
        wins = cosine > similarity
        if target_mask is not None:
            wins &= target_mask[..., j : j + 1]
        similarity = torch.where(wins, cosine, similarity)
        index = torch.where(wins, torch.full_like(index, j), index)
    return similarity, index
