"""A layer with a sliding window: it holds the window's tokens, and is never compressed.

Shape legend: B rows, Hq query heads, n tokens of a chunk, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.cache.rows import Rows, is_uniform
from d2o_dist.cache.step import LayerStep
from d2o_dist.cache.store import GROWTH, SlotStore
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.kernels.scored_decode import scored_decode


class WindowLayer:
    """A layer that attends to its last `window` tokens only. It holds them, and is never compressed.

    Attributes:
        store: the slots; a few more than the window between trims.
        window: tokens a query sees, itself included.
    """

    # Tokens that may pile up before the window is moved to the front of the buffers again.
    SLACK = 64

    def __init__(self, batch: int, window: int) -> None:
        self.store = SlotStore(batch)
        self.window = window

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row, of each of its heads."""
        return self.store.kv_len

    @property
    def mean_kv_len(self) -> list[int]:
        """Slots of each row, mean over its heads."""
        return self.store.kv_len

    @property
    def units(self) -> list[WindowLayer]:
        """Itself: all of its heads hold the same."""
        return [self]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        self.store.append(k, v, rows, num_seen)
        slots = self.store.slots
        out = torch.zeros_like(q)
        uniform = rows.index is None and is_uniform(start)
        for row in range(1 if uniform else rows.batch):
            if not rows.counts[row]:
                continue
            group = slice(None) if uniform else slice(row, row + 1)
            here = slice(0, start[row] + rows.counts[row])
            queries = q if uniform else rows.pick(q, row)
            part, _ = prefill_attention(
                queries, slots.keys[group, :, here], slots.values[group, :, here], scale,
                q_start=start[row], window=self.window,
            )  # fmt: skip
            if uniform:
                out = part
            else:
                rows.put(out, row, part)
        self._trim()
        return out

    def reread(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept; [B, Hq, n, D] -> the same shape, zeros at padding."""
        slots, held = self.store.slots, self.store.kv_len
        out = torch.zeros_like(q)
        for row in range(rows.batch):
            if rows.counts[row]:
                q_row, k_row, v_row = (rows.pick(tensor, row) for tensor in (q, k, v))
                keys = torch.cat([slots.keys[row : row + 1, :, : held[row]], k_row], 2)
                values = torch.cat([slots.values[row : row + 1, :, : held[row]], v_row], 2)
                part, _ = prefill_attention(q_row, keys, values, scale, q_start=held[row], window=self.window)
                rows.put(out, row, part)
        return out

    def make_room(self) -> None:
        """Before a decode step: room for one token, and for some more while the buffers are short of the window's."""
        needed, most = max(self.kv_len) + 1, self.window + self.SLACK
        self.store.reserve(needed, slack=max(0, min(GROWTH, most - needed)))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: LayerStep) -> Tensor:
        """Store one token a row and attend over the window: [B, Hq, 1, D]. As `FullLayer.decode`."""
        buffers, capacity = self.store.buffers, self.store.capacity
        self.store.put(k, v, step.slot, step.position)
        valid = step.live & (step.columns[:capacity] >= (step.stop - self.window)[:, None])
        out = scored_decode(
            q[:, :, 0], buffers.keys, buffers.values, scale, valid=valid, newest=step.slot, present=step.present
        )
        return out.unsqueeze(2)

    def advance(self, counts: list[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved, to the front of the buffers."""
        self.store.advance(counts)
        due = max(self.kv_len) >= self.window + self.SLACK
        if due:
            self._trim()
        return due

    def _trim(self) -> None:
        """Keep the last `window - 1` tokens of each row: what the next query sees beside itself."""
        kept = [min(count, self.window - 1) for count in self.store.kv_len]
        if kept == self.store.kv_len:
            return
        slots = self.store.slots
        device = slots.positions.device
        width = max(kept)
        slot = torch.arange(width, device=device)
        first = torch.tensor([n - m for n, m in zip(self.store.kv_len, kept, strict=True)], device=device)
        valid = slot < torch.tensor(kept, device=device)[:, None, None]
        index = ((first[:, None, None] + slot) * valid).expand(-1, slots.positions.shape[1], -1)
        capacity = self.window + self.SLACK
        self.store.replace(slots.take(index, valid), kept, None if self.store.capacity == capacity else capacity)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.store.select_rows(index)
