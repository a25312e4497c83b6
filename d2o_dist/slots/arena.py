"""The slots of everything that is evicted while decoding, in one piece of memory, with one segment for each unit.

A unit is one KV head of one row of one layer: what has a length and a budget of its own. Its segment holds its budget
and what gathers between two evictions, and never grows. Slots of a unit are a set; their order is in the positions. A
new token takes a free slot, an eviction frees the slots of its victims, and nothing else moves. So evictions of all
layers are one batch of operators, whose number does not grow with the layers.

Shape legend: U units, ordered by layer, row, head; B rows, h KV heads of a block, C slots of a segment, W free slots at
most, N slots of all segments, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from d2o_dist.slots.slots import Slots, unused_slots


@dataclass(frozen=True)
class Block:
    """The segments of all rows and some heads of a layer: side by side, and as wide as the fullest row needs.

    Attributes:
        heads, width: h and C.
        room: per row how many slots its units hold at most, at most C.
    """

    heads: int
    width: int
    room: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Slots of all of its segments."""
        return len(self.room) * self.heads * self.width


class Arena:
    """Segments for blocks of `batch` rows, and which slots of theirs are free.

    Args:
        like: [..., D], whose dtype, device and head dim the keys and values have.

    Attributes:
        storage: [N + 1, ...] of all segments; the last slot is nobody's, and is written where nothing is to be.
        start: [U] int64, the first slot of each unit; row: [U] int64.
        free: [U, W] int64, which slots of a unit, counted from its start, the next tokens take, in order.
        taken: [U] int64, how many of those were taken.
    """

    def __init__(self, blocks: Sequence[Block], like: Tensor) -> None:
        self.blocks = list(blocks)
        sizes = [block.num_slots for block in self.blocks]
        self._first = [0, *accumulate(sizes)]
        self.num_slots = self._first[-1]
        device, batch = like.device, len(self.blocks[0].room)
        wide = unused_slots(1, 1, self.num_slots + 1, like)
        self.storage = wide.map(lambda tensor: tensor[0, 0])
        starts, rows = [], []
        for first, block in zip(self._first, self.blocks, strict=False):
            lead = torch.arange(batch * block.heads)
            starts.append(first + lead * block.width)
            rows.append(lead // block.heads)
        self.start, self.row = torch.cat(starts).to(device), torch.cat(rows).to(device)
        self.free = torch.zeros(len(self.start), 0, dtype=torch.int64, device=device)
        self.taken = torch.zeros_like(self.start)
        self._columns: dict[tuple[int, ...], Tensor] = {}

    def view(self, number: int) -> Slots:
        """Views of one block: [B, h, C, ...]."""
        block, first = self.blocks[number], self._first[number]
        shape = (len(block.room), block.heads, block.width)
        return self.storage.map(lambda tensor: tensor[first : first + block.num_slots].unflatten(0, shape))

    def units(self, number: int) -> slice:
        """The units of one block, in [0, U)."""
        before = sum(len(block.room) * block.heads for block in self.blocks[:number])
        return slice(before, before + len(self.blocks[number].room) * self.blocks[number].heads)

    def split_units(self, table: Tensor) -> list[Tensor]:
        """[U] of all units -> [B, h] of each block."""
        parts = table.split([len(block.room) * block.heads for block in self.blocks])
        return [part.view(-1, block.heads) for part, block in zip(parts, self.blocks, strict=True)]

    def split_slots(self, table: Tensor) -> list[Tensor]:
        """[N] of all slots -> [B, h, C] of each block."""
        parts = table.split([block.num_slots for block in self.blocks])
        return [part.view(-1, block.heads, block.width) for part, block in zip(parts, self.blocks, strict=True)]

    def settle(self, held: Sequence[Sequence[int]]) -> None:
        """Note which slots are free; held: per block the slots of each row, which are its first ones."""
        rows = [
            (count, room)
            for block, counts in zip(self.blocks, held, strict=True)
            for count, room in zip(counts, block.room, strict=True)
            for _ in range(block.heads)
        ]
        width = max(1, *(room - count for count, room in rows))
        first = torch.tensor([count for count, _ in rows], device=self.start.device)
        self.free = first[:, None] + torch.arange(width, device=self.start.device)
        self.taken.zero_()

    # ---- a decode step -------------------------------------------------------------------------------------------

    def open(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Give each unit's next token its slot: ([U] int64 slots, [N] bool which slots of the storage are in use).

        Args:
            position: [B] int64 of each row's token; -1 for a row that takes none, whose slot stays free.
        """
        slot = self.free.gather(1, self.taken.clamp_max(self.free.shape[1] - 1)[:, None])[:, 0]
        where = self.start + slot
        self.storage.positions[where] = position[self.row]
        return slot, self.storage.positions[: self.num_slots] >= 0

    def close(self, present: Tensor | None) -> None:
        """The tokens are stored; present: [B] bool, rows that took one, None: all of them."""
        self.taken += 1 if present is None else present[self.row]

    # ---- an eviction ---------------------------------------------------------------------------------------------

    def columns(self, blocks: Sequence[int]) -> Tensor:
        """[u, C] int64: the slots in the storage of the units of some blocks; N where a segment is shorter."""
        key = tuple(blocks)
        if key not in self._columns:
            width = max(self.blocks[number].width for number in blocks)
            parts = []
            for number in blocks:
                units, own = self.units(number), self.blocks[number].width
                offset = torch.arange(width, device=self.start.device)
                parts.append(torch.where(offset < own, self.start[units, None] + offset, self.num_slots))
            self._columns[key] = torch.cat(parts)
        return self._columns[key]

    def release(self, units: Tensor, where: Tensor, slot: Tensor, due: Tensor) -> None:
        """Free the slots of victims.

        Args:
            units: [u] int64; where: [u, E] int64 in the storage, N where there is none; slot: [u, E], the same counted
                from the unit's start.
            due: [u] bool, units that evict E slots; the others keep what they have.
        """
        slots, number = self.storage, slot.shape[1]
        flat = where.flatten()
        slots.positions.index_fill_(0, flat, -1)
        for statistic in (slots.scores, slots.rates, slots.log_mass):
            statistic.index_fill_(0, flat, 0)
        old = self.free[units]
        assert number <= old.shape[1], f"{number} slots are freed at once, but only {old.shape[1]} were ever taken"
        fresh = torch.nn.functional.pad(slot, (0, old.shape[1] - number))
        self.free[units] = torch.where(due[:, None], fresh, old)
        self.taken[units] = torch.where(due, 0, self.taken[units])

    # ---- rows ----------------------------------------------------------------------------------------------------

    def units_of_rows(self, index: Tensor) -> Tensor:
        """[u] int64: the units of rows `index`, in the order that they have in an arena of these rows."""
        units, index = torch.arange(len(self.start), device=self.start.device), index.to(self.start.device)
        return torch.cat([block.index_select(0, index).flatten() for block in self.split_units(units)])

    def select_rows(self, index: Tensor) -> Arena:
        """An arena of rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        blocks = [Block(b.heads, b.width, tuple(b.room[row] for row in host)) for b in self.blocks]
        made = Arena(blocks, self.storage.keys)
        for number in range(len(blocks)):
            old, new = self.view(number), made.view(number)
            for name in vars(old):
                getattr(new, name).copy_(getattr(old, name).index_select(0, index.to(self.start.device)))
        units = self.units_of_rows(index)
        made.free, made.taken = self.free[units], self.taken[units]
        return made
