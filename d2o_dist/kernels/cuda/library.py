"""The library of CUDA kernels, loaded when it is first needed, and what crosses the line to it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from d2o_dist.kernels.cuda.build import LIBRARY
from d2o_dist.kernels.cuda.params import AppendParams, EvictParams, ScoreParams

ABI_VERSION = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes: rows are moved in words of this size

BUILD = "python -m d2o_dist.kernels.cuda.build"
_host: ctypes.CDLL | None = None
_schedule = 0


@dataclass(frozen=True)
class Host:
    """A build for CPU tensors. schedule: in which order its threads and blocks take turns; results must be the same."""

    path: Path
    schedule: int = 0


@contextmanager
def host_build(host: Host) -> Iterator[None]:
    """Within it CPU tensors are served, by a library that `build_host` made."""
    global _host, _schedule
    before = _host, _schedule
    _host, _schedule = load(host.path), host.schedule
    try:
        yield
    finally:
        _host, _schedule = before


def has_host_build() -> bool:
    """Whether CPU tensors are served."""
    return _host is not None


def is_built() -> bool:
    """Whether the library for GPUs lies where it is built. It is not loaded for the answer."""
    return LIBRARY.exists()


def aligned(*tensors: Tensor) -> bool:
    """Whether the rows [D] of these [B, H, (S,) D] are whole words that begin where words begin, and are contiguous."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % ALIGNMENT == 0
        and all(size * x.element_size() % ALIGNMENT == 0 for size in (x.shape[-1], *x.stride()[:-1]))
        for x in tensors
    )


def call(name: str, device: torch.device, *arguments: object) -> None:
    """Run a function of the library on the current stream of the device; it returns an error number.

    Raises:
        RuntimeError: the error in words.
    """
    library = _library(device)
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        error = library.d2o_use_device(torch.cuda.current_device() if device.type == "cuda" else 0)
        error = error or getattr(library, name)(*arguments)
    if error:
        raise RuntimeError(f"{name}: {library.d2o_error_text(error).decode()} (error {error})")


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """The current stream of the device, as the library takes it."""
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)


def schedule() -> int:
    """The order in which a host build takes turns."""
    return _schedule


def workspace_bytes(device: torch.device, params: ctypes.Structure) -> int:
    """Bytes that an eviction needs besides its slots."""
    return _library(device).d2o_evict_workspace(ctypes.byref(params))


def max_victims(device: torch.device) -> int:
    """Most slots of a head that one eviction takes."""
    return _library(device).d2o_max_victims()


def _library(device: torch.device) -> ctypes.CDLL:
    if device.type == "cuda":
        return _for_gpus()
    assert _host is not None, "CPU tensors are served within host_build"
    return _host


@cache
def _for_gpus() -> ctypes.CDLL:
    if not is_built():
        raise ValueError(f"backend 'cuda' needs {LIBRARY.name}, which is not built: {BUILD}")
    return load(LIBRARY)


def load(path: Path) -> ctypes.CDLL:
    """A library of the version and the layout that this package speaks.

    Raises:
        ValueError: it is another.
    """
    library = ctypes.CDLL(str(path))
    found = library.d2o_abi_version()
    if found != ABI_VERSION:
        raise ValueError(f"{path} has version {found}, but this package speaks {ABI_VERSION}: build it again, {BUILD}")
    for number, kind in enumerate((EvictParams, AppendParams, ScoreParams)):
        size = library.d2o_struct_size(number)
        assert size == ctypes.sizeof(kind), f"{kind.__name__} has {ctypes.sizeof(kind)} bytes here and {size} in {path}"
    library.d2o_error_text.restype = ctypes.c_char_p
    library.d2o_evict_workspace.restype = ctypes.c_int64
    return library
