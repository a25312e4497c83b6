"""Triton kernels, interpreted on the CPU in a process of their own, against their oracles."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.checks import all_checks
from benchmarks.checks.common import OUT_LIMITS, STATISTICS_LIMIT, Result

INTERPRETED = [check for check in all_checks() if not check.needs_cuda]
OPS = sorted({check.op for check in INTERPRETED})


@pytest.fixture(scope="module")
def outcomes() -> list[dict]:
    """Of all ops, from one process: it takes seconds to start."""
    # float16 takes the same path as bfloat16 when interpreted; on a GPU it is checked too.
    command = [sys.executable, "-m", "benchmarks.checks", "--device", "cpu", "--skip=-float16"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (0 if all(outcome["right"] for outcome in outcomes) else 1), done.stderr
    return outcomes


@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_oracles(op, outcomes):
    found = [outcome for outcome in outcomes if outcome["op"] == op]
    assert [outcome for outcome in found if not outcome["right"]] == []
    expected = [check.name for check in INTERPRETED if check.op == op and "-float16" not in check.name]
    assert [outcome["name"] for outcome in found] == expected


def test_names_are_unique():
    names = [(check.op, check.name) for check in all_checks()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "got",
    [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.1]), torch.tensor([1.0])],
    ids=["nan", "inf", "off", "shape"],
)
def test_a_result_notices(got):
    result = Result()
    result.near("x", got, torch.tensor([1.0, 2.0]), STATISTICS_LIMIT)
    assert not result.is_right


def test_a_result_of_equal_infinities_is_right():
    result = Result()
    result.near("x", torch.tensor([-torch.inf, 2.0]), torch.tensor([-torch.inf, 2.0]), 0.0)
    result.equal("y", torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert result.is_right and result.errors == {"x": (0.0, 0.0), "y": (0.0, 0.0)}
    result.equal("z", torch.tensor([1, 3]), torch.tensor([1, 2]))
    assert not result.is_right and max(OUT_LIMITS.values()) < 0.1
