"""The moving similarity threshold and the gate it opens (paper section 3.4, eq. 9-10). One a layer and row.

Shape legend: B rows, Hkv key/value heads, E evicted tokens of the eviction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig


@dataclass(frozen=True)
class SimilarityStats:
    """What all KV heads of a layer (and all shards) contribute to the threshold: each [B]."""

    total: Tensor
    count: Tensor
    peak: Tensor


def similarity_stats(similarity: Tensor, counted: Tensor) -> SimilarityStats:
    """Sum, number and maximum of the similarities [B, Hkv, E] where `counted`."""
    kept = similarity.masked_fill(~counted, 0)
    peak = similarity.masked_fill(~counted, -torch.inf)
    return SimilarityStats(kept.sum((1, 2)), counted.sum((1, 2)), peak.amax((1, 2)))


def update_threshold(threshold: Tensor | None, stats: SimilarityStats, config: D2OConfig) -> Tensor:
    """The threshold [B] after an eviction; rows without one keep theirs.

    First eviction of a row: the mean similarity. Later: `beta * agg + (1 - beta) * threshold`.
    """
    happened = stats.count > 0
    mean = stats.total / stats.count.clamp_min(1)
    old = torch.full_like(mean, torch.nan) if threshold is None else threshold
    latest = stats.peak if config.threshold_agg == "max" else mean
    moved = config.ema_beta * latest + (1 - config.ema_beta) * old
    return torch.where(happened, torch.where(old.isnan(), mean, moved), old)


def quantile_cut(similarity: Tensor, valid: Tensor, drop_quantile: float) -> Tensor:
    """The similarity [B] from which on tokens are merged, so that `floor(drop_quantile * n)` of a row's n are not.

    Over all KV heads; [B, Hkv, E] in. Rows without evicted tokens get +inf.
    """
    flat = similarity.masked_fill(~valid, torch.inf).flatten(1).sort(-1).values
    count = valid.sum((1, 2))
    dropped = torch.floor(drop_quantile * count.double() + 1e-9).long()
    return flat.gather(1, dropped.clamp_max(flat.shape[1] - 1)[:, None])[:, 0]


def open_gate(similarity: Tensor, valid: Tensor, threshold: Tensor, config: D2OConfig) -> Tensor:
    """Which evicted tokens are merged: [B, Hkv, E] bool.

    Args:
        similarity: [B, Hkv, E]; -inf where a token has no target.
        valid: [B, Hkv, E] bool.
        threshold: [B], after its update.
    """
    if config.merge == "none":
        return torch.zeros_like(valid)
    if config.merge == "released":
        # The published gate passes or drops a row of one token per head as a whole.
        passes = similarity.mean(1, keepdim=True) >= threshold[:, None, None]
        return valid & passes.expand_as(valid)
    reachable = valid & (similarity > -torch.inf)
    cut = quantile_cut(similarity, valid, config.drop_quantile) if config.gate == "quantile" else threshold
    return reachable & (similarity >= cut[:, None, None])
