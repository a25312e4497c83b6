"""A layer with a sliding window: it holds the window's tokens, and is never compressed.

Shape legend: B rows, Hq query heads, n tokens of a chunk, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.attention.dense import dense_attention
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.lse import with_sinks
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.kernels.scored_decode import scored_decode
from d2o_dist.layout.forward import Chunk, DealtChunk, over_rows
from d2o_dist.slots.rows import Rows, is_uniform
from d2o_dist.slots.slots import Slots
from d2o_dist.slots.step import BlockStep, Held
from d2o_dist.slots.store import GROWTH, SlotStore


class WindowLayer:
    """A layer that attends to its last `window` tokens only. It holds them, and is never compressed.

    A window is small: where ranks share the tokens of a prompt, every rank holds all of it, and gathers the keys and
    values of a chunk. Decode steps need no exchange.

    Attributes:
        store: the slots; a few more than the window between trims.
        window: tokens a query sees, itself included.
    """

    # Tokens that may pile up before the window is moved to the front of the buffers again.
    SLACK = 64

    def __init__(self, batch: int, window: int, ranks: RequestRanks) -> None:
        self.store = SlotStore(batch)
        self.window, self.ranks = window, ranks

    kv_len = property(lambda self: self.store.kv_len, doc="Slots of each row, of each of its heads.")
    mean_kv_len = property(lambda self: self.store.kv_len, doc="The same: all heads hold as many.")
    shape = property(lambda self: self.store.shape, doc="(Hkv, D) of this rank; None before the first token.")
    dtype = property(lambda self: self.store.dtype, doc="Of keys and values; None before the first token.")
    token_bytes = property(lambda self: self.store.slot_bytes, doc="Of the key and the value of one token in a head.")
    slot_bytes = property(lambda self: self.store.slot_bytes, doc="Of the key and the value of one slot of a head.")
    slots = property(lambda self: self.store.slots, doc="What is held, [B, Hkv, S, ...]; None before the first token.")
    num_allocated_bytes = property(lambda self: self.store.num_allocated_bytes, doc="Bytes of all buffers here.")

    @property
    def blocks(self) -> list[WindowLayer]:
        """Itself: all of its heads hold the same."""
        return [self]

    @property
    def held(self) -> Held:
        """As a decode step takes it."""
        return Held(self.store.buffers, False, self.store.kv_len)

    def begin_prefill(self, expected: int) -> None:
        """Nothing to settle: a window has no past but its slots."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, chunk: Chunk | DealtChunk) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        if isinstance(chunk, DealtChunk):
            self.store.append(*self._gather(k, v, chunk), Rows.first(chunk.counts), chunk.num_seen)
            out = self._attend_dealt(q, softmax, chunk, start)
        else:
            self.store.append(k, v, chunk.rows, chunk.num_seen)
            slots = self.store.slots

            def attend(rows: slice, queries: Tensor) -> Tensor:
                blocks = () if chunk.blocks is None else chunk.blocks[rows.start]
                return self._attend(queries, slots, rows, start[rows.start], softmax, blocks)

            alike = is_uniform(start) and chunk.blocks is None
            out = over_rows(chunk.rows, q, attend, v.shape[3], alike=alike)
        self._trim()
        return out

    def _attend(
        self, q: Tensor, slots: Slots, rows: slice, first: int, softmax: Softmax,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> Tensor:  # fmt: skip
        """From the queries of slots [first, first + n) of a group of rows; blocks: see `Chunk`."""
        here = slice(0, first + q.shape[2])
        keys, values = slots.keys[rows, :, here], slots.values[rows, :, here]
        if not blocks:
            return self._over_keys(q, keys, values, softmax, first)
        key = torch.arange(here.stop, device=q.device)
        query = key[first:, None]
        visible = key <= query
        for start, stop in blocks:
            visible[start:stop, first + start : first + stop] = True
        visible &= key > query - self.window
        return dense_attention(q, keys, values, visible, softmax)

    def _over_keys(self, q: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, q_start: int) -> Tensor:
        out, lse = prefill_attention(q, keys, values, **softmax.logits, q_start=q_start, window=self.window)
        return with_sinks(out, lse, softmax.sinks)[0]

    def _gather(self, k: Tensor, v: Tensor, chunk: DealtChunk) -> list[Tensor]:
        """Keys and values of all ranks' part of a chunk, [B, Hkv, T, D] by token. One collective."""
        everyone = self.ranks.sp.all_gather(torch.cat([k, v], -1), 2)
        index = chunk.deal.restore_index().to(k.device)[:, None, :, None].expand(-1, k.shape[1], -1, everyone.shape[3])
        return list(everyone.gather(2, index).tensor_split([k.shape[3]], -1))

    def _attend_dealt(self, q: Tensor, softmax: Softmax, chunk: DealtChunk, start: list[int]) -> Tensor:
        slots = self.store.slots
        out = q.new_zeros(*q.shape[:3], slots.values.shape[-1])
        for row, one in enumerate(chunk.deal.maps):
            group, at = slice(row, row + 1), chunk.columns(row).start
            for first, stop in one.segments(chunk.deal.rank):
                here = slice(at, at + stop - first)
                out[group, :, here] = self._attend(q[group, :, here], slots, group, start[row] + first, softmax)
                at = here.stop
        return out

    def reread(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept; [B, Hq, n, D] -> the same shape, zeros at padding."""
        slots, held = self.store.slots, self.store.kv_len

        def attend(group: slice, queries: Tensor) -> Tensor:
            row = group.start
            both = [
                torch.cat([old[group, :, : held[row]], rows.pick(new, row)], 2)
                for old, new in ((slots.keys, k), (slots.values, v))
            ]
            return self._over_keys(queries, *both, softmax, held[row])

        return over_rows(rows, q, attend, v.shape[3], alike=rows.batch == 1)

    def spread(self, num_seen: Sequence[int]) -> None:
        """Hold all heads of the tensor rank, after a prompt whose slots were held by heads."""
        slots = self.store.slots
        wide = self.ranks.join_heads(torch.cat([slots.keys, slots.values], -1))
        keys, values = wide.tensor_split([slots.keys.shape[-1]], -1)
        rest = [tensor[:, :1].expand(-1, keys.shape[1], -1).clone()
                for tensor in (slots.positions, slots.scores, slots.rates, slots.log_mass)]  # fmt: skip
        self.store.replace(Slots(keys, values, *rest), self.store.kv_len, capacity=self.window + self.SLACK)

    def make_room(self) -> None:
        """Before a decode step: room for one token, and for some more while the buffers are short of the window's."""
        needed, most = max(self.kv_len) + 1, self.window + self.SLACK
        self.store.reserve(needed, slack=max(0, min(GROWTH, most - needed)))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, step: BlockStep) -> Tensor:
        """Store one token a row and attend over the window: [B, Hq, 1, D]. As `Layer.decode`."""
        buffers, capacity = self.store.buffers, self.store.capacity
        self.store.put(k, v, step.slot, step.position)
        valid = step.live & (step.columns[:capacity] >= (step.stop - self.window)[:, None])
        out = scored_decode(
            q[:, :, 0], buffers.keys, buffers.values, **softmax.logits, sinks=softmax.sinks,
            valid=valid, newest=step.slot, present=step.present, widths=step.widths,
        )  # fmt: skip
        return out.unsqueeze(2)

    widths = property(lambda self: self.store.widths, doc="As of a `HeadBlock`.")

    def advance(self, counts: list[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved, to the front of the buffers."""
        self.store.advance(counts)
        due = max(self.kv_len) >= self.window + self.SLACK
        if due:
            self._trim(self.window + self.SLACK)
        return due

    def _trim(self, most: int = 0) -> None:
        """Keep the last `window - 1` tokens of each row of `most` or more: what the next query sees beside itself.

        So where the slots of a row lie does not depend on others.
        """
        kept = [min(count, self.window - 1) if count >= most else count for count in self.store.kv_len]
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

    def join(self, other: WindowLayer) -> None:
        """Hold the rows of the same layer of another cache too."""
        self.store.join(other.store)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.store.select_rows(index)
