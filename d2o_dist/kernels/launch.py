"""What all Triton kernels share: how they are launched, and sizes that kernels want. Imports no Triton itself.

A kernel's file is imported only when the kernel is needed. Under TRITON_INTERPRET=1 kernels run on CPU tensors, with
the same block sizes; there bfloat16 has no arithmetic, so kernels take UPCAST, which widens what they load.
"""

import contextlib
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Compute capability that kernels are planned for where the tensors lie on no GPU: interpreted, or on the meta device.
assumed_capability = 90


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: rows and columns of a block, warps of a program, stages of its pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int


def launch(kernel, grid: tuple[int, ...], *args, tile: Tile, **constants) -> None:
    """Run `kernel[grid](*args)` on the device of its first argument. A grid without programs is nothing to do."""
    if 0 in grid:
        return
    device = args[0].device
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current:
        kernel[grid](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def matmul_constants(dtype: torch.dtype) -> dict[str, object]:
    """UPCAST and PRECISION. float32 is multiplied as float32: scores must not depend on TF32's ten bits."""
    return {"UPCAST": is_interpreted() and dtype != torch.float32, "PRECISION": "ieee"}


def padded_dim(head_dim: int) -> int:
    """The head dim of a block: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself if its last dim is contiguous (whatever the others are), else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def capability(device: torch.device) -> int:
    """Compute capability of the device, 80 for 8.0."""
    return _capability_of_gpu(device) if device.type == "cuda" else assumed_capability


@cache
def _capability_of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; for interpreted kernels, few, so that few programs are run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
