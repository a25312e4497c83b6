"""Gate rules: which evicted tokens are merged, and the moving similarity threshold (paper section 3.4, eq. 9-10).

Threshold and gate are one a layer and row, and look at all KV heads of a layer. Heads may lie on other ranks, so what
they need travels as one tensor of head reports, which is gathered over heads and then read the same way everywhere.

Shape legend: B rows, h KV heads at hand, H KV heads of the layer, E evicted tokens of the eviction, X report width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2o_dist.fields.declare import choice, real
from d2o_dist.policy.rule import Rule, registry

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


@dataclass(frozen=True)
class GateRule(Rule):
    """Which evicted tokens are merged.

    Attributes:
        looks_at_each: whether it looks at each token of each head, rather than at sums.
        ema_beta, aggregate: how the moving threshold moves, which every eviction reports: see `Threshold`.
    """

    path: ClassVar[str] = "merge.gate"
    looks_at_each: ClassVar[bool] = False
    ema_beta: ClassVar[float] = 0.7
    aggregate: ClassVar[str] = "max"

    def move(self, threshold: Tensor | float | None, layer: LayerSimilarity) -> Tensor:
        """The threshold [B] after an eviction; rows without one keep theirs.

        First eviction of a row: the mean similarity. Later: `beta * aggregate + (1 - beta) * threshold`.
        """
        mean = layer.mean
        old = torch.as_tensor(torch.nan if threshold is None else threshold, dtype=mean.dtype, device=mean.device)
        old = old.expand_as(mean)
        latest = layer.peak if self.aggregate == "max" else mean
        moved = self.ema_beta * latest + (1 - self.ema_beta) * old
        return torch.where(layer.count > 0, torch.where(old.isnan(), mean, moved), old)

    def open(self, similarity: Tensor, valid: Tensor, layer: LayerSimilarity, threshold: Tensor) -> Tensor:
        """Which evicted tokens of the heads at hand are merged: [B, h, E] bool.

        Args:
            similarity: [B, h, E]; -inf where a token has no target.
            valid: [B, 1, E] bool: rows evict different numbers, all heads of a row the same.
            layer: of all heads; threshold: [B], after its update.
        """
        cut = self.cut(valid, layer, threshold)
        return valid & (similarity > -torch.inf) & (similarity >= cut[:, None, None])

    def cut(self, valid: Tensor, layer: LayerSimilarity, threshold: Tensor) -> Tensor:
        """[B] the similarity from which on tokens are merged."""
        raise NotImplementedError


@dataclass(frozen=True)
class Threshold(GateRule):
    """Merge what is at least as similar as a moving threshold (the paper).

    Attributes:
        ema_beta: weight of the newest eviction in the threshold.
        aggregate: what an eviction adds to it: `max` (the paper) or `mean` of the similarities.
    """

    name: ClassVar[str] = "threshold"
    ema_beta: float = real(0.7, low=0, high=1)
    aggregate: str = choice("max", "max", "mean")

    def cut(self, valid: Tensor, layer: LayerSimilarity, threshold: Tensor) -> Tensor:
        """As `GateRule.cut`."""
        return threshold


@dataclass(frozen=True)
class RowThreshold(GateRule):
    """The published code's gate: one token of every head passes or is dropped as a row, by the mean over heads.

    Attributes: as of `Threshold`.
    """

    name: ClassVar[str] = "row_threshold"
    looks_at_each: ClassVar[bool] = True
    ema_beta: float = real(0.5, low=0, high=1)
    aggregate: str = choice("mean", "max", "mean")

    def open(self, similarity: Tensor, valid: Tensor, layer: LayerSimilarity, threshold: Tensor) -> Tensor:
        """As `GateRule.open`."""
        mean = layer.every.double().mean(1, keepdim=True).to(threshold.dtype)
        return (valid & (mean >= threshold[:, None, None])).expand_as(similarity)


@dataclass(frozen=True)
class Quantile(GateRule):
    """Merge all but the least similar of each eviction, over all KV heads of the layer.

    Attributes:
        drop: share that is dropped.
    """

    name: ClassVar[str] = "quantile"
    looks_at_each: ClassVar[bool] = True
    drop: float = real(0.25, low=0, below=1)

    def cut(self, valid: Tensor, layer: LayerSimilarity, threshold: Tensor) -> Tensor:
        """As `GateRule.cut`."""
        return quantile_cut(layer.every, valid, self.drop)


GATES = registry(Threshold, Quantile)
RELEASED_GATES = registry(RowThreshold)


def head_reports(similarity: Tensor, valid: Tensor, gate: GateRule) -> Tensor:
    """What each head at hand reports: [B, h, E] similarities and [B, h, E] validity -> [B, h, X]."""
    counted = valid & similarity.isfinite()
    total = similarity.masked_fill(~counted, 0).sum(-1)
    peak = similarity.masked_fill(~counted, -torch.inf).amax(-1)
    report = torch.stack([total, counted.sum(-1).to(total.dtype), peak], -1)
    return torch.cat([report, similarity], -1) if gate.looks_at_each else report


def read_reports(reports: Tensor) -> LayerSimilarity:
    """The reports [B, H, X] of all heads, in the order of the heads."""
    every = reports[..., _NUM_STATS:] if reports.shape[-1] > _NUM_STATS else None
    count = reports[..., 1].sum(1)
    # In float64, here and in `RowThreshold.open`: a token alone is not to miss the mean of itself by a last bit.
    mean = (reports[..., 0].double().sum(1) / count.clamp_min(1)).to(reports.dtype)
    return LayerSimilarity(mean, count, reports[..., 2].amax(1), every)


def quantile_cut(similarity: Tensor, valid: Tensor, drop: float) -> Tensor:
    """The similarity [B] from which on tokens are merged, so that `floor(drop * n)` of a row's n are not.

    Over all KV heads; [B, H, E] in. Rows without evicted tokens get +inf.
    """
    flat = similarity.masked_fill(~valid, torch.inf).flatten(1).sort(-1).values
    count = valid.expand_as(similarity).sum((1, 2))
    dropped = torch.floor(drop * count.double() + 1e-9).long()
    return flat.gather(1, dropped.clamp_max(flat.shape[1] - 1)[:, None])[:, 0]
