"""The slots of one layer in buffers with room to grow. It stores; it does not decide.

Shape legend: B rows, Hkv key/value heads, C capacity, S = max(kv_len) slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.slots.append import write_tokens
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.rows import Rows
from d2o_dist.slots.slots import Slots, join_values, part_values, stats_dtype, unused_slots

# Slots added at once when a layer that is never evicted outgrows its buffer while decoding.
GROWTH = 256


class SlotStore:
    """Slots of all rows, each row's in `[0, kv_len[row])` by ascending position; or, in an arena, anywhere.

    What is free has position -1, statistics 0, keys and values that are finite (zeros, or what lay there before).

    Attributes:
        kv_len: slots in use by each row (by each of its heads). On the host: it follows from lengths alone.
        codec: how keys and values are stored in the arena that the buffers are a block of, in which slots are a set;
            None: they lie in no arena, and as they are.
        expected: slots of the fullest row when the running prompt is read, if that is known; else 0.
        latent: elements of a key, the first ones, that are its value too, which then has no buffer; None: none are.
    """

    def __init__(self, batch: int, latent: int | None = None) -> None:
        self.kv_len: list[int] = [0] * batch
        self.latent = latent
        self._buffers: Slots | None = None
        self.codec: Codec | None = None
        self.expected = 0
        # Of each row's segment, in an arena.
        self._room: list[int] = []

    @classmethod
    def of(cls, slots: Slots, kv_len: list[int], latent: int | None = None) -> SlotStore:
        """A store of these slots, in order of position; their tensors become its buffers, without a copy."""
        store = cls(len(kv_len), latent)
        store._buffers, store.kv_len = join_values(slots, latent), list(kv_len)
        return store

    def hold(self, slots: Slots, kv_len: Sequence[int]) -> None:
        """Hold these slots instead; their tensors become the buffers, without a copy where nothing else is held with
        them."""
        self._buffers = join_values(slots, self.latent).map(_alone)
        self.kv_len, self.codec = list(kv_len), None
        self.expected = 0

    @property
    def in_arena(self) -> bool:
        """Whether the buffers are a block of an arena."""
        return self.codec is not None

    @property
    def is_exact(self) -> bool:
        """Whether the buffers are a block of an arena, and hold keys and values as they are."""
        return self.in_arena and self.codec.format.is_exact and self.latent is None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(Hkv, D of keys); None before the first token."""
        if self._buffers is None:
            return None
        heads, _, dim = self._buffers.keys.shape[1:]
        return heads, dim if self.codec is None else self.codec.head_dims[0]

    @property
    def token_size(self) -> int | None:
        """Elements of the key and the value of one token; None before the first token."""
        if self._buffers is None:
            return None
        both = (self._buffers.keys, self._buffers.values)
        return sum(one.shape[-1] for one in both) if self.codec is None else self.codec.token_size

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        if self._buffers is None:
            return None
        return self._buffers.keys.dtype if self.codec is None else self.codec.dtype

    @property
    def slot_bytes(self) -> int | None:
        """Bytes of the key and the value of one slot, as they are stored; None before the first token."""
        if self._buffers is None:
            return None
        return self.token_size * self.dtype.itemsize if self.codec is None else self.codec.num_bytes

    @property
    def capacity(self) -> int:
        """Slots there is room for, per row."""
        return 0 if self._buffers is None else self._buffers.positions.shape[-1]

    @property
    def slots(self) -> Slots | None:
        """What is held, by ascending position, [B, Hkv, max(kv_len), ...]: views of the buffers, in an arena a copy.

        None before the first token.
        """
        if self._buffers is None:
            return None
        if self.codec is None:
            held = part_values(self._buffers, self.latent)
        else:
            held = self.codec.decode_slots(self._buffers.in_order())
        width = max(self.kv_len)
        return held.map(lambda tensor: tensor[:, :, :width])

    @property
    def buffers(self) -> Slots | None:
        """All slots, in use or not, [B, Hkv, C, ...], keys and values as stored; None before the first token."""
        return self._buffers

    @property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, in use or not, [B, Hkv, C, D], as attention takes them."""
        buffers = self._buffers
        if self.is_exact or self.codec is None and self.latent is None:
            return buffers.keys, buffers.values
        held = part_values(buffers, self.latent) if self.codec is None else self.codec.decode_slots(buffers)
        return held.keys, held.values

    @property
    def num_allocated_bytes(self) -> int:
        """Bytes of all buffers: room to grow, positions and statistics included."""
        if self._buffers is None:
            return 0
        sizes: list[int] = []
        self._buffers.map(lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor)
        return sum(sizes)

    def view(self, width: int) -> Slots:
        """Views of the first `width` slots, [B, Hkv, width, ...], in use or not; there must be room for them."""
        assert width <= self.capacity
        return part_values(self._buffers, self.latent).map(lambda tensor: tensor[:, :, :width])

    def append(self, keys: Tensor, values: Tensor, rows: Rows, num_seen: list[int]) -> None:
        """Add each row's tokens [B, Hkv, rows.length, D]; the first gets position `num_seen[row]`, score 0."""
        start, values = list(self.kv_len), self._apart(values)
        self.kv_len = [old + new for old, new in zip(start, rows.counts, strict=True)]
        room = max(max(self.kv_len), self.expected)
        if self._buffers is None and rows.index is None and room == rows.length:
            self._adopt(keys, values, num_seen)
            return
        # Chunks of unknown number: moved now and then, not at each.
        self.reserve(room, like=(keys, values), slack=0 if self._buffers is None or self.expected else room // 4)
        buffers = self._buffers
        uniform = rows.index is None and min(start) == max(start) and min(num_seen) == max(num_seen)
        groups = [(slice(None), 0)] if uniform else [(slice(row, row + 1), row) for row in range(rows.batch)]
        for group, row in groups:
            count = rows.counts[row]
            here = slice(start[row], start[row] + count)
            buffers.keys[group, :, here] = keys if uniform else rows.pick(keys, row)
            buffers.values[group, :, here] = values if uniform else rows.pick(values, row)
            buffers.positions[group, :, here] = torch.arange(
                num_seen[row], num_seen[row] + count, device=keys.device
            )
            for statistic in (buffers.scores, buffers.rates, buffers.log_mass):
                statistic[group, :, here] = 0

    def put(self, keys: Tensor, values: Tensor, slot: Tensor, position: Tensor, *, masked: bool = False) -> None:
        """Write one token a row [B, Hkv, 1, D] into a free slot. Nothing moves; `advance` counts them.

        Args:
            slot: [B, Hkv] or [B, 1] int64; position: the same shapes, -1 where the slot stays free; in an arena it is
                written already.
            masked: whether a slot may be -1: nothing is written there.
        """
        buffers, keys, values = self._buffers, keys[:, :, 0], values[:, :, 0]
        if self.codec is None:
            pairs = [(buffers.positions, position.expand(keys.shape[:2])), (buffers.keys, keys)]
        else:
            pairs = [(buffers.keys, self.codec.encode(keys))]
        if self.latent is None:
            pairs.append((buffers.values, values if self.codec is None else self.codec.encode(values)))
        write_tokens(slot, *pairs, masked=masked)

    def advance(self, counts: list[int]) -> None:
        """Count tokens that were `put`."""
        self.kv_len = [old + new for old, new in zip(self.kv_len, counts, strict=True)]

    def _apart(self, values: Tensor) -> Tensor:
        """Of values what is stored beside their keys."""
        return values if self.latent is None else values[..., :0]

    def _adopt(self, keys: Tensor, values: Tensor, num_seen: list[int]) -> None:
        """Take the first tokens as the buffers themselves, without a copy where nothing else is held with them."""
        batch, heads, count, _ = keys.shape
        first = torch.tensor(num_seen, device=keys.device)[:, None, None]
        positions = (first + torch.arange(count, device=keys.device)).expand(batch, heads, count).clone()
        zeros = torch.zeros(3, batch, heads, count, dtype=stats_dtype(keys.dtype), device=keys.device)
        # Detached: a slot must not keep the graph alive, nor what a library hung on the tensor.
        self._buffers = Slots(_alone(keys.detach()), _alone(values.detach()), positions, *zeros.unbind(0))

    def reserve(self, capacity: int, *, like: tuple[Tensor, Tensor] | None = None, slack: int = 0) -> None:
        """Make room for `capacity` slots a row, and `slack` more if the buffers must move."""
        if self._buffers is not None and capacity <= self.capacity:
            return
        capacity += slack
        if self._buffers is None:
            assert like is not None
            self._buffers = unused_slots(*like[0].shape[:2], capacity, *like)
            return
        old = self._buffers
        batch, heads, width, _ = old.keys.shape
        grown = unused_slots(batch, heads, capacity, old.keys, old.values)
        _copy(grown, old, width)
        self._buffers = grown

    def replace(self, slots: Slots, kv_len: list[int], capacity: int | None = None) -> None:
        """Hold these slots instead. With a `capacity` the buffers are made anew, else written in place.

        Slots that are views of the buffers lie where they belong.
        """
        slots = join_values(slots, self.latent)
        batch, heads, width, _ = slots.keys.shape
        if capacity is not None:
            self._buffers = unused_slots(batch, heads, max(capacity, width), slots.keys, slots.values)
        if slots.keys.data_ptr() != self._buffers.keys.data_ptr():
            _copy(self._buffers, slots, width)
        free = self._buffers.map(lambda tensor: tensor[:, :, width:])
        free.positions.fill_(-1)
        for statistic in (free.scores, free.rates, free.log_mass):
            statistic.zero_()
        self.kv_len = list(kv_len)

    @property
    def widths(self) -> list[int]:
        """Of each row, how many columns of the buffers a decode step looks at: in an arena those of its segment, else
        those in use and one for its token."""
        return self._room if self.in_arena else [min(held + 1, self.capacity) for held in self.kv_len]

    def enter(self, block: Slots, codec: Codec, room: Sequence[int]) -> None:
        """Move into a block of an arena [B, Hkv, C, ...], of which the slots become the first ones; room: slots of each
        row's segments."""
        slots = codec.encode_slots(self.slots)
        width = slots.positions.shape[-1]
        _copy(block, slots, width)
        for vectors in (block.keys, block.values):
            vectors[:, :, width:] = 0
        self._buffers, self.codec, self._room = block, codec, list(room)

    def rebase(self, block: Slots, room: Sequence[int]) -> None:
        """The same slots in the block of another arena."""
        self._buffers, self._room = block, list(room)

    def leave(self) -> None:
        """Hold the slots in buffers of their own, in order."""
        if self.codec is not None:
            self._buffers, self.codec = join_values(self.slots, self.latent), None

    def join(self, other: SlotStore) -> None:
        """Hold the rows of another store too, after those that are here. Slots of an arena are its own to join."""
        assert self.in_arena == other.in_arena
        if self.in_arena:
            self.kv_len = [*self.kv_len, *other.kv_len]
            return
        capacity = max(self.capacity, other.capacity)
        for store in (self, other):
            store.reserve(capacity)
        both = zip(vars(self._buffers).values(), vars(other._buffers).values(), strict=True)
        self.hold(Slots(*(torch.cat(pair) for pair in both)), [*self.kv_len, *other.kv_len])

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated; those of an arena are its own to select."""
        host = index.tolist()
        self.kv_len = [self.kv_len[row] for row in host]
        if self._buffers is not None and not self.in_arena:
            self._buffers = self._buffers.map(lambda t: t.index_select(0, index.to(t.device)))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of a part of a larger one (packed projections, an exchange), which would keep it alive."""
    is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor


def _copy(target: Slots, source: Slots, width: int) -> None:
    """Write the first `width` slots of `source` into `target`."""
    for name in ("keys", "values", "positions", "scores", "rates", "log_mass"):
        getattr(target, name)[:, :, :width] = getattr(source, name)[:, :, :width]
