"""Checks of the merge kernel: means, divisors, untouched bits, and the same bits again."""

from dataclasses import dataclass

import torch

from benchmarks.checks.common import (
    OUT_LIMITS,
    STATISTICS_LIMIT,
    Check,
    Result,
    in_each_dtype,
    normal,
    on_cpu,
    poisoned,
)
from d2o_dist.kernels.merge_into import naive_merge_into


@dataclass(frozen=True)
class Case:
    """spread: number of kept rows that are targets; fraction of evicted rows that are merged; share: other divisors."""

    num_evicted: int = 120
    num_kept: int = 12
    head_dim: int = 64
    spread: int = 10
    fraction: float = 0.7
    share: bool = False


CASES = {
    "one": Case(1, 1, spread=1, fraction=1.0),
    "few": Case(3, 7, 16, 7),
    "dim80": Case(head_dim=80),
    "dim96": Case(head_dim=96, share=True),
    "dim128": Case(head_dim=128),
    "dim256": Case(head_dim=256, num_kept=5, spread=5),
    "all_to_one": Case(num_evicted=300, num_kept=5, spread=1, fraction=1.0),
    "nothing_merged": Case(fraction=0.0),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("merge_into", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.merge_into.triton import triton_merge_into

    lead = (2, 1)
    kept = tuple(normal(*lead, case.num_kept, case.head_dim, dtype=dtype, device=device, seed=s) for s in (0, 1))
    evicted = tuple(normal(*lead, case.num_evicted, case.head_dim, dtype=dtype, device=device, seed=s) for s in (2, 3))
    generator = torch.Generator().manual_seed(4)
    target = torch.randint(0, case.spread, (*lead, case.num_evicted), generator=generator).to(device)
    merged = (torch.rand(*lead, case.num_evicted, generator=generator) < case.fraction).to(device)
    weight = normal(*lead, case.num_evicted, dtype=torch.float32, device=device, seed=5).abs()
    share = torch.ones_like(weight) if case.share else weight
    own = normal(*lead, case.num_kept, dtype=torch.float32, device=device, seed=6).abs() + 0.5
    for x in (*evicted, weight):
        x[~merged] = torch.nan
    arguments = (kept, evicted, weight, target, merged, own, share)
    with poisoned():
        means, total, touched = triton_merge_into(*arguments)
        again = triton_merge_into(*arguments)
    plain_kept, plain_evicted = on_cpu(*kept), on_cpu(*evicted)
    plain = on_cpu(weight, target, merged, own)
    want = naive_merge_into(plain_kept, plain_evicted, *plain, share=on_cpu(share)[0])
    result = Result()
    for name, got, expected in zip(("keys", "values"), means, want[0], strict=True):
        result.near(name, got, expected, OUT_LIMITS[dtype])
    result.near("total", total, want[1], STATISTICS_LIMIT)
    result.equal("touched", touched, want[2])
    for name, got, old in zip(("untouched keys", "untouched values"), means, kept, strict=True):
        result.equal(name, got[~touched], old[~touched])
    for name, one, two in zip(("keys again", "values again"), means, again[0], strict=True):
        result.equal(name, one, two)
    return result
