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
from d2o_dist.core.compress import EvictionSteps, count_dropped, judge
from d2o_dist.core.threshold import head_reports
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
from d2o_dist.kernels.cuda.params import CHOICES, EvictParams, Strided, unserved_rule

_FIND, _APPLY = 1, 2
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
        ValueError: a row evicts more slots at once than the kernel has room for, or holds more than the buffers; a rule
            that it does not know (`params.CHOICES`).
    """
    if rows.most_victims == 0:
        return state
    batch, device = len(rows.held), slots.keys.device
    before = state.map(lambda x: x.contiguous())
    threshold = torch.empty(batch, dtype=torch.float32, device=device)
    merged, dropped = torch.empty(2, batch, dtype=torch.int64, device=device)
    one = _Eviction(slots, rows, config, num_parts)
    one.launch(
        _FIND | _APPLY,
        threshold_before=before.threshold,
        threshold=threshold,
        merged_before=before.num_merged,
        dropped_before=before.num_dropped,
        merged=merged,
        dropped=dropped,
    )
    return D2OState(state.threshold if config.merge == "none" else threshold, merged, dropped)


@torch.no_grad()
def cuda_evict_over_ranks(
    slots: Slots, rows: EvictionRows, state: D2OState, config: D2OConfig, *, num_parts: int | None = None
) -> EvictionSteps:
    """`cuda_evict` for some KV heads of a layer, the others on other ranks: `core.eviction_steps`, in place.

    Two launches; between them it yields the reports [B, h, X] of the heads at hand and is sent those of all. Returns
    `slots` and the state.
    """
    one = _Eviction(slots, rows, config, num_parts)
    device, victims = slots.keys.device, rows.most_victims
    evicted = (one.table[:, 0] - one.table[:, 1] - one.table[:, 2]).clamp_min(0)
    valid = (torch.arange(victims, device=device) < evicted[:, None])[:, None]
    if config.merge == "none":
        one.launch(_FIND | _APPLY, gated=torch.zeros(one.shape, dtype=torch.bool, device=device))
        return slots, count_dropped(valid, slots.keys.shape[1], state)
    one.launch(_FIND)
    similarity = one.similarity().masked_fill(~valid, 0)
    reports = yield head_reports(similarity, valid.expand_as(similarity), config)
    merged, state = judge(similarity, valid, reports, state, config)
    one.launch(_APPLY, gated=merged.contiguous())
    return slots, state


class _Eviction:
    """One eviction of the heads at hand: what both halves of it are told, and the memory that they share."""

    def __init__(self, slots: Slots, rows: EvictionRows, config: D2OConfig, num_parts: int | None) -> None:
        batch, heads, capacity, head_dim = slots.keys.shape
        self.device = device = slots.keys.device
        most_held, victims = max(rows.held), rows.most_victims
        if most_held > capacity:
            raise ValueError(f"a row holds {most_held} slots, but the buffers have {capacity}")
        if victims > (limit := max_victims(device)):
            raise ValueError(
                f"an eviction of {victims} slots a head (eviction_interval) exceeds the {limit} of backend 'cuda'"
            )
        if (rule := unserved_rule(config)) is not None:
            raise ValueError(f"{rule} is a rule that evictions of backend 'cuda' do not know: use another backend")
        chosen = {name: known.index(getattr(config, name)) for name, known in CHOICES.items()}
        assert serves_eviction(slots) and len(rows.held) == batch and victims > 0
        self.shape = (batch, heads, victims)
        self.table = rows.to(device)
        self.params = params = EvictParams(
            *(Strided.of(getattr(slots, name)) for name in ("keys", "values", *_STATISTICS)),
            rows=self.table.data_ptr(),
            tail_fraction=config.tail_fraction,
            drop_quantile=config.drop_quantile,
            ema_beta=config.ema_beta,
            ema_rest=1 - config.ema_beta,
            max_log_mass=config.max_log_mass,
            self_weight=config.self_weight,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            item_size=slots.keys.element_size(),
            dtype=DTYPES.index(slots.keys.dtype),
            most_held=most_held,
            most_victims=victims,
            num_parts=1,
            selection=chosen["selection"],
            merge=chosen["merge"],
            tail_targets=chosen["merge_targets"],
            max_tail=most_held if config.max_decode_tail is None else min(most_held, config.max_decode_tail),
            by_quantile=chosen["gate"],
            threshold_by_max=chosen["threshold_agg"],
            num_sinks=config.num_sink_tokens,
            schedule=schedule(),
        )
        if num_parts is None:
            parts = ctypes.c_int()
            call("d2o_evict_parts", device, ctypes.byref(params), ctypes.byref(parts))
            num_parts = parts.value
        params.num_parts = num_parts
        # Freed with the last reference, but in stream order: nothing gets this memory before the kernel is done.
        self.workspace = torch.empty(workspace_bytes(device, params), dtype=torch.uint8, device=device)

    def launch(self, halves: int, **tensors: Tensor | None) -> None:
        """Run one half or both, with what only they read or write."""
        self.params.halves = halves
        for name, tensor in tensors.items():
            setattr(self.params, name, None if tensor is None else tensor.data_ptr())
        workspace = ctypes.c_void_p(self.workspace.data_ptr())
        call("d2o_evict", self.device, ctypes.byref(self.params), workspace, stream_of(self.device))

    def similarity(self) -> Tensor:
        """[B, h, E] float32 cosines to the nearest target, -inf without one; after the first half.

        The workspace begins with int64 [B, h, E, P], one number a part: a cosine as an unsigned integer of the same
        order (`orderable` in order.cuh), above the slot; 0 where there is no target.
        """
        count = self.params.num_parts * self.shape[0] * self.shape[1] * self.shape[2]
        packed = self.workspace[: 8 * count].view(torch.int64).view(*self.shape, self.params.num_parts)
        lowest = torch.iinfo(torch.int64).min
        top = (packed ^ lowest).amax(-1) ^ lowest
        key = (top >> 32).to(torch.int32)
        bits = torch.where(key < 0, key & 0x7FFFFFFF, ~key)
        return bits.view(torch.float32).masked_fill(top == 0, -torch.inf)
