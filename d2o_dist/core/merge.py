"""Folding evicted tokens into kept ones (paper section 3.4, eq. 11-12; mass-preserving merge: docs/algorithm.md).

Shape legend: B rows, Hkv key/value heads, K kept slots, E evicted tokens, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.types import Slots, stats_dtype

# Evicted tokens are compared in blocks, so that a similarity matrix never exceeds this many entries.
_BLOCK_ENTRIES = 1 << 22


def _unit(keys: Tensor) -> Tensor:
    """Keys over their norms, in accumulation dtype; a key of norm 0 stays 0, so that its cosines are 0."""
    keys = keys.to(stats_dtype(keys.dtype))
    norm = keys.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, keys / norm, 0)


def nearest_kept(evicted: Tensor, kept: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each evicted key to its nearest target, and which that is; ties: the lowest index.

    Args:
        evicted: [B, Hkv, E, D] keys; kept: [B, Hkv, K, D] keys; is_target: [B, Hkv, K] bool.

    Returns:
        similarity [B, Hkv, E] float32 (float64 for float64 keys), -inf where there is no target; index [B, Hkv, E].
    """
    left, right = _unit(evicted), _unit(kept).transpose(-1, -2)
    heads = evicted.shape[0] * evicted.shape[1]
    block = max(1, _BLOCK_ENTRIES // max(1, heads * kept.shape[2]))
    similarity, index = [], []
    for part in left.split(block, dim=2):
        cosine = (part @ right).masked_fill_(~is_target.unsqueeze(2), -torch.inf)
        best = cosine.amax(-1, keepdim=True)
        # argmax of a 0/1 tensor is not promised to be the first one; the smallest matching index is.
        where = torch.arange(kept.shape[2], device=kept.device).expand_as(cosine)
        index.append(torch.where(cosine == best, where, kept.shape[2]).amin(-1))
        similarity.append(best.squeeze(-1))
    return torch.cat(similarity, 2), torch.cat(index, 2)


def _scatter_rows(target: Tensor, weighted: Tensor, num_kept: int) -> Tensor:
    """Rows [B, Hkv, E, D] added up by their target index: [B, Hkv, K, D]."""
    out = torch.zeros(*weighted.shape[:2], num_kept, weighted.shape[-1], dtype=weighted.dtype, device=weighted.device)
    return out.scatter_add_(2, target.unsqueeze(-1).expand_as(weighted), weighted)


def _scatter(target: Tensor, weights: Tensor, num_kept: int) -> Tensor:
    """Weights [B, Hkv, E] added up by their target index: [B, Hkv, K]."""
    out = torch.zeros(*weights.shape[:2], num_kept, dtype=weights.dtype, device=weights.device)
    return out.scatter_add_(2, target, weights)


def merge_into(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, config: D2OConfig
) -> Slots:
    """Kept slots with the gated evicted tokens folded in. Positions and scores of the kept stay as they are.

    Args:
        kept: [B, Hkv, K, ...]; evicted: [B, Hkv, E, ...].
        similarity, target: [B, Hkv, E], from `nearest_kept`.
        merged: [B, Hkv, E] bool, from `open_gate`.

    Accumulates in float32 (float64 for a float64 cache) and stores in the cache's dtype. A slot into which nothing is
    merged keeps its bits.
    """
    if config.merge == "none":
        return kept
    dtype = stats_dtype(kept.keys.dtype)
    num_kept = kept.positions.shape[-1]
    target = target.masked_fill(~merged, 0)
    touched = _scatter(target, merged.to(dtype), num_kept) > 0

    def average(own_weight: Tensor | float, weight: Tensor, total: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """`(own_weight * old + sum weight * new) / total`, where anything was merged."""
        added = _scatter_rows(target, weight.unsqueeze(-1) * new.to(dtype), num_kept)
        own = own_weight.unsqueeze(-1) if isinstance(own_weight, Tensor) else own_weight
        mean = (own * old.to(dtype) + added) / total.unsqueeze(-1)
        return torch.where(touched.unsqueeze(-1), mean.to(old.dtype), old)

    if config.merge == "mass":
        tiny = torch.finfo(dtype).tiny
        own = kept.rates.clamp_min(tiny)
        weight = evicted.rates * merged
        mass = own + _scatter(target, weight, num_kept)
        log_mass = (kept.log_mass + (mass / own).log()).clamp_max(config.max_log_mass)
        return kept.replace(
            values=average(own, weight, mass, kept.values, evicted.values),
            rates=torch.where(touched, mass, kept.rates),
            log_mass=torch.where(touched, log_mass, kept.log_mass),
        )

    if config.merge == "released":
        own_weight = 1.0
        weight = similarity.masked_fill(~merged, 0)
        total = 1 + _scatter(target, merged.to(dtype), num_kept)
    else:
        own_weight = math.e
        weight = similarity.masked_fill(~merged, -torch.inf).exp()
        total = math.e + _scatter(target, weight, num_kept)
    values = average(own_weight, weight, total, kept.values, evicted.values)
    if config.merge == "values":
        return kept.replace(values=values)
    return kept.replace(keys=average(own_weight, weight, total, kept.keys, evicted.keys), values=values)
