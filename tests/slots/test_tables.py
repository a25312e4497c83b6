"""What a step makes at once for all layers is what each of them would make of its own part."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.kernels.finish_decode import pace_of
from d2o_dist.kernels.scored_decode.cpu import bias_of
from d2o_dist.slots.tables import StepTables
from tests.slots.test_arena import made


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leaves_out", [False, True])
def test_tables_are_those_of_each_block(dtype, leaves_out):
    arena, _ = made(dtype)
    arena.storage.log_mass.uniform_(-1, 1)
    present = torch.ones(2, dtype=torch.bool) if leaves_out else None
    tables, opened = StepTables(arena, 8, present), None
    addresses = [[one.data_ptr() for one in vars(block).values()] for block in tables.blocks]
    for step in range(2):
        position = torch.tensor([100 + step, 200 + step])
        if leaves_out:
            present[step] = False
            position[step], present[1 - step] = -1, True
        opened = arena.open(position, opened)
        tables.fill(opened)
        both = zip(tables.blocks, arena.split_units(opened.slot), arena.split_slots(opened.live), strict=True)
        for number, (table, slot, live) in enumerate(both):
            view, shape = arena.view(number), live.shape
            assert torch.equal(table.bias, bias_of(live, view.log_mass, shape, table.bias.dtype))
            assert torch.equal(table.pace, pace_of(view.rates, slot, 8, present).expand(shape))
            # The slot of a token, among those of all units of the block.
            flat = torch.zeros(shape, dtype=torch.bool).flatten().index_fill(0, table.place, True)
            assert torch.equal(flat.view(shape), torch.arange(shape[2]) == slot.unsqueeze(-1))
        arena.close(opened, present)
    assert addresses == [[one.data_ptr() for one in vars(block).values()] for block in tables.blocks]
