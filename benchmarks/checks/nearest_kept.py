"""Checks of the nearest-kept kernel, ties included."""

from dataclasses import dataclass

import torch

from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, in_each_dtype, normal, on_cpu, poisoned
from d2o_dist.kernels.nearest_kept import naive_nearest_kept


@dataclass(frozen=True)
class Case:
    """masked: some kept keys are no targets and hold NaN, and one head has none; tied: all kept keys are one key;
    zeros: keys of norm 0 on both sides; size multiplies the keys."""

    num_evicted: int = 70
    num_kept: int = 100
    head_dim: int = 64
    masked: bool = False
    tied: bool = False
    zeros: bool = False
    size: float = 1.0


CASES = {
    "one": Case(1, 1),
    "few": Case(3, 7),
    "dim16": Case(257, 33, 16),
    "dim80": Case(head_dim=80),
    "dim96": Case(130, 129, 96),
    "dim128": Case(130, 300, 128),
    "dim256": Case(head_dim=256),
    "masked": Case(masked=True, num_kept=200),
    "tied": Case(tied=True, num_kept=300),
    "tied_masked": Case(tied=True, masked=True, num_kept=150),
    "zeros": Case(zeros=True),
    "large": Case(size=100.0),
    "small": Case(size=0.01),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("nearest_kept", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.nearest_kept.triton import triton_nearest_kept

    evicted = normal(3, case.num_evicted, case.head_dim, dtype=dtype, device=device) * case.size
    kept = normal(3, case.num_kept, case.head_dim, dtype=dtype, device=device, seed=1) * case.size
    if case.tied:
        kept = kept[:, :1].expand_as(kept).contiguous()
    if case.zeros:
        evicted[:, ::3], kept[:, ::4] = 0, 0
    mask = None
    if case.masked:
        mask = normal(3, case.num_kept, dtype=torch.float32, device=device, seed=2) > 0
        mask[1] = False
        kept[~mask] = torch.nan
    with poisoned():
        similarity, index = triton_nearest_kept(evicted, kept, mask)
    evicted, kept, mask = on_cpu(evicted, kept, mask)
    want, _ = naive_nearest_kept(evicted, kept, mask)
    result = Result()
    result.near("similarity", similarity, want, STATISTICS_LIMIT)
    if case.tied:
        first = torch.zeros(3, dtype=torch.int64) if mask is None else mask.int().argmax(1)
        result.equal("index", index, first[:, None].expand(3, case.num_evicted))
        return result
    # Two kept keys may be equally near up to rounding: the one chosen must be as near as the best.
    chosen = kept.gather(1, index.cpu().unsqueeze(-1).expand(-1, -1, case.head_dim).clamp(0, case.num_kept - 1))
    norms = evicted.norm(dim=-1) * chosen.norm(dim=-1)
    cosine = torch.where(norms > 0, (evicted * chosen).sum(-1) / norms, torch.zeros_like(norms))
    cosine = torch.where(want == -torch.inf, want, cosine)
    result.near("cosine of index", cosine, want, STATISTICS_LIMIT)
    allowed = torch.ones(3, case.num_kept, dtype=torch.bool) if mask is None else mask
    is_target = allowed.gather(1, index.cpu()) | (want == -torch.inf)
    result.equal("index is a target", is_target, torch.ones_like(is_target))
    lost = index.cpu()[want == -torch.inf]
    result.equal("index without target", lost, torch.zeros_like(lost))
    return result
