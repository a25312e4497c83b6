"""What a decode step makes once for all layers of an arena.

For where every operator is dear, and one for all layers costs as much as one for each: on a CPU. A GPU's kernels make
it as they go.

Shape legend: B rows, h KV heads of a block, C slots of its segments, U units, N slots of all segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.slots.arena import Arena, Opened


@dataclass(frozen=True)
class Tables:
    """Of one block.

    Attributes:
        place: [B * h] int64, where among the block's B * h * C slots the token of each unit goes: its last slot if none
            is free.
        bias: [B, h, C] in the dtype of statistics, what is added to logits: the log mass of live slots, -inf of others.
        pace: [B, h, C] in that dtype, how far rates go towards the step's probabilities, as `pace_of` says.
    """

    place: Tensor
    bias: Tensor
    pace: Tensor


class StepTables:
    """Of all blocks; written anew in each step, at the same addresses.

    Args:
        present: [B] bool on the device, rows that take a token, read in each step; None: all of them.

    Attributes:
        blocks: views of them, of each block in turn.
    """

    def __init__(self, arena: Arena, rate_window: int, present: Tensor | None) -> None:
        self._arena, self._rate_window = arena, rate_window
        numbers, statistics = range(len(arena.blocks)), arena.storage.log_mass
        self._lead = torch.cat([arena.start[arena.units(number)] - arena.first(number) for number in numbers])
        widths = torch.tensor([block.width for block in arena.blocks for _ in block.room * block.heads])
        self._place, self._widths = torch.empty_like(self._lead), widths
        # One more, of nobody's slot: where the tokens of rows that take none go.
        self._bias, self._pace = torch.empty_like(statistics), torch.empty_like(statistics)
        self._dead = statistics.new_tensor(-torch.inf)
        self._present, self._row = present, None
        if present is not None:
            self._row = arena.row.repeat_interleave(widths)
        place = [table.flatten() for table in arena.split_units(self._place)]
        both = [arena.split_slots(table[: arena.num_slots]) for table in (self._bias, self._pace)]
        self.blocks = [Tables(*tables) for tables in zip(place, *both, strict=True)]

    def fill(self, opened: Opened) -> None:
        """For the step of an arena that was opened."""
        slots = self._arena.num_slots
        torch.remainder(opened.slot, self._widths, out=self._place).add_(self._lead)
        torch.where(opened.live, self._arena.storage.log_mass[:slots], self._dead, out=self._bias[:slots])
        self._pace.fill_(1 / self._rate_window).index_fill_(0, opened.where, 1.0)
        if self._present is not None:
            self._pace[:slots] *= self._present[self._row]
