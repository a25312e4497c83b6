"""Checks of the column peaks kernel."""

import torch

from benchmarks.checks.columns import ColumnCase
from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, in_each_dtype, on_cpu, poisoned
from d2o_dist.kernels.column_peaks import naive_column_peaks

CASES = {
    "one": ColumnCase(num_queries=1),
    "mha": ColumnCase(heads=(3, 3), num_queries=130),
    "gqa": ColumnCase(heads=(4, 2), num_queries=33),
    "mqa": ColumnCase(heads=(7, 1), num_queries=129),
    "dim16": ColumnCase(head_dim=16, num_queries=257),
    "dim80": ColumnCase(head_dim=80),
    "dim128": ColumnCase(head_dim=128, num_queries=200),
    "dim256": ColumnCase(head_dim=256, num_queries=65),
    "chunk": ColumnCase(q_start=45),
    "keys_ahead": ColumnCase(q_start=9, num_ahead=200),
    "bias": ColumnCase(bias=True, q_start=5),
    "not_causal": ColumnCase(causal=False, num_ahead=60),
    "not_causal_bias": ColumnCase(causal=False, num_ahead=-30, bias=True),
    "dead_rows": ColumnCase(dead=True, num_queries=140),
    "transposed": ColumnCase(transposed=True, num_queries=100),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("column_peaks", CASES, run)


def run(case: ColumnCase, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.column_peaks.triton import triton_column_peaks

    q, k, lse, bias = case.inputs(dtype, device)
    options = dict(q_start=case.q_start, causal=case.causal)
    scale = case.head_dim**-0.5
    with poisoned():
        got = triton_column_peaks(q, k, lse, scale, bias=bias, **options)
    q, k, lse, bias = on_cpu(q, k, lse, bias)
    result = Result()
    result.near("peaks", got, naive_column_peaks(q, k, lse, scale, bias=bias, **options), STATISTICS_LIMIT)
    return result
