"""Checks of the column peaks kernel."""

from dataclasses import dataclass

import torch

from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, in_each_dtype, normal, on_cpu, poisoned
from d2o_dist.kernels.column_peaks import naive_column_peaks


@dataclass(frozen=True)
class Case:
    """num_ahead: keys after the last query (or before, if negative). dead: rows without lse, keys of bias -inf, NaN."""

    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    num_queries: int = 70
    q_start: int = 0
    num_ahead: int = 0
    bias: bool = False
    causal: bool = True
    dead: bool = False
    transposed: bool = False


CASES = {
    "one": Case(num_queries=1),
    "mha": Case(heads=(3, 3), num_queries=130),
    "gqa": Case(heads=(4, 2), num_queries=33),
    "mqa": Case(heads=(7, 1), num_queries=129),
    "dim16": Case(head_dim=16, num_queries=257),
    "dim80": Case(head_dim=80),
    "dim128": Case(head_dim=128, num_queries=200),
    "dim256": Case(head_dim=256, num_queries=65),
    "chunk": Case(q_start=45),
    "keys_ahead": Case(q_start=9, num_ahead=200),
    "bias": Case(bias=True, q_start=5),
    "not_causal": Case(causal=False, num_ahead=60),
    "not_causal_bias": Case(causal=False, num_ahead=-30, bias=True),
    "dead_rows": Case(dead=True, num_queries=140),
    "transposed": Case(transposed=True, num_queries=100),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("column_peaks", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.column_peaks.triton import triton_column_peaks

    num_heads, num_kv_heads = case.heads
    num_keys = max(1, case.q_start + case.num_queries + case.num_ahead)
    q = normal(2, num_heads, case.num_queries, case.head_dim, dtype=dtype, device=device)
    k = normal(2, num_kv_heads, num_keys, case.head_dim, dtype=dtype, device=device, seed=1)
    lse = normal(2, num_heads, case.num_queries, dtype=torch.float32, device=device, seed=2).abs() + 6
    bias = None
    if case.bias or case.dead:
        bias = normal(2, num_kv_heads, num_keys, dtype=torch.float32, device=device, seed=3)
    if case.dead:
        lse[:, :, ::4], lse[:, :, 1::4] = torch.inf, -torch.inf
        q[:, :, ::4] = torch.nan
        bias[:, :, ::5] = -torch.inf
        k[:, :, ::5] = torch.nan
    if case.transposed:
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    options = dict(q_start=case.q_start, causal=case.causal)
    scale = case.head_dim**-0.5
    with poisoned():
        got = triton_column_peaks(q, k, lse, scale, bias=bias, **options)
    q, k, lse, bias = on_cpu(q, k, lse, bias)
    result = Result()
    result.near("peaks", got, naive_column_peaks(q, k, lse, scale, bias=bias, **options), STATISTICS_LIMIT)
    return result
