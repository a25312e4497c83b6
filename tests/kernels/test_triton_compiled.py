"""Every kernel compiles for A100 and H100 without either, as the library would launch it for real models."""

import itertools
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.kernels.compile_cases import CASES
from tests.kernels.compiling import SHARED_LIMITS

pytest.importorskip("triton")
# What Llama-3-8B and Qwen2.5-7B launch in bfloat16; the rest: other head dims, float32.
MAIN = {"llama3_8b", "qwen25_7b"}
# float32 prompts go to cuBLAS: the library never chooses these.
MAY_SPILL = {"prefill-float32", "prefill-float32-dim256"}
REAL = tuple(name for name in CASES if name.split("-")[1] in MAIN)
OTHERS = tuple(name for name in CASES if name not in REAL)
OPS = sorted({name.split("-")[0] for name in CASES})
# Of these each for one GPU, in turns: both for all of them would take a minute more.
CAPABILITY = {name: tuple(SHARED_LIMITS)[number % len(SHARED_LIMITS)] for number, name in enumerate(sorted(OTHERS))}


@cache
def compiled(cases: tuple[str, ...]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", *cases], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(wanted: set[tuple[str, int]], of: tuple[str, ...]) -> None:
    """Those cases and capabilities, of what is compiled together: a process of its own takes seconds to start."""
    results = [result for result in compiled(of) if (result["case"], result["capability"]) in wanted]
    assert {(result["case"], result["capability"]) for result in results} == wanted
    for result in results:
        assert result["shared_bytes"] <= SHARED_LIMITS[result["capability"]], result
        assert result["local_bytes"] == 0 or result["case"] in MAY_SPILL, f"registers spill: {result}"


def test_kernels_of_real_models():
    assert {name.split("-")[0] for name in REAL} == set(OPS)
    check(set(itertools.product(REAL, SHARED_LIMITS)), REAL)


def test_as_many_decode_programs_fit_a_multiprocessor_as_splits_are_planned_for():
    from d2o_dist.kernels.decode_attention.triton import PROGRAMS_PER_PROCESSOR, plan_tile

    threads = 32 * plan_tile(torch.bfloat16, 128).warps
    found = [one for one in compiled(REAL) if one["name"] == "_decode_split_kernel"]
    assert len(found) >= 8
    for one in found:
        registers = -(-one["registers"] // 8) * 8 * threads  # given by eights
        assert PROGRAMS_PER_PROCESSOR * registers <= 1 << 16, one
        assert PROGRAMS_PER_PROCESSOR * (one["shared_bytes"] + 1024) <= SHARED_LIMITS[one["capability"]] + 1024, one


@pytest.mark.parametrize("processors", [4, 108, 132])
@pytest.mark.parametrize("rows", [1, 8, 24, 264, 265, 2048])
def test_splits_fill_whole_waves(processors, rows):
    """Beside all other numbers of slots a split: none ends sooner by more than a step, or an eighth."""
    from d2o_dist.kernels.decode_attention.triton import PROGRAMS_PER_PROCESSOR, plan_splits

    def duration(each: int, steps: int) -> int:
        return -(-(-(-steps // each) * rows) // (processors * PROGRAMS_PER_PROCESSOR)) * (each + 1)

    for slots in (1, 64, 65, 700, 6568, 32784, 262144):
        size, steps = plan_splits(slots, rows, processors, 64), -(-slots // 64)
        assert size % 64 == 0 and size < slots + 64
        best = min(duration(each, steps) for each in range(1, steps + 1))
        assert duration(size // 64, steps) <= best + max(1, best // 8), (slots, size)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_other_head_dims_and_float32(op):
    wanted = {(name, capability) for name, capability in CAPABILITY.items() if name.split("-")[0] == op}
    check(wanted, tuple(f"{name}@{capability}" for name, capability in CAPABILITY.items()))
