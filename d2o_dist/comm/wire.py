"""Tensors as collectives take them: flat, contiguous, without autograd, in a dtype that the backend knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What gloo and NCCL both carry. Everything else (bool, fp8, int16, complex) travels as bytes.
_NATIVE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64}
)


def to_wire(tensor: Tensor) -> Tensor:
    """[numel], or [numel x itemsize] uint8; a copy only where the tensor is not contiguous."""
    flat = tensor.detach().contiguous()
    # Not view(-1): one element, or none, may keep a stride other than 1: contiguous, but no view as bytes.
    flat = flat.as_strided((flat.numel(),), (1,))
    return flat if tensor.dtype in _NATIVE else flat.view(torch.uint8)


def wire_empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised wire buffer for a tensor of `shape` in the dtype and on the device of `like`."""
    count, native = _numel(shape), like.dtype in _NATIVE
    dtype = like.dtype if native else torch.uint8
    return torch.empty(count if native else count * like.element_size(), dtype=dtype, device=like.device)


def from_wire(wire: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that a wire buffer holds; a view where alignment allows."""
    if wire.dtype != dtype:
        # A slice of a longer buffer may begin at an odd byte: a wider dtype cannot be viewed there.
        aligned = wire.storage_offset() % dtype.itemsize == 0
        wire = (wire if aligned else wire.clone()).view(dtype)
    return wire.view(tuple(shape))


def check_reducible(dtype: torch.dtype, op: str) -> None:
    """Raises TypeError for bool sums and for dtypes that no backend reduces (fp8, int16): cast first."""
    if dtype not in _NATIVE and not (dtype == torch.bool and op in ("max", "min")):
        raise TypeError(f"cannot reduce {dtype} with {op}: cast it first, for example to float32 or int64")


def reducible(tensor: Tensor) -> Tensor:
    """A contiguous copy to reduce in place; bool as uint8, so that max is any and min is all."""
    dtype = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype to add terms of `dtype` in: float32 for 16 bits, else the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
