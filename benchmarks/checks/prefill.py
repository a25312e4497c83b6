"""Checks of the attention kernel for prompts."""

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
from d2o_dist.kernels.prefill_attention import naive_prefill_attention

# Sums of larger products in float32 are off by more, and so is what the softmax makes of them.
_LOGIT_LIMIT = 1e-6


@dataclass(frozen=True)
class Case:
    """dead: the first keys have bias -inf and hold NaN, so that the first queries see nothing."""

    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    num_queries: int = 70
    q_start: int = 0
    window: int | None = None
    bias: bool = False
    dead: bool = False
    sharpness: float = 1.0
    transposed: bool = False


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
    "one_after_many": Case(q_start=300, num_queries=1),
    "window": Case(num_queries=300, window=37),
    "window_of_one": Case(window=1),
    "window_chunk": Case(num_queries=150, q_start=111, window=100),
    "bias": Case(bias=True, q_start=33),
    "bias_window": Case(bias=True, num_queries=200, window=70),
    "dead_rows": Case(dead=True, num_queries=140),
    "dead_chunk": Case(dead=True, q_start=200, num_queries=40),
    "peaked": Case(sharpness=30.0, num_queries=150),
    "transposed": Case(transposed=True, num_queries=100, q_start=10),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("prefill_attention", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.prefill_attention.triton import triton_prefill_attention

    num_heads, num_kv_heads = case.heads
    num_keys = case.q_start + case.num_queries
    q = normal(2, num_heads, case.num_queries, case.head_dim, dtype=dtype, device=device) * case.sharpness
    k, v = (normal(2, num_kv_heads, num_keys, case.head_dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    bias = None
    if case.bias or case.dead:
        bias = normal(2, num_kv_heads, num_keys, dtype=torch.float32, device=device, seed=3)
    if case.dead:
        bias[:, :, :90] = -torch.inf
        bias[:, :, ::7] = -torch.inf
        k[:, :, :90], v[:, :, ::7] = torch.nan, torch.nan
    if case.transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    options = dict(q_start=case.q_start, window=case.window)
    scale = case.head_dim**-0.5
    with poisoned():
        out, lse = triton_prefill_attention(q, k, v, scale, bias=bias, **options)
    q, k, v, bias = on_cpu(q, k, v, bias)
    want, want_lse = naive_prefill_attention(q, k, v, scale, bias=bias, **options)
    result = Result()
    result.near("out", out, want, OUT_LIMITS[dtype] + _LOGIT_LIMIT * (case.sharpness - 1))
    result.near("lse", lse, want_lse, STATISTICS_LIMIT)
    return result
