"""A decode step of KV heads that hold different numbers of slots, side by side in an arena: all of them at once.

Shape legend: B rows, Hq query heads, Hkv KV heads, D head dim, N slots of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.scored_decode import scored_decode_of_heads
from d2o_dist.kernels.segments import Segments
from d2o_dist.layout.heads import HeadLayout, step_statistics
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import Slots
from d2o_dist.slots.step import BlockStep


def segments_of(layouts: Sequence[HeadLayout]) -> Segments | None:
    """Where the slots of these heads lie, told to their device; None if they are not heads that lie as they are in an
    arena, seen by one layer."""
    if len(layouts) == 1 or not all(one.store.is_exact and one.layers == 1 for one in layouts):
        return None
    positions = layouts[0].store.buffers.positions
    return Segments.of([one.store.capacity for one in layouts], len(positions), positions.device)


def decode_heads(
    layouts: Sequence[HeadLayout], segments: Segments, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax,
    steps: Sequence[BlockStep], config: D2OConfig,
) -> Tensor:  # fmt: skip
    """As `HeadLayout.decode`, of all heads: [B, Hq, 1, D]."""
    stores = [one.store for one in layouts]
    names = ("keys", "values", "positions", "scores", "rates", "log_mass")
    buffers = Slots(*(_joined([getattr(store.buffers, name) for store in stores]) for name in names))
    out = scored_decode_of_heads(
        q[:, :, 0], buffers.keys, buffers.values, segments=segments, **softmax.logits, sinks=softmax.sinks,
        valid=_joined([one.live for one in steps]),
        log_mass=buffers.log_mass if config.merge.keeps_mass else None,
        widths=[one.widths for one in steps],
        new=(k[:, :, 0], v[:, :, 0]),
        # Tables of units have the rows of a head side by side.
        newest=_joined([one.slot for one in steps]).unflatten(0, (-1, len(q))).T,
        rate_window=config.statistics.rate_window,
        present=steps[0].present,
        total=layouts[0].ranks.total_of_replicas,
        **step_statistics(buffers, config),
    )  # fmt: skip
    return out.unsqueeze(2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [B, 1, C, ...] or [B, 1] that follow each other in one tensor -> their view [n, ...]."""
    first, end = parts[0], parts[0].storage_offset()
    trailing = first.shape[3:]
    for part in parts:
        assert part.is_contiguous() and part.storage_offset() == end
        end += part.numel()
    count = (end - first.storage_offset()) // max(trailing.numel(), 1)
    return torch.as_strided(first, (count, *trailing), (trailing.numel(), *(1 for _ in trailing)))
