"""Runs on several ranks: DeepSpeed ZeRO 0 to 3, replicas and token shards, all equal to one process.

One group of workers does many runs, because DeepSpeed takes seconds to start.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o_dist.comm import build_mesh
from d2o_dist.train.loop import train
from tests.ranks import run_ranks
from tests.train.runs import LM, make_config, make_inputs, records, start, steps_of

STEPS = 4
DISTILL: dict = {}
ZERO = [{"name": "deepspeed", "zero_stage": stage} for stage in range(4)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return str(make_inputs(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(scope="module")
def expected(inputs) -> dict[str, list[float]]:
    """Losses and gradient norms of one process, by objective."""
    return {name: steps_of(make_config(inputs, **kind), STEPS) for name, kind in KINDS.items()}


KINDS = {"lm": LM, "distill": DISTILL}


def several(rank, world, inputs, jobs):
    """Each job `(objective, sp, changes)`: the losses of its first steps."""
    found = []
    for name, sp, changes in jobs:
        mesh = build_mesh(dp=world // sp, sp=sp)
        found.append(steps_of(make_config(inputs, sp=sp, **KINDS[name], **changes), STEPS, mesh))
    return found


def check(world, inputs, expected, jobs):
    for found in run_ranks(world, several, inputs, jobs, fresh=True, timeout_s=400):
        for (name, sp, changes), values in zip(jobs, found, strict=True):
            assert values == pytest.approx(expected[name], rel=2e-4), (name, sp, changes)


@pytest.mark.multirank
def test_replicas_and_token_shards_equal_one_process(inputs, expected):
    jobs = [(name, sp, {}) for name in KINDS for sp in (1, 2, 4)]
    check(4, inputs, expected, jobs)


@pytest.mark.multirank
def test_zero_stages_equal_one_process(inputs, expected):
    pytest.importorskip("deepspeed")
    jobs = [(name, 1, {"engine": engine}) for name in KINDS for engine in ZERO]
    jobs += [("distill", 2, {"engine": engine}) for engine in (ZERO[2], ZERO[3])]
    jobs += [("distill", 2, {"engine": ZERO[3], "activation_checkpointing": True})]
    check(2, inputs, expected, jobs)
