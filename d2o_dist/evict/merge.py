"""`policy.merge.merge_into` by the merge kernel: only slots that take something in are computed, in every run alike.

No gradients: training merges by `policy.merge`, which this is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.kernels.merge_into import merge_into
from d2o_dist.policy.merge import MergeRule
from d2o_dist.slots.slots import Slots


def merge_evicted(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule
) -> Slots:
    """As `policy.merge.merge_into`: kept [B, Hkv, K, ...], evicted [B, Hkv, E, ...], the rest [B, Hkv, E]."""
    if not rule.merges:
        return kept
    share = torch.ones_like(similarity) if rule.plain_mean else None
    old, new = (kept.values,), (evicted.values,)
    if rule.averages_keys:
        old, new = (*old, kept.keys), (*new, evicted.keys)
    weight = rule.evicted_weight(evicted, similarity)
    means, total, touched = merge_into(old, new, weight, target, merged, rule.own_weight(kept), share=share)
    kept = rule.add_mass(kept, total, touched)
    kept = kept.replace(values=means[0])
    return kept.replace(keys=means[1]) if rule.averages_keys else kept
