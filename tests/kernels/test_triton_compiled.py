"""Every kernel compiles for A100 and H100 without either, as the library would launch it for real models."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import pytest

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


@cache
def compiled(names: tuple[str, ...]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(names: Sequence[str], of: tuple[str, ...]) -> None:
    """Those names of what is compiled together: a process of its own takes seconds to start."""
    results = [result for result in compiled(of) if result["case"] in names]
    found = {(result["case"], result["capability"]) for result in results}
    assert found == {(name, capability) for name in names for capability in SHARED_LIMITS}
    for result in results:
        assert result["shared_bytes"] <= SHARED_LIMITS[result["capability"]], result
        assert result["local_bytes"] == 0 or result["case"] in MAY_SPILL, f"registers spill: {result}"


def test_kernels_of_real_models():
    assert {name.split("-")[0] for name in REAL} == set(OPS)
    check(REAL, REAL)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op != "update_scores"])
def test_other_head_dims_and_float32(op):
    check([name for name in OTHERS if name.split("-")[0] == op], OTHERS)
