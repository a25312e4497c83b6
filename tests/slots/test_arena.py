"""Segments of an arena: where slots of which unit lie, which are free, and what happens when rows are chosen."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.policy.storage import Exact
from d2o_dist.slots.arena import Arena, Block
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.slots import Slots
from d2o_dist.slots.store import SlotStore
from d2o_dist.slots.tables import StepTables
from tests.evict.test_prompt import random_slots

# Two layers of two heads and two rows; the second row of the second one may hold fewer slots.
BLOCKS = [Block(2, 5, (5, 5)), Block(2, 7, (7, 4))]
HELD = [[3, 2], [5, 1]]


def made(dtype=torch.float64) -> tuple[Arena, list[Slots]]:
    """An arena, and what was put into each of its blocks."""
    codec = Codec(Exact(), (3, 3), dtype)
    arena, inside = Arena(BLOCKS, codec, torch.device("cpu")), []
    for number, held in enumerate(HELD):
        inside.append(random_slots(held, 2, 3, seed=number, dtype=dtype))
        SlotStore.of(inside[-1], held).enter(arena.view(number), codec, BLOCKS[number].room)
    arena.settle(3)
    return arena, inside


def live(arena: Arena, number: int) -> list[list[list[int]]]:
    """Positions of each row and head of a block, in order."""
    return [[sorted(p for p in head if p >= 0) for head in row] for row in arena.view(number).positions.tolist()]


def test_slots_and_free_ones_keep_their_places_when_arenas_join():
    """Whatever the widths beside them; and tokens then take the slots that they would have taken."""
    one, other = made()[0], made()[0].select_rows(torch.tensor([1]))
    for arena, tokens in ((one, [9, -1]), (other, [7])):
        arena.close(arena.open(torch.tensor(tokens)), None)
    arena = one.join([other])
    assert [block.room for block in arena.blocks] == [(5, 5, 5), (7, 4, 4)] and other.blocks[1].width == 4
    parts = [(own, number, rows) for own, rows in ((one, slice(0, 2)), (other, slice(2, 3))) for number in range(2)]
    for own, number, rows in parts:
        old, new = own.view(number), arena.view(number)
        for name, tensor in vars(old).items():
            assert torch.equal(getattr(new, name)[rows][:, :, : tensor.shape[2]], tensor)
        assert (new.positions[rows][:, :, old.positions.shape[2] :] == -1).all()
    opened = arena.open(torch.tensor([20, 30, 20])), {id(one): one.open(torch.tensor([20, 30]))}
    opened[1][id(other)] = other.open(torch.tensor([20]))
    for own, number, rows in parts:
        slots = opened[0].slot[arena.units(number)].view(3, 2)
        assert torch.equal(slots[rows].flatten(), opened[1][id(own)].slot[own.units(number)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_views_of_one_piece_of_memory(dtype):
    arena, inside = made(dtype)
    assert arena.num_slots == 2 * 2 * 5 + 2 * 2 * 7 and arena.storage.keys.shape == (49, 3)
    assert arena.start.tolist() == [0, 5, 10, 15, 20, 27, 34, 41] and arena.row.tolist() == [0, 0, 1, 1] * 2
    assert arena.storage.keys.dtype == dtype
    assert arena.storage.rates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for number, slots in enumerate(inside):
        view, width = arena.view(number), slots.positions.shape[-1]
        assert view.positions.shape == (2, 2, BLOCKS[number].width)
        for name, tensor in vars(slots).items():
            assert torch.equal(getattr(view, name)[:, :, :width], tensor)
            assert getattr(view, name).data_ptr() == getattr(arena.storage, name)[arena.start[4 * number]].data_ptr()
        assert (view.positions[:, :, width:] == -1).all()
    assert [arena.units(number) for number in (0, 1)] == [slice(0, 4), slice(4, 8)]
    numbers = torch.arange(49)
    assert [part.shape for part in arena.split_slots(numbers[:48])] == [(2, 2, 5), (2, 2, 7)]
    assert [part.tolist() for part in arena.split_units(numbers[:8])] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert torch.equal(arena.split_slots(numbers[:48])[1], numbers[20:48].view(2, 2, 7))


def test_tokens_take_free_slots_until_segments_are_full():
    arena, inside = made()
    taken = []
    for step in range(2):
        opened = arena.open(torch.tensor([100 + step, 200 + step]))
        again = arena.open(torch.tensor([100 + step, 200 + step]))
        assert torch.equal(opened.slot, again.slot), "a step without its end changes nothing but its slots"
        assert torch.equal(opened.live, arena.storage.positions[:48] >= 0)
        arena.close(opened, None)
        taken.append(opened.slot.tolist())
    assert taken == [[3, 3, 2, 2, 5, 5, 1, 1], [4, 4, 3, 3, 6, 6, 2, 2]]
    for number, slots in enumerate(inside):
        for row, new in enumerate(([100, 101], [200, 201])):
            before = [[p for p in head if p >= 0] for head in slots.positions[row].tolist()]
            assert live(arena, number)[row] == [[*head, *new] for head in before]
    assert arena.storage.positions[48] == -1


def test_a_row_that_takes_no_token_keeps_its_slot_free():
    arena, _ = made()
    before = arena.storage.positions.clone()
    for position in (100, 101):
        opened = arena.open(torch.tensor([position, -1]))
        arena.close(opened, torch.tensor([True, False]))
    assert opened.slot.tolist() == [4, 4, 2, 2, 6, 6, 1, 1] and arena.taken.tolist() == [2, 2, 0, 0] * 2
    assert torch.equal(arena.view(0).positions[1], before[10:20].view(2, 5))
    assert [head[-2:] for head in live(arena, 1)[0]] == [[100, 101]] * 2


def test_a_unit_without_a_free_slot_leaves_the_others_alone():
    """As of a row that is not evicted any more, for it is not finite."""
    arena, _ = made()
    tables = StepTables(arena, 32, None)
    for position in range(2):
        arena.close(arena.open(torch.tensor([100 + position] * 2)), None)
    before = arena.storage.positions.clone()
    opened = arena.open(torch.tensor([102, 202]))
    tables.fill(opened)
    full = opened.slot < 0
    assert full.any() and not full.all()
    changed = (arena.storage.positions != before).nonzero().flatten()
    assert changed.tolist() == (arena.start + opened.slot)[~full].tolist()
    assert arena.storage.positions[arena.num_slots] == -1 and (opened.position >= 0).tolist() == (~full).tolist()
    # Keys and values go into the unit's own segment.
    place = torch.cat([table.place + arena.first(number) for number, table in enumerate(tables.blocks)])
    ends = torch.tensor([block.width for block in arena.blocks for _ in range(4)])
    assert ((place >= arena.start) & (place < arena.start + ends)).all()


def test_the_slots_of_victims_are_taken_next():
    arena, _ = made()
    for position in range(2):
        arena.close(arena.open(torch.tensor([100 + position] * 2)), None)
    units, nobody = torch.arange(4), arena.num_slots
    slot = torch.tensor([[0, 3], [4, 1], [2, 0], [0, 0]])
    due = torch.tensor([True, True, True, False])
    where = torch.where(due[:, None], arena.start[:4, None] + slot, nobody)
    kept, later = arena.storage.positions[15:48].clone(), arena.free[3, 2:].tolist()
    arena.storage.log_mass.fill_(0.5)
    arena.release(units, where, slot, due[:, None].expand_as(slot))
    assert (arena.storage.positions[where[:3].flatten()] == -1).all() and arena.storage.positions[nobody] == -1
    assert torch.equal(arena.storage.positions[15:48], kept), "what is not due, and other blocks, keep their slots"
    for statistic in (arena.storage.scores, arena.storage.rates, arena.storage.log_mass):
        assert not statistic[where[:3].flatten()].any()
    assert arena.storage.log_mass[15:48].all()
    assert arena.taken.tolist() == [0, 0, 0, 0, 2, 2, 2, 2] and arena.free[3, : len(later)].tolist() == later
    for step in range(2):
        opened = arena.open(torch.tensor([300 + step, 400 + step]))
        assert opened.slot[:3].tolist() == slot[:3, step].tolist()
        arena.close(opened, None)


def test_columns_stop_where_a_segment_ends():
    arena, _ = made()
    both = arena.columns([0, 1])
    assert both.shape == (8, 7) and both[1].tolist() == [5, 6, 7, 8, 9, 48, 48]
    assert both[7].tolist() == list(range(41, 48))
    assert arena.columns([1]).tolist() == both[4:].tolist() and arena.columns([0]).tolist() == both[:4, :5].tolist()
    assert arena.columns((0, 1)) is both, "made once"


def test_rows_are_selected_with_their_free_slots():
    arena, _ = made()
    arena.close(arena.open(torch.tensor([100, -1])), torch.tensor([True, False]))
    index = torch.tensor([1, 0, 1])
    chosen = arena.select_rows(index)
    assert [block.room for block in chosen.blocks] == [(5, 5, 5), (4, 7, 4)]
    for number in (0, 1):
        for name, tensor in vars(chosen.view(number)).items():
            assert torch.equal(tensor, getattr(arena.view(number), name)[index])
    before = [arena.storage.positions.clone(), arena.taken.clone()]
    opened = chosen.open(torch.tensor([107, 108, 109]))
    chosen.close(opened, None)
    assert opened.slot.tolist() == [2, 2, 4, 4, 2, 2, 1, 1, 6, 6, 1, 1]
    assert [head[-1] for head in (rows[0] for rows in live(chosen, 0))] == [107, 108, 109]
    assert torch.equal(arena.storage.positions, before[0]) and torch.equal(arena.taken, before[1])
