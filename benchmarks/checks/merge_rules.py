"""Checks of merging by the kernel beside PyTorch, under every merge rule."""

from __future__ import annotations

import torch

from benchmarks.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Check, Result, normal, using
from d2o_dist.evict.merge import merge_evicted
from d2o_dist.policy.merge import MERGES, Average, Mass, MergeRule, merge_into
from d2o_dist.slots.slots import Slots

# Every rule, and every number of one changed.
RULES: dict[str, MergeRule] = {
    **{name: rule() for name, rule in MERGES.items()},
    "values": Average(keys=False),
    **{f"self weight {weight}": Average(self_weight=weight) for weight in (0.25, 10.0)},
    **{f"max log mass {most}": Mass(max_log_mass=most) for most in (0.0, 0.3)},
}


def checks() -> list[Check]:
    """One, of all rules."""
    return [Check("merge_rules", "all", run)]


def run(device: str) -> Result:
    """Each rule by the kernel, and by PyTorch on a CPU."""
    kept, evicted = _slots(7, 0, device), _slots(40, 10, device)
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(2, 2, 40, generator=generator) * 2 - 1
    target = torch.randint(0, 5, (2, 2, 40), generator=generator)
    merged = torch.rand(2, 2, 40, generator=generator) < 0.7
    plain = (kept.map(lambda x: x.cpu()), evicted.map(lambda x: x.cpu()), similarity, target, merged)
    result = Result()
    for name, rule in RULES.items():
        with using("triton"):
            got = merge_evicted(kept, evicted, similarity.to(device), target.to(device), merged.to(device), rule)
        want = merge_into(*plain, rule)
        for field in ("keys", "values"):
            result.near(f"{name}: {field}", getattr(got, field), getattr(want, field), OUT_LIMITS[torch.float32])
        for field in ("scores", "rates", "log_mass"):
            result.near(f"{name}: {field}", getattr(got, field), getattr(want, field), STATISTICS_LIMIT)
        result.equal(f"{name}: positions", got.positions, want.positions)
    return result


def _slots(count: int, seed: int, device: str) -> Slots:
    keys, values = (normal(2, 2, count, 16, dtype=torch.float32, device=device, seed=seed + n) for n in (0, 1))
    statistics = (normal(2, 2, count, dtype=torch.float32, device=device, seed=seed + n).abs() for n in (2, 3, 4))
    return Slots(keys, values, torch.arange(count, device=device).expand(2, 2, count), *statistics)
