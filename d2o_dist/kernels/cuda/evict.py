"""One eviction of one layer while decoding, in place and in one launch: select, nearest, threshold, gate, merge, close.

Shape legend: B rows, H KV heads (all of the layer), C slots of the buffers, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.types import D2OState, Slots
from d2o_dist.kernels.cuda.library import (
    DTYPES,
    aligned,
    call,
    max_victims,
    schedule,
    stream_of,
    workspace_bytes,
)
from d2o_dist.kernels.cuda.params import MERGES, SELECTIONS, EvictParams, Strided

_STATISTICS = ("positions", "scores", "rates", "log_mass")


@dataclass(frozen=True)
class EvictionRows:
    """What each of B rows holds and may keep; it lies on the host, since it follows from lengths alone.

    Attributes:
        held: slots in use; heavy, recent: what is kept of them (a row that is not due: all of them, and 0).
        seen: tokens seen.
    """

    held: Sequence[int]
    heavy: Sequence[int]
    recent: Sequence[int]
    seen: Sequence[int]

    def to(self, device: torch.device) -> Tensor:
        """[B, 4] int64."""
        return torch.tensor(list(zip(self.held, self.heavy, self.recent, self.seen, strict=True)), device=device)

    @property
    def most_victims(self) -> int:
        """Slots of a head that the row evicts which evicts most."""
        return max(max(0, h - x - y) for h, x, y in zip(self.held, self.heavy, self.recent, strict=True))


def serves_eviction(slots: Slots) -> bool:
    """Whether the kernel takes these buffers: dtype, and rows of whole 16-byte words."""
    flat = all(getattr(slots, name).stride(2) == 1 for name in _STATISTICS)
    return slots.keys.dtype in DTYPES and flat and aligned(slots.keys, slots.values)


@torch.no_grad()
def cuda_evict(
    slots: Slots, rows: EvictionRows, state: D2OState, config: D2OConfig, *, num_parts: int | None = None
) -> D2OState:
    """As `core.compress_layer(finalize=False)`, but in place: afterwards row b's slots are [0, kept), in order.

    Slots that are freed get position -1 and statistics 0; their keys and values stay.

    Args:
        slots: [B, H, C, ...], each row's in [0, held) by ascending position; all KV heads of the layer.
        rows: what they hold and keep.
        state: `D2OState()` before the first eviction. It is not changed.
        num_parts: blocks that share a head; by default as many as the device runs at once. No result depends on it.

    Returns:
        The state after it, as `core` has it.

    Raises:
        ValueError: a row evicts more slots at once than the kernel has room for, or holds more than the buffers.
    """
    batch, heads, capacity, head_dim = slots.keys.shape
    device = slots.keys.device
    most_held, victims = max(rows.held), rows.most_victims
    if most_held > capacity:
        raise ValueError(f"a row holds {most_held} slots, but the buffers have {capacity}")
    if victims > (limit := max_victims(device)):
        raise ValueError(
            f"an eviction of {victims} slots a head (eviction_interval) exceeds the {limit} of backend 'cuda'"
        )
    assert serves_eviction(slots) and len(rows.held) == batch
    if victims == 0:
        return state
    before = state.map(lambda x: x.contiguous())
    threshold = torch.empty(batch, dtype=torch.float32, device=device)
    merged, dropped = torch.empty(2, batch, dtype=torch.int64, device=device)
    table = rows.to(device)
    params = EvictParams(
        *(Strided.of(getattr(slots, name)) for name in ("keys", "values", *_STATISTICS)),
        rows=table.data_ptr(),
        threshold_before=_pointer(before.threshold),
        threshold=threshold.data_ptr(),
        merged_before=_pointer(before.num_merged),
        dropped_before=_pointer(before.num_dropped),
        merged=merged.data_ptr(),
        dropped=dropped.data_ptr(),
        tail_fraction=config.tail_fraction,
        drop_quantile=config.drop_quantile,
        ema_beta=config.ema_beta,
        ema_rest=1 - config.ema_beta,
        max_log_mass=config.max_log_mass,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        item_size=slots.keys.element_size(),
        dtype=DTYPES.index(slots.keys.dtype),
        most_held=most_held,
        most_victims=victims,
        num_parts=1,
        selection=SELECTIONS.index(config.selection),
        merge=MERGES.index(config.merge),
        tail_targets=config.merge_targets == "tail",
        by_quantile=config.gate == "quantile",
        threshold_by_max=config.threshold_agg == "max",
        num_sinks=config.num_sink_tokens,
        schedule=schedule(),
    )
    if num_parts is None:
        parts = ctypes.c_int()
        call("d2o_evict_parts", device, ctypes.byref(params), ctypes.byref(parts))
        num_parts = parts.value
    params.num_parts = num_parts
    # In stream order: the allocator gives this memory to nothing that runs before the kernel is done.
    workspace = torch.empty(workspace_bytes(device, params), dtype=torch.uint8, device=device)
    call("d2o_evict", device, ctypes.byref(params), ctypes.c_void_p(workspace.data_ptr()), stream_of(device))
    return D2OState(state.threshold if config.merge == "none" else threshold, merged, dropped)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
