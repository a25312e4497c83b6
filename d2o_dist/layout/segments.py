"""A decode step of KV heads that hold different numbers of slots, side by side in an arena: all of them at once.

Shape legend: B rows, Hq query heads, Hkv KV heads, D head dim, N slots of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.scored_decode import scored_decode_of_heads
from d2o_dist.kernels.segments import Segments
from d2o_dist.layout.heads import HeadLayout, step_statistics, step_update
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import Slots
from d2o_dist.slots.step import BlockStep


class HeadSegments:
    """The heads of one layer. It holds tables only, since slots move to other arenas: `prepare` makes them anew."""

    def __init__(self) -> None:
        self._segments: Segments | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: tables are made again before their first step."""
        return {"_segments": None}

    def prepare(self, layouts: Sequence[HeadLayout]) -> None:
        """Before the first step over slots that moved: tell the device where they lie."""
        if self.serves(layouts):
            positions = layouts[0].store.buffers.positions
            lengths = [one.store.capacity for one in layouts]
            self._segments = Segments.of(lengths, len(positions), positions.device)

    @staticmethod
    def serves(layouts: Sequence[HeadLayout]) -> bool:
        """Whether these are heads that lie as they are in an arena, seen by one layer."""
        return len(layouts) > 1 and all(one.store.is_exact and one.layers == 1 for one in layouts)

    def decode(
        self, layouts: Sequence[HeadLayout], q: Tensor, k: Tensor, v: Tensor, softmax: Softmax,
        steps: Sequence[BlockStep], config: D2OConfig,
    ) -> Tensor:  # fmt: skip
        """As `HeadLayout.decode`, of all heads: [B, Hq, 1, D]."""
        stores, batch = [one.store for one in layouts], len(q)
        names = ("keys", "values", "positions", "scores", "rates", "log_mass")
        buffers = Slots(*(_joined([getattr(store.buffers, name) for store in stores]) for name in names))
        # Tables of units have the rows of a head side by side.
        step = BlockStep(
            position=_joined([one.position for one in steps]).unflatten(0, (-1, batch)).T,
            slot=_joined([one.slot for one in steps]).unflatten(0, (-1, batch)).T,
            live=_joined([one.live for one in steps]),
            stop=None, present=steps[0].present, columns=steps[0].columns, widths=None,
        )  # fmt: skip
        out = scored_decode_of_heads(
            q[:, :, 0], buffers.keys, buffers.values, segments=self._segments, **softmax.logits, sinks=softmax.sinks,
            valid=step.live,
            log_mass=buffers.log_mass if config.merge.keeps_mass else None,
            widths=[one.widths for one in steps],
            new=(k[:, :, 0], v[:, :, 0]),
            total=layouts[0].ranks.total_of_replicas,
            **step_statistics(buffers, config), **step_update(step, config),
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
