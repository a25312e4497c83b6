"""Collectives and bytes that the planner expects, beside the counters of real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.plan.traffic import PlannedTraffic, Sent
from tests.plan.runs import Case, measure_all

STEPS = 48
GATHER, TP = {"sp_prefill": "allgather"}, {"tp_engine": "transformers"}
CASES = [
    Case("d2o", steps=STEPS, parallel=ParallelConfig(sp=2)),
    Case("lean", steps=STEPS, chunk=200, batch=2, parallel=ParallelConfig(sp=2, **GATHER)),
    Case("lean", steps=STEPS, chunk=200, reading="layerwise", parallel=ParallelConfig(sp=2)),
    Case("d2o", steps=STEPS, chunk=300, parallel=ParallelConfig(sp=2, sp_prefill="ring")),
    Case("paper", steps=STEPS, parallel=ParallelConfig(sp=2, cache_layout="sequence")),
    Case("lean", "gemma3", steps=STEPS, parallel=ParallelConfig(sp=2, **GATHER)),
    Case("lean", "gemma3", steps=STEPS, parallel=ParallelConfig(sp=2, cache_layout="sequence")),
    Case("h2o", steps=STEPS, parallel=ParallelConfig(sp=2, **GATHER)),
    Case("reread", steps=STEPS, d2o={"score": {"chunk": 128}}, parallel=ParallelConfig(sp=2)),
    Case("lean", steps=STEPS, parallel=ParallelConfig(sp=2, merge_scope="local", **GATHER)),
    Case("lean", "deepseek", steps=STEPS, parallel=ParallelConfig(sp=2, **GATHER)),
    Case("d2o", "deepseek", steps=STEPS, parallel=ParallelConfig(sp=2, sp_prefill="ring")),
    Case("d2o", "qwen2", steps=STEPS, parallel=ParallelConfig(tp=2, **TP)),
    Case("d2o", "qwen2", steps=STEPS, model={"num_key_value_heads": 1}, parallel=ParallelConfig(tp=2, **TP)),
]


def added_up(sent: Iterator[Sent]) -> dict[tuple[str, str, str], tuple[int, float]]:
    """(phase, axis, kind) -> (calls, bytes), of what is sent at all."""
    found: dict[tuple[str, str, str], tuple[int, float]] = {}
    for one in sent:
        if one.calls:
            key = (one.phase, one.axis, one.kind)
            calls, size = found.get(key, (0, 0.0))
            found[key] = (calls + one.calls, size + one.bytes)
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.preset}-{case.family}-{case.parallel.sp_prefill}")
def test_counts_and_bytes(case):
    """Exact, but where a prompt decides: how large the tails of layers are, and which slots move to level shards."""
    shape, ranks = case.shape, measure_all(case)
    share = case.share(shape)
    traffic = PlannedTraffic(
        shape, case.config, share, case.length, case.batch, case.dtype, case.chunk, reading=case.reading
    )
    wanted = {key: one for key, one in added_up(traffic.prompt()).items() if key[0] != "model"}
    evictions = case.steps // case.config.eviction_interval
    for times, sent in ((case.steps, traffic.step()), (evictions, traffic.eviction())):
        # The token is chosen by the loop around a session, and the engine's sums are not counted.
        for key, (calls, size) in added_up(sent).items():
            if key[0] not in ("token", "model"):
                wanted[key] = (calls * times, size * times)
    found: dict = {}
    for one in ranks:
        for phase, axes in one["traffic"].items():
            for axis, kinds in axes.items():
                for kind, sent in kinds.items():
                    _, before = found.get((phase, axis, kind), (0, 0))
                    found[phase, axis, kind] = (sent["calls"], before + sent["bytes"] / len(ranks))
    assert {key: calls for key, (calls, _) in wanted.items()} == {key: calls for key, (calls, _) in found.items()}
    for key, (_, size) in found.items():
        levels = key == ("finalize", "sp", "all_to_all") and not share.reads_by_heads
        assert abs(wanted[key][1] / size - 1) <= (0.3 if levels else 0.05), (key, wanted[key], size)
