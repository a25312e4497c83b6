"""A layer with a window that slides, or with chunks: it holds what it still sees, and is never compressed.

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
from d2o_dist.slots.windows import Chunked, Window, first_seen, kept, pieces, size_of


class WindowLayer:
    """A layer that attends to its last `window` tokens only, or to those of the running chunk. It holds them, and is
    never compressed.

    They are few: where ranks share the tokens of a prompt, every rank holds all of them, and gathers the keys and
    values of a chunk. Decode steps need no exchange.

    Attributes:
        store: the slots; a few more than a query sees between trims. The first one of a row begins a chunk, if there
            are any.
        window: what a query sees; most: slots between trims.
        is_looked_at: whether other layers attend to a chunk before it is trimmed (see `end_chunk`).
    """

    # Tokens that may pile up before the window is moved to the front of the buffers again.
    SLACK = 64

    def __init__(self, batch: int, window: Window, ranks: RequestRanks, *, is_looked_at: bool = False) -> None:
        self.store = SlotStore(batch)
        self.window, self.ranks = window, ranks
        self.most, self.is_looked_at = size_of(window) + self.SLACK, is_looked_at

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
        if not self.is_looked_at:
            self._trim()
        return out

    def look(self, q: Tensor, softmax: Softmax, chunk: Chunk, place: int) -> Tensor:
        """Attend from queries of another layer to what is held; see `Forward.look`."""
        slots, ends = self.store.slots, self.store.kv_len

        def attend(rows: slice, queries: Tensor) -> Tensor:
            row, skipped = rows.start, chunk.counts[rows.start] - queries.shape[2]
            blocks = () if chunk.blocks is None else chunk.blocks[row]
            return self._attend(queries, slots, rows, ends[row] - chunk.counts[row], softmax, blocks, skipped)

        alike = is_uniform(ends) and is_uniform(chunk.counts) and chunk.blocks is None
        return over_rows(chunk.rows.last(q.shape[2]), q, attend, slots.values.shape[3], alike=alike)

    def end_chunk(self) -> None:
        """All layers that look at a chunk have."""
        self._trim()

    def _attend(
        self, q: Tensor, slots: Slots, rows: slice, first: int, softmax: Softmax,
        blocks: Sequence[tuple[int, int]] = (), skipped: int = 0,
    ) -> Tensor:  # fmt: skip
        """From the queries of slots [first, first + n) of a group of rows, but the `skipped` first of them; blocks: see
        `Chunk`."""
        here = slice(0, first + skipped + q.shape[2])
        keys, values = slots.keys[rows, :, here], slots.values[rows, :, here]
        if not blocks:
            return self._over_keys(q, keys, values, softmax, first + skipped)
        assert not isinstance(self.window, Chunked)
        key = torch.arange(here.stop, device=q.device)
        query = key[first:, None]
        visible = key <= query
        for start, stop in blocks:
            visible[start:stop, first + start : first + stop] = True
        visible &= key > query - self.window
        return dense_attention(q, keys, values, visible[skipped:], softmax)

    def _over_keys(self, q: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, q_start: int) -> Tensor:
        outs, slides = [], None if isinstance(self.window, Chunked) else self.window
        for start, first, stop in pieces(self.window, q_start, q_start + q.shape[2]):
            out, lse = prefill_attention(
                q[:, :, first - q_start : stop - q_start], keys[:, :, start:stop], values[:, :, start:stop],
                **softmax.logits, q_start=first - start, window=slides,
            )  # fmt: skip
            outs.append(with_sinks(out, lse, softmax.sinks)[0])
        return torch.cat(outs, 2) if len(outs) > 1 else outs[0]

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
        self.store.replace(Slots(keys, values, *rest), self.store.kv_len, capacity=self.most)

    def make_room(self) -> None:
        """Before a decode step: room for one token, and for some more while the buffers are short of the window's."""
        needed = max(self.kv_len) + 1
        self.store.reserve(needed, slack=max(0, min(GROWTH, self.most - needed)))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, step: BlockStep) -> Tensor:
        """Store one token a row and attend over what it sees: [B, Hq, 1, D]. As `Layer.decode`."""
        self.store.put(k, v, step.slot, step.position)
        return self.look_in_step(q, softmax, 0, step)

    def look_in_step(self, q: Tensor, softmax: Softmax, place: int, step: BlockStep) -> Tensor:
        """Attend from queries of a step whose tokens were stored, of this layer or another."""
        buffers, capacity = self.store.buffers, self.store.capacity
        valid = step.live & (step.columns[:capacity] >= first_seen(self.window, step.stop - 1)[:, None])
        out = scored_decode(
            q[:, :, 0], buffers.keys, buffers.values, **softmax.logits, sinks=softmax.sinks,
            valid=valid, newest=step.slot, present=step.present, widths=step.widths,
        )  # fmt: skip
        return out.unsqueeze(2)

    widths = property(lambda self: self.store.widths, doc="As of a `HeadBlock`.")

    def advance(self, counts: list[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved, to the front of the buffers."""
        self.store.advance(counts)
        due = max(self.kv_len) >= self.most
        if due:
            self._trim(self.most)
        return due

    def _trim(self, most: int = 0) -> None:
        """Keep what the next query sees beside itself, of each row of `most` slots or more.

        So where the slots of a row lie does not depend on others.
        """
        left = [kept(self.window, count) if count >= most else count for count in self.store.kv_len]
        if left == self.store.kv_len:
            return
        slots = self.store.slots
        device = slots.positions.device
        width = max(left)
        slot = torch.arange(width, device=device)
        first = torch.tensor([n - m for n, m in zip(self.store.kv_len, left, strict=True)], device=device)
        valid = slot < torch.tensor(left, device=device)[:, None, None]
        index = ((first[:, None, None] + slot) * valid).expand(-1, slots.positions.shape[1], -1)
        capacity = None if self.store.capacity == self.most else self.most
        self.store.replace(slots.take(index, valid), left, capacity)

    def join(self, other: WindowLayer) -> None:
        """Hold the rows of the same layer of another cache too."""
        self.store.join(other.store)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.store.select_rows(index)
