"""Checks of the kernel that updates scores and rates."""

import torch

from benchmarks.checks.common import STATISTICS_LIMIT, Check, Result, normal, on_cpu, poisoned
from d2o_dist.kernels.update_scores import naive_update_scores

# name: (query heads, KV heads, slots, which of scores, rates, present are there)
CASES = {
    "scores": (8, 2, 100, "s"),
    "rates": (6, 2, 1, "r"),
    "both": (7, 1, 1030, "sr"),
    "absent_rows": (4, 4, 65, "srp"),
}


def checks() -> list[Check]:
    """Each case."""
    return [Check("update_scores", name, lambda device, case=case: run(*case, device)) for name, case in CASES.items()]


def run(num_heads: int, num_kv_heads: int, num_slots: int, parts: str, device: str) -> Result:
    from d2o_dist.kernels.update_scores.triton import triton_update_scores

    batch, room = 3, 5
    logits = normal(batch, num_heads, num_slots, dtype=torch.float32, device=device) * 3
    logits[:, :, 2::3] = -torch.inf
    lse = logits.logsumexp(-1) + 0.3  # slots of other shards have the rest
    logits[1], lse[1] = -torch.inf, -torch.inf
    rows = (batch, num_kv_heads, num_slots + room)
    statistics = [normal(*rows, dtype=torch.float32, device=device, seed=s) for s in (1, 2)]
    scores, rates = (x[:, :, :num_slots] if name in parts else None for x, name in zip(statistics, "sr", strict=True))
    # Another slot in each head, and not side by side.
    newest = torch.tensor([num_slots - 1, 0, -1], device=device)[:, None] - torch.arange(num_kv_heads, device=device)
    newest = newest.T.contiguous().T
    # A column of a table.
    present = torch.tensor([[True, False], [True, False], [False, True]], device=device)[:, 0] if "p" in parts else None
    before = on_cpu(logits, lse, *(x if x is None else x.clone() for x in (scores, rates)), newest, present)
    rest = [x[:, :, num_slots:].clone() for x in statistics]
    with poisoned():
        probs = triton_update_scores(
            logits, lse, num_kv_heads, scores=scores, rates=rates, newest=newest, rate_window=16, present=present,
            with_probs=True,
        )  # fmt: skip
    want = torch.zeros(batch, num_kv_heads, num_slots, dtype=torch.float64)
    naive_update_scores(before[0], before[1], want, present=before[5])
    naive_update_scores(*before[:4], newest=before[4], rate_window=16, present=before[5])
    result = Result()
    result.near("probs", probs, want, STATISTICS_LIMIT)
    for name, got, expected in (("scores", scores, before[2]), ("rates", rates, before[3])):
        if got is not None:
            result.near(name, got, expected, STATISTICS_LIMIT)
    for name, x, expected in zip(("behind scores", "behind rates"), statistics, rest, strict=True):
        result.equal(name, x[:, :, num_slots:], expected)
    return result
