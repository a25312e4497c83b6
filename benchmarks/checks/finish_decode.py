"""Checks of the kernel that ends a decode step: parts merged, and scores and rates."""

import torch

from benchmarks.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Check, Result, normal, on_cpu, poisoned
from d2o_dist.kernels.finish_decode import naive_finish_decode, slot_probabilities

# name: (query heads, KV heads, slots, parts, head dim, which of scores, rates, present, peaks, sinks are there)
CASES = {
    "scores": (8, 2, 100, 1, 16, "s"),
    "rates": (6, 2, 1, 3, 80, "r"),
    "both": (7, 1, 1030, 40, 64, "sr"),
    "absent_rows": (4, 4, 65, 2, 128, "srx"),
    "peaks_and_sinks": (4, 2, 70, 17, 32, "srpk"),
    "nothing_kept": (4, 2, 70, 5, 256, "xk"),
}


def checks() -> list[Check]:
    """Each case."""
    return [Check("finish_decode", name, lambda device, case=case: run(*case, device)) for name, case in CASES.items()]


def run(num_heads: int, num_kv_heads: int, num_slots: int, parts: int, dim: int, kinds: str, device: str) -> Result:
    from d2o_dist.kernels.finish_decode.triton import triton_finish_decode, triton_slot_probabilities

    batch, room, dtype = 3, 5, torch.bfloat16
    logits = normal(batch, num_heads, num_slots, dtype=torch.float32, device=device) * 3
    logits[:, :, 2::3] = -torch.inf
    lses = normal(parts, batch, num_heads, dtype=torch.float32, device=device, seed=7)
    # As ranks hand them over, beside each other; an empty part holds anything, and one row has nothing at all.
    packed = normal(parts, batch, num_heads, dim + 1, dtype=torch.float32, device=device, seed=8)
    outs, logits[1], lses[:, 1] = packed[..., :-1], -torch.inf, -torch.inf
    if parts > 1:
        lses[1], outs[1] = -torch.inf, torch.nan
    outs[:, 1] = torch.nan
    rows = (batch, num_kv_heads, num_slots + room)
    statistics = [normal(*rows, dtype=torch.float32, device=device, seed=s) for s in (1, 2)]
    scores, rates = (x[:, :, :num_slots] if name in kinds else None for x, name in zip(statistics, "sr", strict=True))
    # Another slot in each head, and not side by side.
    newest = torch.tensor([num_slots - 1, 0, -1], device=device)[:, None] - torch.arange(num_kv_heads, device=device)
    newest = newest.T.contiguous().T
    # A column of a table.
    present = torch.tensor([[True, False], [True, False], [False, True]], device=device)[:, 0] if "x" in kinds else None
    sinks = normal(1, num_heads, dtype=torch.float32, device=device, seed=9) if "k" in kinds else None
    tensors = [outs, lses, logits, sinks, newest, present, *(x if x is None else x.clone() for x in (scores, rates))]
    before = on_cpu(*tensors)
    rest = [x[:, :, num_slots:].clone() for x in statistics]
    options = dict(num_kv_heads=num_kv_heads, rate_window=16, peaks="p" in kinds)
    with poisoned():
        out = triton_finish_decode(
            outs, lses, logits, dtype, sinks=sinks, newest=newest, present=present, scores=scores, rates=rates,
            total=None, **options,
        )  # fmt: skip
        probs = triton_slot_probabilities(logits, lses[0], num_kv_heads)
    names = ("outs", "lses", "logits", "sinks", "newest", "present", "scores", "rates")
    given = dict(zip(names, before, strict=True))
    want = naive_finish_decode(**given, dtype=torch.float32, **options)
    result = Result()
    result.near("out", out, want, OUT_LIMITS[dtype])
    result.near("probs", probs, slot_probabilities(*on_cpu(logits, lses[0]), num_kv_heads), STATISTICS_LIMIT)
    for name, got, expected in (("scores", scores, given["scores"]), ("rates", rates, given["rates"])):
        if got is not None:
            result.near(name, got, expected, STATISTICS_LIMIT)
    for name, x, expected in zip(("behind scores", "behind rates"), statistics, rest, strict=True):
        result.equal(name, x[:, :, num_slots:], expected)
    return result
