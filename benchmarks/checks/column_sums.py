"""Checks of the column sums kernel."""

from dataclasses import dataclass

import torch

from benchmarks.checks.columns import ColumnCase
from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, in_each_dtype, on_cpu, poisoned
from d2o_dist.kernels.column_sums import naive_column_sums


@dataclass(frozen=True, kw_only=True)
class Case(ColumnCase):
    """step: from one query to the next, in tokens."""

    k_start: int = 0
    window: int | None = None
    step: int = 1


CASES = {
    "one": Case(num_queries=1),
    "mha": Case(heads=(3, 3), num_queries=130),
    "gqa": Case(heads=(4, 2), num_queries=33),
    "mqa": Case(heads=(7, 1), num_queries=129),
    "dim16": Case(head_dim=16, num_queries=257),
    "dim80": Case(head_dim=80),
    "dim96": Case(head_dim=96, num_queries=33),
    "dim128": Case(head_dim=128, num_queries=200),
    "dim256": Case(head_dim=256, num_queries=65),
    "chunk": Case(q_start=45),
    "key_shard": Case(q_start=9, k_start=30, num_ahead=13),
    "keys_ahead_of_all": Case(k_start=500),
    "window": Case(num_queries=200, window=37),
    "window_of_one": Case(window=1),
    "bias": Case(bias=True, q_start=5),
    "not_causal": Case(causal=False, num_ahead=60, bias=True),
    "dead_rows": Case(dead=True, num_queries=140),
    "strided": Case(step=8, q_start=7, num_queries=40, num_ahead=250),
    "strided_window": Case(step=3, q_start=2, num_queries=90, num_ahead=150, window=50),
    "before_the_first_key": Case(step=8, q_start=-60, num_queries=40, num_ahead=340),
    "all_before_the_first_key": Case(q_start=-200, num_queries=33, num_ahead=230),
    "transposed": Case(transposed=True, num_queries=100),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("column_sums", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.column_sums.triton import triton_column_sums

    q, k, lse, bias = case.inputs(dtype, device)
    options = dict(q_start=case.q_start, k_start=case.k_start, causal=case.causal, window=case.window)
    scale = case.head_dim**-0.5
    with poisoned():
        got = triton_column_sums(q, k, lse, scale, q_step=case.step, bias=bias, **options)
    q, k, lse, bias = on_cpu(q, k, lse, bias)
    if case.step > 1:  # the oracle takes all queries, and skips: those between are dead
        sparse_q = q.new_zeros(2, case.heads[0], case.num_queries * case.step, case.head_dim)
        sparse_lse = lse.new_full(sparse_q.shape[:3], torch.inf)
        sparse_q[:, :, :: case.step], sparse_lse[:, :, :: case.step] = q, lse
        q, lse = sparse_q, sparse_lse
    want = naive_column_sums(q, k, lse, scale, bias=bias, **options)
    result = Result()
    result.near("sums", got, want, STATISTICS_LIMIT)
    return result
