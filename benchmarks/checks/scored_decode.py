"""Checks of a whole decode step of a layer: its token is written, attention, scores and rates."""

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
from d2o_dist.kernels.scored_decode import naive_scored_decode
from d2o_dist.kernels.segments import Segments


@dataclass(frozen=True)
class Case:
    """lengths: slots of each KV head. They are one block where all are alike, unless `apart`."""

    lengths: tuple[int, ...]
    group: int = 4
    dims: tuple[int, int] = (64, 64)
    apart: bool = False
    softcap: float | None = None
    sinks: bool = False
    peaks: bool = False
    kept: bool = True


CASES = {
    "block": Case((150, 150)),
    "many_splits": Case((1100, 1100), group=2, dims=(32, 32)),
    "two_dims": Case((70, 70), dims=(80, 48), sinks=True),
    "capped": Case((70,), softcap=2.0, peaks=True),
    "nothing_kept": Case((90, 90), kept=False),
    "heads_apart": Case((3, 200, 65), dims=(128, 128)),
    "heads_apart_peaks": Case((130, 1, 1), group=1, peaks=True, sinks=True, softcap=3.0),
    "heads_alike_apart": Case((33, 33), apart=True, dims=(96, 96)),
}


def checks() -> list[Check]:
    """Each case in each dtype."""
    return in_each_dtype("scored_decode", CASES, run)


def run(case: Case, dtype: torch.dtype, device: str) -> Result:
    from d2o_dist.kernels.scored_decode.triton import triton_scored_decode

    batch, heads, total = 3, len(case.lengths), 3 * sum(case.lengths)
    segments = Segments.of(case.lengths, batch, torch.device(device))
    q = normal(batch, case.group * heads, case.dims[0], dtype=dtype, device=device) * 3
    k, v = (normal(total, dim, dtype=dtype, device=device, seed=s) for s, dim in enumerate(case.dims, 1))
    valid = normal(total, dtype=torch.float32, device=device, seed=3) > -0.5
    mass, scores, rates = normal(3, total, dtype=torch.float32, device=device, seed=4).abs()
    # The token of a row lies anywhere in its segment; the second row takes none, and no slot of it is in use.
    slot = torch.tensor([[length // 2, 0, length - 1] for length in case.lengths], device=device).T
    new = [normal(batch, heads, dim, dtype=dtype, device=device, seed=s) for s, dim in enumerate(case.dims, 7)]
    present = torch.tensor([True, False, True], device=device)
    by_head = [segments.of_head(number, valid) for number in range(heads)]
    for head, own in enumerate(by_head):
        own[[0, 2], 0, slot[[0, 2], head]], own[1] = True, False
    k[~valid], v[~valid] = torch.nan, torch.nan
    sinks = normal(1, case.group * heads, dtype=torch.float32, device=device, seed=9) if case.sinks else None
    options = dict(softcap=case.softcap, peaks=case.peaks, rate_window=8)
    kept = dict(scores=scores, rates=rates) if case.kept else dict(scores=None, rates=None)
    want = _by_heads(case, segments, q, k, v, valid, mass, kept, slot, new, sinks, present, options)
    whole = not case.apart and len(set(case.lengths)) == 1
    if whole:  # as a block [B, Hkv, S, ...], whose rows have all heads side by side
        flat = {"k": k, "v": v, "valid": valid, "log_mass": mass, **kept}
        given = {name: None if x is None else _block(x, heads, batch) for name, x in flat.items()}
    else:
        given = {"k": k, "v": v, "valid": valid, "log_mass": mass, **kept, "segments": segments}
    with poisoned():
        out = triton_scored_decode(
            q, scale=0.1, **given, newest=slot, new=tuple(new), sinks=sinks, present=present, widths=None, total=None,
            **options,
        )  # fmt: skip
    result = Result()
    result.near("out", out, want.pop("out"), OUT_LIMITS[dtype])
    for name, expected in want.items():
        got = given[name].transpose(0, 1).reshape(expected.shape) if whole else given[name]
        result.near(name, *on_cpu(got), expected, STATISTICS_LIMIT)  # where nothing was written it is NaN still
    return result


def _block(x: torch.Tensor, heads: int, batch: int) -> torch.Tensor:
    """[N, ...] by head and row -> [B, Hkv, S, ...]."""
    return x.unflatten(0, (heads, batch, -1)).transpose(0, 1)


def _by_heads(case, segments, q, k, v, valid, mass, kept, slot, new, sinks, present, options) -> dict:
    """What each KV head gives alone, by the oracle: out, and k, v, scores and rates afterwards, all [N, ...]."""
    q, k, v, valid, mass, slot, sinks, present = on_cpu(q, k, v, valid, mass, slot, sinks, present)
    k, v, new = k.clone(), v.clone(), on_cpu(*new)
    kept, outs = {name: None if x is None else x.cpu().clone() for name, x in kept.items()}, []
    for number in range(len(case.lengths)):
        here, heads = slice(number, number + 1), slice(number * case.group, (number + 1) * case.group)
        keys, values, mine, own_mass = (segments.of_head(number, x) for x in (k, v, valid, mass))
        rows = torch.arange(len(q))
        keys[rows, 0, slot[:, number]], values[rows, 0, slot[:, number]] = (x[:, number] for x in new)
        own = {name: None if x is None else segments.of_head(number, x) for name, x in kept.items()}
        outs.append(naive_scored_decode(
            q[:, heads], keys, values, 0.1, valid=mine, newest=slot[:, here], log_mass=own_mass,
            sinks=None if sinks is None else sinks[:, heads], present=present, **own, **options,
        ))  # fmt: skip
    found = {"out": torch.cat(outs, 1), "k": k, "v": v}
    return found | {name: x for name, x in kept.items() if x is not None}
