"""Builds the library of CUDA kernels: `python -m d2o_dist.kernels.cuda.build`. Standard library only: setup.py runs it.

With `--host FILE` the same source as loops over blocks and threads, by a C++ compiler, for tests without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "api.cu"
LIBRARY = HERE / "libd2o_cuda.so"
# Machine code for A100 and H100, and code that later GPUs translate.
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")
# No contraction of a * b + c behind our back: both builds round alike, and a sum does not depend on the compiler.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
# Rows are moved as words of sixteen bytes and read as numbers.
HOST_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra")


def find_nvcc() -> str | None:
    """The compiler of $CUDA_HOME, else that of the path, else that of /usr/local/cuda; None: there is none."""
    places = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    if os.environ.get("CUDA_HOME") and os.access(places[0], os.X_OK):
        return str(places[0])
    return shutil.which("nvcc") or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def find_host_compiler() -> str | None:
    """$CXX, else a C++ compiler of the path; None: there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def is_current(library: Path = LIBRARY) -> bool:
    """Whether the library is there, and no source of it is newer."""
    sources = (Path(__file__), *HERE.glob("*.cu"), *HERE.glob("*.cuh"))
    return library.exists() and all(source.stat().st_mtime <= library.stat().st_mtime for source in sources)


def build(library: Path = LIBRARY) -> Path:
    """The library for GPUs.

    Raises:
        FileNotFoundError: no nvcc. RuntimeError: it failed; with what it said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc: neither $CUDA_HOME, the path nor /usr/local/cuda has one")
    targets = [part for target in TARGETS for part in ("-gencode", target)]
    # The targets at once, each by a process of its own.
    shared = ("--threads", "0", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden")
    return _compile([nvcc, *NVCC_FLAGS, *targets, *shared, str(SOURCE)], library)


def build_host(library: Path) -> Path:
    """The same source for CPU tensors; it is slow, and for tests.

    Raises:
        FileNotFoundError: no C++ compiler. RuntimeError: it failed; with what it said.
    """
    compiler = find_host_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: neither $CXX nor the path has one")
    shared = ("-shared", "-fPIC", "-fvisibility=hidden")
    return _compile([compiler, "-x", "c++", *HOST_FLAGS, *shared, str(SOURCE)], library)


def _compile(command: Sequence[str], library: Path) -> Path:
    """Under another name first, so that a library is whole or not there."""
    library.parent.mkdir(parents=True, exist_ok=True)
    part = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nexit status {done.returncode}: {done.stdout}{done.stderr}")
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)
    return library


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, metavar="FILE", help="build for tests without a GPU, into this file")
    args = parser.parse_args(argv)
    try:
        print(f"built: {build() if args.host is None else build_host(args.host)}")
    except (FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
