"""The slots of everything that is evicted while decoding, in one piece of memory, with one segment for each unit.

A unit is one KV head of one row of one layer: what has a length and a budget of its own. Its segment holds its budget
and what gathers between two evictions, and never grows. Slots of a unit are a set; their order is in the positions. A
new token takes a free slot, an eviction frees the slots of its victims, and nothing else moves. So evictions of all
layers are one batch of operators, whose number does not grow with the layers.

Shape legend: U units, ordered by layer, row, head; B rows, h KV heads of a block, C slots of a segment, W free slots at
most, N slots of all segments, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.slots.codec import Codec
from d2o_dist.slots.shares import Shares
from d2o_dist.slots.slots import Slots, compact, unused_slots


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


@dataclass(frozen=True)
class Opened:
    """A decode step of an arena.

    Attributes:
        slot: [U] int64 where each unit's token goes, counted from its start; -1 where another rank has it, or none is
            free.
        position: [U] int64 of what is stored here; -1: nothing is, and the slot stays as it was.
        where: [U] int64 the slot in the storage; N where nothing is stored.
        live: [N] bool which slots of the storage are in use, the new ones included.
        taker: [U] int64 the ranks that store the tokens, where the slots of a unit are spread; None otherwise.
    """

    slot: Tensor
    position: Tensor
    where: Tensor
    live: Tensor
    taker: Tensor | None


class Arena:
    """Segments for blocks of `batch` rows, and which slots of theirs are free.

    Args:
        codec: how keys and values are stored; device: where.

    Attributes:
        storage: [N + 1, ...] of all segments; the last slot is nobody's, and is written where nothing is to be. Its
            position stays -1.
        shares: [U, world], where the slots of a unit are spread over ranks; None: all of them are here.
        start: [U] int64, the first slot of each unit; row: [U] int64.
        free: [U, W] int64, which slots of a unit, counted from its start, the next tokens take, in order; then -1.
        taken: [U] int64, how many of those were taken.
    """

    def __init__(self, blocks: Sequence[Block], codec: Codec, device: torch.device) -> None:
        self.blocks = list(blocks)
        sizes = [block.num_slots for block in self.blocks]
        self._first = [0, *accumulate(sizes)]
        self.num_slots = self._first[-1]
        self.codec, batch = codec, len(self.blocks[0].room)
        like = [torch.zeros(width, dtype=dtype, device=device) for width, dtype in codec.stored]
        wide = unused_slots(1, 1, self.num_slots + 1, *like, codec.dtype, is_empty=True)
        self.storage = wide.map(lambda tensor: tensor[0, 0])
        for vectors in (self.storage.keys, self.storage.values):
            vectors[self.num_slots] = 0
        starts, rows = [], []
        for first, block in zip(self._first, self.blocks, strict=False):
            lead = torch.arange(batch * block.heads)
            starts.append(first + lead * block.width)
            rows.append(lead // block.heads)
        self.start, self.row = torch.cat(starts).to(device), torch.cat(rows).to(device)
        self.free = torch.zeros(len(self.start), 0, dtype=torch.int64, device=device)
        self.taken = torch.zeros_like(self.start)
        self.shares: Shares | None = None
        self._columns: dict[tuple[int, ...], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies: tables of columns are made again."""
        return {**vars(self), "_columns": {}}

    def view(self, number: int) -> Slots:
        """Views of one block: [B, h, C, ...], keys and values as they are stored."""
        block, first = self.blocks[number], self._first[number]
        shape = (len(block.room), block.heads, block.width)
        return self.storage.map(lambda tensor: tensor[first : first + block.num_slots].unflatten(0, shape))

    def first(self, number: int) -> int:
        """The first slot of a block in the storage."""
        return self._first[number]

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

    def split_shares(self) -> list[Shares]:
        """[B, h, world] of each block, parts of one table."""
        parts = self.shares.held.split([len(block.room) * block.heads for block in self.blocks])
        return [Shares(part.unflatten(0, (-1, block.heads)), self.shares.rank)
                for part, block in zip(parts, self.blocks, strict=True)]  # fmt: skip

    def settle(self, num_free: int, shares: Tensor | None = None, rank: int = 0) -> None:
        """Note which slots are free, of blocks that were filled.

        Args:
            num_free: W, the most that a unit has, now or later.
            shares: [U, world] int64 slots of each rank, if the units are spread; rank: this one.
        """
        columns = self.columns(range(len(self.blocks)))
        free = (self.storage.positions[columns] < 0) & (columns < self.num_slots)
        self.free = _listed(free, max(1, num_free))
        self.taken.zero_()
        self.shares = None if shares is None else Shares(shares, rank)

    # ---- a decode step -------------------------------------------------------------------------------------------

    def open(self, position: Tensor, before: Opened | None = None) -> Opened:
        """Give each unit's next token its slot.

        Args:
            position: [B] int64 of each row's token; -1 for a row that takes none.
            before: an earlier step, whose tensors become those of this one, at the same addresses.
        """
        slot = self.free.gather(1, self.taken.clamp_max(self.free.shape[1] - 1)[:, None])[:, 0]
        # A unit without a free slot (of a row that is no longer evicted, for it is not finite) stores nothing.
        own, taker = position[self.row].masked_fill(slot < 0, -1), None
        if self.shares is not None:
            taker = self.shares.taker
            own = own.masked_fill(taker != self.shares.rank, -1)
            slot = slot.masked_fill(own < 0, -1)
        where = (self.start + slot).masked_fill(own < 0, self.num_slots)
        self.storage.positions[where] = own
        opened = Opened(slot, own, where, self.storage.positions[: self.num_slots] >= 0, taker)
        if before is None:
            return opened
        for name, tensor in vars(opened).items():
            if tensor is not None:
                getattr(before, name).copy_(tensor)
        return before

    def close(self, opened: Opened, present: Tensor | None) -> None:
        """The tokens of the step are stored; present: [B] bool, rows that took one; None: all of them."""
        self.taken += opened.position >= 0
        if self.shares is not None:
            self.shares.add(opened.taker, None if present is None else present[self.row])

    # ---- an eviction ---------------------------------------------------------------------------------------------

    def columns(self, blocks: Iterable[int]) -> Tensor:
        """[u, C] int64: the slots in the storage of the units of some blocks; N where a segment is shorter."""
        key = tuple(blocks)
        if key not in self._columns:
            width = max(self.blocks[number].width for number in key)
            parts = []
            for number in key:
                units, own = self.units(number), self.blocks[number].width
                offset = torch.arange(width, device=self.start.device)
                parts.append(torch.where(offset < own, self.start[units, None] + offset, self.num_slots))
            self._columns[key] = torch.cat(parts)
        return self._columns[key]

    def release(self, units: Tensor, where: Tensor, slot: Tensor, valid: Tensor) -> None:
        """Free the slots of victims.

        Args:
            units: [u] int64; where: [u, E] int64 in the storage, N where there is none; slot: [u, E], the same counted
                from the unit's start; valid: [u, E] bool, where there is one.
        """
        slots, flat = self.storage, where.flatten()
        slots.positions.index_fill_(0, flat, -1)
        for statistic in (slots.scores, slots.rates, slots.log_mass):
            statistic.index_fill_(0, flat, 0)
        old = self.free[units]
        left = (torch.arange(old.shape[1], device=old.device) >= self.taken[units, None]) & (old >= 0)
        slot, free = torch.cat([slot, old], 1), _listed(torch.cat([valid, left], 1), old.shape[1])
        self.free[units] = slot.gather(1, free.clamp_min(0)).masked_fill(free < 0, -1)
        self.taken.index_fill_(0, units, 0)

    # ---- rows ----------------------------------------------------------------------------------------------------

    def units_of_rows(self, index: Tensor) -> Tensor:
        """[u] int64: the units of rows `index`, in the order that they have in an arena of these rows."""
        units, index = torch.arange(len(self.start), device=self.start.device), index.to(self.start.device)
        return torch.cat([block.index_select(0, index).flatten() for block in self.split_units(units)])

    def select_rows(self, index: Tensor) -> Arena:
        """An arena of rows `index`, in that order, repeated where repeated."""
        rooms = [tuple(block.room[row] for row in index.tolist()) for block in self.blocks]
        blocks = [Block(block.heads, max(room), room) for block, room in zip(self.blocks, rooms, strict=True)]
        made, index = Arena(blocks, self.codec, self.start.device), index.to(self.start.device)
        for number, block in enumerate(blocks):
            old, new = self.view(number), made.view(number)
            for name in vars(old):
                getattr(new, name).copy_(getattr(old, name)[:, :, : block.width].index_select(0, index))
        units = self.units_of_rows(index)
        made.free, made.taken = self.free[units], self.taken[units]
        if self.shares is not None:
            made.shares = Shares(self.shares.held[units], self.shares.rank)
        return made

    def join(self, others: Sequence[Arena]) -> Arena:
        """An arena of the rows of several, one after the other. Each slot keeps its place in its segment, and each unit
        the order of its free slots: what becomes of a unit does not depend on when others came."""
        everyone = [self, *others]
        blocks = [
            Block(parts[0].heads, max(part.width for part in parts), sum((part.room for part in parts), ()))
            for parts in zip(*(arena.blocks for arena in everyone), strict=True)
        ]
        made = Arena(blocks, self.codec, self.start.device)
        for number in range(len(blocks)):
            new, row = made.view(number), 0
            for arena in everyone:
                old = arena.view(number)
                batch, _, width = old.positions.shape
                for name in vars(old):
                    getattr(new, name)[row : row + batch, :, :width] = getattr(old, name)
                for vectors in (new.keys, new.values):  # nobody's, but read
                    vectors[row : row + batch, :, width:] = 0
                row += batch
        most = max(arena.free.shape[1] for arena in everyone)
        frees = [pad(arena.free, (0, most - arena.free.shape[1]), value=-1) for arena in everyone]
        made.free = self.by_unit(everyone, frees)
        made.taken = self.by_unit(everyone, [arena.taken for arena in everyone])
        if self.shares is not None:
            held = self.by_unit(everyone, [arena.shares.held for arena in everyone])
            made.shares = Shares(held, self.shares.rank)
        return made

    @staticmethod
    def by_unit(arenas: Sequence[Arena], tables: Sequence[Tensor]) -> Tensor:
        """[U, ...] of each arena -> of the arena of all their rows."""
        numbers = range(len(arenas[0].blocks))
        both = list(zip(arenas, tables, strict=True))
        return torch.cat([table[arena.units(number)] for number in numbers for arena, table in both])


def _listed(mask: Tensor, width: int) -> Tensor:
    """[u, width] int64: the first True entries of [u, S], in order; then -1."""
    there = torch.arange(width, device=mask.device) < mask.sum(-1, keepdim=True)
    return compact(mask, width).masked_fill(~there, -1)
