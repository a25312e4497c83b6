"""The moving similarity threshold and the gate it opens (paper section 3.4, eq. 9-10). One a layer and row.

Both look at all KV heads of a layer. Heads may lie on other ranks, so what they need travels as one tensor of head
reports, which is gathered over heads and then read the same way everywhere.

Shape legend: B rows, h KV heads at hand, H KV heads of the layer, E evicted tokens of the eviction, X report width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig

# A report begins with the sum, the number and the maximum of the head's similarities.
_NUM_STATS = 3


@dataclass(frozen=True)
class LayerSimilarity:
    """What all KV heads of a layer say about one eviction.

    Attributes:
        mean, count, peak: [B] mean, number and maximum of the similarities of tokens that have a target.
        every: [B, H, E] the similarities themselves; None where the gate needs no more than the sums.
    """

    mean: Tensor
    count: Tensor
    peak: Tensor
    every: Tensor | None


def needs_every_similarity(config: D2OConfig) -> bool:
    """Whether the gate looks at each token of each head, rather than at sums."""
    return config.merge == "released" or config.gate == "quantile"


def head_reports(similarity: Tensor, valid: Tensor, config: D2OConfig) -> Tensor:
    """What each head at hand reports: [B, h, E] similarities and [B, h, E] validity -> [B, h, X]."""
    counted = valid & similarity.isfinite()
    total = similarity.masked_fill(~counted, 0).sum(-1)
    peak = similarity.masked_fill(~counted, -torch.inf).amax(-1)
    report = torch.stack([total, counted.sum(-1).to(total.dtype), peak], -1)
    return torch.cat([report, similarity], -1) if needs_every_similarity(config) else report


def read_reports(reports: Tensor) -> LayerSimilarity:
    """The reports [B, H, X] of all heads, in the order of the heads."""
    every = reports[..., _NUM_STATS:] if reports.shape[-1] > _NUM_STATS else None
    count = reports[..., 1].sum(1)
    # In float64, here and in `open_gate`: a token alone is not to miss the mean of itself by a last bit.
    mean = (reports[..., 0].double().sum(1) / count.clamp_min(1)).to(reports.dtype)
    return LayerSimilarity(mean, count, reports[..., 2].amax(1), every)


def update_threshold(threshold: Tensor | float | None, layer: LayerSimilarity, config: D2OConfig) -> Tensor:
    """The threshold [B] after an eviction; rows without one keep theirs.

    First eviction of a row: the mean similarity. Later: `beta * agg + (1 - beta) * threshold`.
    """
    mean = layer.mean
    old = torch.as_tensor(torch.nan if threshold is None else threshold, dtype=mean.dtype, device=mean.device)
    old = old.expand_as(mean)
    latest = layer.peak if config.threshold_agg == "max" else mean
    moved = config.ema_beta * latest + (1 - config.ema_beta) * old
    return torch.where(layer.count > 0, torch.where(old.isnan(), mean, moved), old)


def quantile_cut(similarity: Tensor, valid: Tensor, drop_quantile: float) -> Tensor:
    """The similarity [B] from which on tokens are merged, so that `floor(drop_quantile * n)` of a row's n are not.

    Over all KV heads; [B, H, E] in. Rows without evicted tokens get +inf.
    """
    flat = similarity.masked_fill(~valid, torch.inf).flatten(1).sort(-1).values
    count = valid.expand_as(similarity).sum((1, 2))
    dropped = torch.floor(drop_quantile * count.double() + 1e-9).long()
    return flat.gather(1, dropped.clamp_max(flat.shape[1] - 1)[:, None])[:, 0]


def open_gate(
    similarity: Tensor, valid: Tensor, layer: LayerSimilarity, threshold: Tensor, config: D2OConfig
) -> Tensor:
    """Which evicted tokens of the heads at hand are merged: [B, h, E] bool.

    Args:
        similarity: [B, h, E]; -inf where a token has no target.
        valid: [B, 1, E] bool: rows evict different numbers, all heads of a row the same.
        layer: of all heads; threshold: [B], after its update.
    """
    if config.merge == "released":
        # The published gate passes or drops a row of one token per head as a whole.
        mean = layer.every.double().mean(1, keepdim=True).to(threshold.dtype)
        passes = mean >= threshold[:, None, None]
        return (valid & passes).expand_as(similarity)
    cut = quantile_cut(layer.every, valid, config.drop_quantile) if config.gate == "quantile" else threshold
    return valid & (similarity > -torch.inf) & (similarity >= cut[:, None, None])
