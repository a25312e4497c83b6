"""What a decode step of a whole cache reads and advances, on the device.

Between two evictions a step changes no shape and no address, and asks the device nothing: recorded once (as a CUDA
graph), it can be replayed for the next token. Everything that differs from step to step is therefore in tensors here
and in the arena; the host counts along, since its counts depend on no data.

Shape legend: B rows, h KV heads of a layer (or the one of a unit with a budget of its own), C slots of its buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.slots.arena import Arena
from d2o_dist.slots.slots import Slots


@dataclass(frozen=True)
class LayerStep:
    """The part of one layer in a running step, or of one KV head where heads have budgets of their own.

    Attributes:
        position: [B] int64 of each row's new token; -1 for a row that takes none.
        slot: [B, h] int64 where in this layer it goes, or [B, 1] where all heads have the same.
        live: [B, h, C] or [B, C] bool: slots in use, the new one included.
        stop: [B] int64, slots in use with it, of layers that keep their slots in order; None of others.
        present: [B] bool, rows that take a token; None: all of them.
        columns: [>= C] int64, 0, 1, 2 and so on.
    """

    position: Tensor
    slot: Tensor
    live: Tensor
    stop: Tensor | None
    present: Tensor | None
    columns: Tensor


class DecodeStep:
    """Where the next token of each row goes, in everything that holds slots of its own.

    Args:
        num_seen: tokens seen by each row; held: per layer (or KV head) the slots in use by each row; buffers: per layer
            (or KV head) its slots.
        present: rows that take a token; None: all of them.
        arena: that some of the buffers are blocks of, if any; blocks: per layer (or KV head) which of them; None: none.

    Attributes:
        counts: tokens that each row takes in a step, 0 or 1.
    """

    def __init__(
        self,
        num_seen: Sequence[int],
        held: Sequence[Sequence[int]],
        buffers: Sequence[Slots],
        present: Sequence[bool] | None,
        arena: Arena | None = None,
        blocks: Sequence[int | None] | None = None,
    ) -> None:
        device = buffers[0].positions.device
        self.counts = [1] * len(num_seen)
        # Not kept alive: when rows are selected or a later turn is read, the old buffers must go.
        self._buffers = [weakref.ref(slots) for slots in buffers]
        self._widths = [slots.positions.shape[-1] for slots in buffers]
        self._arena, self._blocks = arena, [None] * len(buffers) if blocks is None else list(blocks)
        self._seen = torch.tensor(list(num_seen), device=device)
        self._held = torch.tensor([list(rows) for rows in held], device=device)
        self._columns = torch.arange(max(self._widths), device=device)
        # Asked for only once a row has ended; the step then stays of that kind.
        self._present = None if present is None else torch.tensor(list(present), device=device)

    @property
    def positions(self) -> Tensor:
        """[B] int64: of each row's next token."""
        return self._seen

    def fits(self, buffers: Sequence[Slots], present: Sequence[bool] | None) -> bool:
        """Whether it is still the step of these buffers, and can leave out rows if some are to be left out."""
        same = all(mine() is other for mine, other in zip(self._buffers, buffers, strict=True))
        return same and (present is None or self._present is not None)

    def choose(self, present: Sequence[bool] | None) -> None:
        """Rows that take a token from now on; None: all of them."""
        counts = [1] * len(self.counts) if present is None else [int(one) for one in present]
        if counts != self.counts and self._present is not None:
            self._present.copy_(torch.tensor(counts))
        self.counts = counts

    def begin(self) -> list[LayerStep]:
        """The part of each layer (or KV head), which writes and attends before `end`."""
        if self._present is None:
            position, stop = self._seen, self._held + 1
        else:
            position, stop = self._seen.masked_fill(~self._present, -1), self._held + self._present
        if self._arena is not None:
            slot, live = self._arena.open(position)
            slots, lives = self._arena.split_units(slot), self._arena.split_slots(live)
        steps = []
        for block, width, own, end in zip(self._blocks, self._widths, self._held.unbind(), stop.unbind(), strict=True):
            if block is None:
                where, used, last = own[:, None], self._columns[:width] < end[:, None], end
            else:
                where, used, last = slots[block], lives[block], None
            steps.append(LayerStep(position, where, used, last, self._present, self._columns))
        return steps

    def end(self) -> None:
        """The tokens are stored: count them."""
        new = 1 if self._present is None else self._present
        self._seen.add_(new)
        self._held.add_(new)
        if self._arena is not None:
            self._arena.close(self._present)

    def hold(self, held: Sequence[Sequence[int]]) -> None:
        """After slots moved: those that are in use now."""
        self._held.copy_(torch.tensor([list(rows) for rows in held]))
