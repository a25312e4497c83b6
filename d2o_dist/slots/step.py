"""What a decode step of a whole cache reads and advances, on the device.

Between two evictions a step changes no shape and no address, and asks the device nothing: recorded once (as a CUDA
graph), it can be replayed for the next token. Everything that differs from step to step is therefore in tensors here
and in the arena; the host counts along, since its counts depend on no data.

Shape legend: B rows, h KV heads of a block (those of a layer that have one budget), C slots of its buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.slots.arena import Arena
from d2o_dist.slots.shares import Shares
from d2o_dist.slots.slots import Slots
from d2o_dist.slots.tables import StepTables, Tables


@dataclass(frozen=True)
class BlockStep:
    """The part of one block of heads in a running step.

    Attributes:
        position: [B, h] or [B, 1] int64 of each row's new token; -1 where none is stored here.
        slot: [B, h] or [B, 1] int64 where in the buffers it goes; -1 where the slots are spread over ranks, and
            another one has it.
        live: [B, h, C] or [B, C] bool: slots in use, the new ones included.
        stop: [B] int64, slots in use with it, of blocks that keep their slots in order; None of others.
        present: [B] bool, rows that take a token; None: all of them.
        columns: [>= C] int64, 0, 1, 2 and so on.
        widths: per row, how many columns of the buffers may be in use; None: all.
        tables: what was made for all blocks at once; None: nothing was.
    """

    position: Tensor
    slot: Tensor
    live: Tensor
    stop: Tensor | None
    present: Tensor | None
    columns: Tensor
    widths: Sequence[int] | None
    tables: Tables | None = None


@dataclass(frozen=True)
class Held:
    """Where a block of heads has its slots.

    Attributes:
        buffers: all of them; in_arena: whether these are a block of the arena, those that are in its order.
        kv_len: slots in use by each row, the first ones; shares: of each rank, if they are spread: [B, h, world].
    """

    buffers: Slots
    in_arena: bool
    kv_len: Sequence[int]
    shares: Shares | None = None


class DecodeStep:
    """Where the next token of each row goes, in everything that holds slots of its own.

    Args:
        num_seen: tokens seen by each row; held: of each block; arena: of those that lie in one.
        present: rows that take a token; None: all of them.
        rate_window: of the tables that steps on a CPU make for all blocks of the arena at once.

    Attributes:
        counts: tokens that each row takes in a step, 0 or 1.
    """

    def __init__(
        self, num_seen: Sequence[int], held: Sequence[Held], present: Sequence[bool] | None,
        arena: Arena | None, rate_window: int,
    ) -> None:  # fmt: skip
        device = held[0].buffers.positions.device
        self.counts = [1] * len(num_seen)
        # Not kept alive: when rows are selected or a later turn is read, the old buffers must go.
        self._buffers = [weakref.ref(one.buffers) for one in held]
        self._widths = [one.buffers.positions.shape[-1] for one in held]
        self._in_arena = [one.in_arena for one in held]
        self._shares = [None if one.in_arena else one.shares for one in held]
        self._arena, self._opened, self._tables = arena, None, None
        # The parts of the arena's blocks: views of what each step writes anew.
        self._in_place: list[BlockStep] = []
        self._seen = torch.tensor(list(num_seen), device=device)
        self._held = torch.tensor([list(one.kv_len) for one in held], device=device)
        self._columns = torch.arange(max(self._widths), device=device)
        # Asked for only once a row has ended; the step then stays of that kind.
        self._present = None if present is None else torch.tensor(list(present), device=device)
        if arena is not None and arena.shares is None and device.type == "cpu":
            self._tables = StepTables(arena, rate_window, self._present)

    @property
    def positions(self) -> Tensor:
        """[B] int64: of each row's next token."""
        return self._seen

    def fits(self, held: Sequence[Held], present: Sequence[bool] | None) -> bool:
        """Whether it is still the step of these buffers, and can leave out rows if some are to be left out."""
        same = all(mine() is one.buffers for mine, one in zip(self._buffers, held, strict=True))
        return same and (present is None or self._present is not None)

    def choose(self, present: Sequence[bool] | None) -> None:
        """Rows that take a token from now on; None: all of them."""
        counts = [1] * len(self.counts) if present is None else [int(one) for one in present]
        if counts != self.counts and self._present is not None:
            self._present.copy_(torch.tensor(counts))
        self.counts = counts

    def begin(self, widths: Sequence[Sequence[int] | None]) -> list[BlockStep]:
        """The part of each block, which writes and attends before `end`; widths: of its rows."""
        if self._present is None:
            position, stop = self._seen, self._held + 1
        else:
            position, stop = self._seen.masked_fill(~self._present, -1), self._held + self._present
        if self._arena is not None:
            self._opened = self._arena.open(position, self._opened)
            if self._tables is not None:
                self._tables.fill(self._opened)
        in_arena = iter(self._of_arena([width for width, inside in zip(widths, self._in_arena, strict=True) if inside]))
        steps = []
        for number, (width, end) in enumerate(zip(self._widths, stop.unbind(), strict=True)):
            if self._in_arena[number]:
                steps.append(next(in_arena))
                continue
            columns, shares, last = self._columns[:width], self._shares[number], None
            if shares is not None:
                held = shares.held[..., shares.rank]
                here = position[:, None].masked_fill(shares.taker != shares.rank, -1)
                slot = held.masked_fill(here < 0, -1)
                live = columns < (held + (here >= 0)).unsqueeze(-1)
            else:
                here, slot, live, last = position[:, None], self._held[number][:, None], columns < end[:, None], end
            steps.append(BlockStep(here, slot, live, last, self._present, self._columns, widths[number]))
        return steps

    def _of_arena(self, widths: Sequence[Sequence[int] | None]) -> list[BlockStep]:
        if self._arena is not None and widths != [one.widths for one in self._in_place]:
            arena, opened = self._arena, self._opened
            tables = [None] * len(widths) if self._tables is None else self._tables.blocks
            self._in_place = [
                BlockStep(here, slot, live, None, self._present, self._columns, width, of_block)
                for here, slot, live, width, of_block in zip(
                    arena.split_units(opened.position), arena.split_units(opened.slot), arena.split_slots(opened.live),
                    widths, tables, strict=True,
                )
            ]
        return self._in_place

    def end(self) -> None:
        """The tokens are stored: count them."""
        if self._arena is not None:
            self._arena.close(self._opened, self._present)
        for shares in filter(None, self._shares):
            shares.add(shares.taker, None if self._present is None else self._present[:, None])
        new = 1 if self._present is None else self._present
        self._seen.add_(new)
        self._held.add_(new)

    def hold(self, kv_len: Sequence[Sequence[int]]) -> None:
        """After slots moved: those of each block that are in use now."""
        self._held.copy_(torch.tensor([list(rows) for rows in kv_len]))
