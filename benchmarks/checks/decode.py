"""Checks of the decode attention kernels."""

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
from d2o_dist.kernels.decode_attention import naive_decode_with_logits


@dataclass(frozen=True)
class Case:
    """masked: a third of the slots is unused and holds NaN; empty: the second row has no live slot at all."""

    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    num_slots: int = 100
    batch: int = 2
    masked: bool = False
    empty: bool = False
    mass: bool = False
    room: int = 0


CASES = {
    "one_slot": Case(num_slots=1),
    "two_slots": Case(num_slots=2, mass=True),
    "mha": Case(heads=(2, 2), num_slots=65),
    "mqa": Case(heads=(7, 1), num_slots=130),
    "wide_group": Case(heads=(20, 1), num_slots=70),
    "dim16": Case(head_dim=16, num_slots=257),
    "dim80": Case(head_dim=80),
    "dim96": Case(head_dim=96, num_slots=33),
    "dim128": Case(head_dim=128, num_slots=1000, batch=1),
    "dim256": Case(head_dim=256, num_slots=200),
    "masked": Case(masked=True, num_slots=300),
    "empty_row": Case(masked=True, empty=True, mass=True),
    "mass": Case(mass=True, masked=True, num_slots=129),
    "room_to_grow": Case(num_slots=77, room=19, mass=True),
    "many_splits": Case(heads=(2, 1), num_slots=2100, batch=1, head_dim=32),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("decode_attention", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.decode_attention.triton import triton_decode_attention

    num_heads, num_kv_heads = case.heads
    rows = (case.batch, num_kv_heads, case.num_slots + case.room)
    q = normal(case.batch, num_heads, case.head_dim, dtype=dtype, device=device)
    k, v = (normal(*rows, case.head_dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    mass = normal(*rows, dtype=torch.float32, device=device, seed=3).abs() if case.mass else None
    valid = normal(*rows, dtype=torch.float32, device=device, seed=4) > -0.4 if case.masked else None
    if case.empty:
        valid[1] = False
    if valid is not None:
        for x in (k, v) if mass is None else (k, v, mass):
            x[~valid] = torch.nan
    # Views of buffers that have room to grow, as the cache hands them out.
    k, v, mass, valid = (x if x is None else x[:, :, : case.num_slots] for x in (k, v, mass, valid))
    scale = case.head_dim**-0.5
    with poisoned():
        out, lse, logits = triton_decode_attention(q, k, v, scale, valid=valid, log_mass=mass)
    q, k, v, mass, valid = on_cpu(q, k, v, mass, valid)
    want = naive_decode_with_logits(q, k, v, scale, valid=valid, log_mass=mass)
    result = Result()
    result.near("out", out, want[0], OUT_LIMITS[dtype])
    result.near("lse", lse, want[1], STATISTICS_LIMIT)
    result.near("logits", logits, want[2], STATISTICS_LIMIT)
    return result
