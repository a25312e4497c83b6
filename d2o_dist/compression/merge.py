"""`core.merge.merge_into` by the merge kernel: only slots that take something in are computed, the same bits every run.

No gradients: training merges by `core.merge`, which this is tested against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.types import Slots, stats_dtype
from d2o_dist.kernels.merge_into import merge_into


def merge_evicted(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, config: D2OConfig
) -> Slots:
    """As `core.merge.merge_into`: kept [B, Hkv, K, ...], evicted [B, Hkv, E, ...], the rest [B, Hkv, E]."""
    if config.merge == "none":
        return kept
    dtype = stats_dtype(kept.keys.dtype)
    own: Tensor | float = math.e
    share = None
    if config.merge == "mass":
        own, weight = kept.rates.clamp_min(torch.finfo(dtype).tiny), evicted.rates
    elif config.merge == "released":
        own, weight, share = 1.0, similarity, torch.ones_like(similarity)
    else:
        weight = similarity.exp()
    with_keys = config.merge in ("keys_values", "released")
    old = (kept.keys, kept.values) if with_keys else (kept.values,)
    new = (evicted.keys, evicted.values) if with_keys else (evicted.values,)
    means, total, touched = merge_into(old, new, weight, target, merged, own, share=share)
    if with_keys:
        return kept.replace(keys=means[0], values=means[1])
    if config.merge == "values":
        return kept.replace(values=means[0])
    log_mass = (kept.log_mass + (total / own).log()).clamp_max(config.max_log_mass)
    return kept.replace(
        values=means[0],
        rates=torch.where(touched, total, kept.rates),
        log_mass=torch.where(touched, log_mass, kept.log_mass),
    )
