"""One token a row into its slot, in one launch: key, value, position, and statistics of 0.

Shape legend: B rows, H KV heads, C slots of the buffers, D head dim.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from d2o_dist.kernels.cuda.library import DTYPES, call, schedule, stream_of
from d2o_dist.kernels.cuda.params import AppendParams, Strided
from d2o_dist.slots.slots import Slots


@torch.no_grad()
def cuda_append(slots: Slots, keys: Tensor, values: Tensor, index: Tensor, seen: Tensor | None) -> None:
    """In place: row b's slot index[b] gets the token. Nothing is read back, and no shape depends on the indices.

    Args:
        slots: [B, H, C, ...] buffers; float32, bfloat16 or float16, their last dim contiguous.
        keys, values: [B, H, D], in the dtype of the buffers.
        index: [B, H] int64 slot of the token; outside [0, C) the head gets nothing. seen: [B] int64 its position; None:
            positions are written already.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    batch, heads, capacity, head_dim = slots.keys.shape
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != (batch, heads, head_dim) or x.dtype != slots.keys.dtype:
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} must be a row of {tuple(slots.keys.shape)} "
                             f"{slots.keys.dtype}")  # fmt: skip
    for name, x, shape in (("index", index, (batch, heads)), ("seen", seen, (batch,))):
        if x is not None and (x.shape != shape or x.dtype != torch.int64):
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} must be int64 of shape {shape}")
    device = slots.keys.device
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    index, seen = index.contiguous(), None if seen is None else seen.contiguous()
    statistics = ("positions", "scores", "rates", "log_mass")
    params = AppendParams(
        *(Strided.of(getattr(slots, name)) for name in ("keys", "values", *statistics)),
        Strided.of(keys),
        Strided.of(values),
        index=index.data_ptr(),
        seen=None if seen is None else seen.data_ptr(),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        capacity=capacity,
        dtype=DTYPES.index(slots.keys.dtype),
        schedule=schedule(),
    )
    call("d2o_append", device, ctypes.byref(params), stream_of(device))
