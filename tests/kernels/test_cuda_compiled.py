"""The kernels in CUDA C++ as nvcc compiles them for A100 and H100, and, on a GPU, as they run."""

import ctypes
import re
import subprocess

import pytest
import torch

from benchmarks.checks import cuda_checks
from d2o_dist.kernels.cuda import build, library

SHARED_LIMIT = 48 << 10  # what a kernel may have without asking
REGISTERS = 65536  # of a multiprocessor, of both GPUs
KERNELS = {"evict_kernel": 3, "append_kernel": 3, "update_scores_kernel": 1}
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")


@needs_nvcc
@pytest.mark.parametrize("capability", [80, 90])
def test_no_registers_spill(tmp_path, capability):
    target = f"arch=compute_{capability},code=sm_{capability}"
    command = [build.find_nvcc(), *build.NVCC_FLAGS, "-gencode", target, "-Xptxas", "-v", "-cubin", str(build.SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "k.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    said = done.stderr.split("Compiling entry function")[1:]
    names = [next(name for name in KERNELS if name in part) for part in said]
    assert {name: names.count(name) for name in KERNELS} == KERNELS
    for name, part in zip(names, said, strict=True):
        frame, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        assert (frame, stores, loads) == ("0", "0", "0"), part
        used = int(re.search(r"Used (\d+) registers", part)[1])
        shared = int(match[1]) if (match := re.search(r"(\d+) bytes smem", part)) else 0
        assert shared <= SHARED_LIMIT and 256 * used * (2 if name == "evict_kernel" else 8) <= REGISTERS, part


@needs_nvcc
@pytest.mark.slow
def test_the_whole_library_is_built_and_loads_without_a_gpu(tmp_path):
    found = library.load(build.build(tmp_path / "lib.so"))
    if not torch.cuda.is_available():
        params = library.ScoreParams(batch=1, heads=1, group=1, num_slots=1)
        error = found.d2o_update_scores(ctypes.byref(params), None)
        assert error != 0 and b"no error" not in found.d2o_error_text(error)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not library.is_built(), reason="no GPU, or the library is not built"
)
@pytest.mark.parametrize("op", sorted({check.op for check in cuda_checks()}))
def test_on_a_gpu(op):
    results = {check.name: check.run("cuda").errors for check in cuda_checks() if check.op == op}
    wrong = {(name, what): x for name, errors in results.items() for what, x in errors.items() if not x[0] <= x[1]}
    assert results and wrong == {}
