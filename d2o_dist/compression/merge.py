"""`core.merge.merge_into` by the merge kernel: only slots that take something in are computed, the same bits every run.

No gradients: training merges by `core.merge`, which this is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.merge import add_mass, evicted_weight, merges_keys, own_weight
from d2o_dist.core.types import Slots
from d2o_dist.kernels.merge_into import merge_into


def merge_evicted(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, config: D2OConfig
) -> Slots:
    """As `core.merge.merge_into`: kept [B, Hkv, K, ...], evicted [B, Hkv, E, ...], the rest [B, Hkv, E]."""
    if config.merge == "none":
        return kept
    share = torch.ones_like(similarity) if config.merge == "released" else None
    old, new = (kept.values,), (evicted.values,)
    if merges_keys(config):
        old, new = (*old, kept.keys), (*new, evicted.keys)
    weight = evicted_weight(evicted, similarity, config)
    means, total, touched = merge_into(old, new, weight, target, merged, own_weight(kept, config), share=share)
    if config.merge == "mass":
        kept = add_mass(kept, total, touched, config)
    kept = kept.replace(values=means[0])
    return kept.replace(keys=means[1]) if merges_keys(config) else kept
