"""A sliding-window layer under sequence ranks: its window is small, and every rank holds all of it.

A prompt's keys and values are gathered, one layer at a time; decode steps need no exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.cache.forward import DealtChunk
from d2o_dist.cache.rows import Rows
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.slots.slots import Slots


class ShardedWindowLayer(WindowLayer):
    """A layer that attends to its last `window` tokens, from queries that are spread over ranks."""

    def __init__(self, batch: int, window: int, ranks: RequestRanks) -> None:
        super().__init__(batch, window)
        self.ranks = ranks

    @classmethod
    def from_heads(cls, layer: WindowLayer, ranks: RequestRanks) -> ShardedWindowLayer:
        """From a layer of which this rank holds some heads: now it holds all."""
        made = cls(len(layer.store.kv_len), layer.window, ranks)
        slots = layer.store.slots
        wide = ranks.join_heads(torch.cat([slots.keys, slots.values], -1))
        keys, values = wide.split(slots.keys.shape[-1], -1)
        heads = keys.shape[1]
        rest = [tensor[:, :1].expand(-1, heads, -1).clone() for tensor in
                (slots.positions, slots.scores, slots.rates, slots.log_mass)]  # fmt: skip
        capacity = layer.window + made.SLACK
        made.store.replace(Slots(keys, values, *rest), layer.store.kv_len, capacity=capacity)
        return made

    def begin_prefill(self) -> None:
        """Nothing to settle: a window has no past but its slots."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: DealtChunk, num_seen: list[int]) -> Tensor:
        """Append a chunk of all ranks and attend from this rank's part: [B, Hq, n, D] -> the same, zeros at padding."""
        deal, start = chunk.deal, list(self.store.kv_len)
        everyone = self.ranks.sp.all_gather(torch.cat([k, v], -1), 2)
        index = deal.restore_index().to(q.device)[:, None, :, None].expand(-1, k.shape[1], -1, 2 * k.shape[3])
        keys, values = everyone.gather(2, index).split(k.shape[3], -1)
        rows = Rows.first(deal.counts)
        self.store.append(keys, values, rows, num_seen)
        slots = self.store.slots
        out = torch.zeros_like(q)
        for row, one in enumerate(deal.maps):
            group, at = slice(row, row + 1), deal.width - deal.local_counts()[row]
            for first, stop in one.segments(deal.rank):
                here = slice(at, at + stop - first)
                seen = start[row] + stop
                part, _ = prefill_attention(
                    q[group, :, here], slots.keys[group, :, :seen], slots.values[group, :, :seen], scale,
                    q_start=start[row] + first, window=self.window,
                )  # fmt: skip
                out[group, :, here] = part
                at = here.stop
        self._trim()
        return out
