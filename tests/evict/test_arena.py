"""Evictions in an arena against loops over Python lists: every rule, ragged rows, blocks of different widths, tokens in
between. And that their operators are as many for few layers as for many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2o_dist import D2OCache
from d2o_dist.cache.evictions import Evictions
from d2o_dist.comm.request import RequestRanks
from d2o_dist.evict.arena import ArenaEvictions, DueBlocks
from d2o_dist.evict.budgets import rows_due
from d2o_dist.evict.exchange import ByHeads, lowest_first
from d2o_dist.policy.merge import nearest_kept
from d2o_dist.policy.storage import Exact
from d2o_dist.slots.arena import Arena, Block
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.slots import D2OState, Slots
from d2o_dist.slots.store import SlotStore
from tests.core.naive import naive_compress, to_lists
from tests.evict.test_prompt import BASE, RULES, random_slots
from tests.models import tiny_model, tokens
from tests.spec import flat, spec

TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}


@dataclass(frozen=True)
class Case:
    """heads: of each block. budgets, held: per block, those of each row and the slots that it begins with."""

    heads: int
    interval: int
    budgets: list[list[int]]
    held: list[list[int]]


CASES = {
    "one": Case(2, 4, [[8]], [[8]]),
    "every token": Case(3, 1, [[9, 5], [14, 4]], [[9, 5], [14, 4]]),
    # Rows that have not reached their budgets, a budget smaller than the sinks, and none at all.
    "ragged": Case(2, 3, [[6, 11, 3], [9, 20, 5], [2, 0, 12]], [[6, 9, 3], [9, 11, 5], [2, 0, 10]]),
    # Heads with budgets of their own.
    "heads": Case(1, 3, [[8, 9], [5, 4], [15, 10], [3, 12]], [[8, 9], [5, 4], [13, 10], [3, 12]]),
}


@dataclass
class Twin:
    """An arena, and what its evictions remember; tokens are put into both it and the loops' lists."""

    case: Case
    config: object
    rules: object
    dtype: torch.dtype
    seed: int
    taus: dict[tuple[int, int], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case = self.case
        self.held = [list(rows) for rows in case.held]
        blocks = [
            Block(case.heads, max(rooms), tuple(rooms))
            for rooms in ([budget + case.interval for budget in rows] for rows in case.budgets)
        ]
        arena = Arena(blocks, Codec(Exact(), (4, 4), self.dtype), torch.device("cpu"))
        slots = [random_slots(rows, case.heads, 4, self.seed + n, self.dtype) for n, rows in enumerate(case.held)]
        for number, (one, rows) in enumerate(zip(slots, case.held, strict=True)):
            SlotStore.of(with_ties(one).in_order(), rows).enter(arena.view(number), arena.codec, blocks[number].room)
        free = [block.room[row] - held for block, rows in zip(blocks, case.held, strict=True)
                for row, held in enumerate(rows)]  # fmt: skip
        arena.settle(max(free))
        self.seen = torch.stack([one.positions.amax((1, 2)) + 1 for one in slots]).amax(0)
        most = max(1, *(self.config.split(budget)[1] for rows in case.budgets for budget in rows))
        newest = [
            ([-1] * most + sorted(p for p in head if p >= 0))[-most:]
            for one in slots for row in one.positions.tolist() for head in row
        ]  # fmt: skip
        self.evictions = ArenaEvictions(
            arena, self.config, torch.tensor(newest), self.seen.clone(), nearest_kept, ByHeads(RequestRanks.alone())
        )
        self.states = [D2OState() for _ in blocks]
        self.taus = {(number, row): None for number in range(len(blocks)) for row in range(len(self.seen))}

    def put(self, present: list[bool], new: Slots) -> None:
        """One token a row [B, h, 1, ...] of those that are present, into every block."""
        arena, here = self.evictions.arena, torch.tensor(present)
        opened = arena.open(self.seen.masked_fill(~here, -1))
        for number, block in enumerate(arena.blocks):
            where = (arena.start + opened.slot)[arena.units(number)].view(-1, block.heads)
            for name in ("keys", "values", "scores", "rates"):
                getattr(arena.storage, name)[where[here]] = getattr(new, name)[here][:, :, 0]
        arena.close(opened, here)
        self.seen += here
        self.held = [[count + one for count, one in zip(rows, present, strict=True)] for rows in self.held]

    def lists(self, number: int, row: int) -> list[dict]:
        """A row of a block for the loops, in float64."""
        slots = self.evictions.arena.view(number).in_order()
        return to_lists(slots.map(lambda x: x.double() if x.is_floating_point() else x), row)

    def evict(self) -> list[int]:
        """What is due, and all else, against the loops; the blocks that were due."""
        both = zip(self.case.budgets, self.held, strict=True)
        due, left = zip(*(rows_due(budgets, held, self.case.interval) for budgets, held in both), strict=True)
        blocks = [number for number, rows in enumerate(due) if any(rows)]
        if not blocks:
            return []
        before = {key: self.lists(*key) for key in self.taus}
        surplus = [old - new for n in blocks for old, new in zip(self.held[n], left[n], strict=True)]
        slots = [budget for number in blocks for budget in self.case.budgets[number]]
        state, victims = self.evictions.run(
            DueBlocks(tuple(blocks), tuple(surplus), tuple(slots)),
            D2OState.cat([self.states[number] for number in blocks], [len(self.seen)] * len(blocks)),
            self.seen,
        )
        rows = len(self.seen)
        for number, own, gone in zip(blocks, state.split(rows), victims.split(rows), strict=True):
            self.states[number] = own
            for row, is_due in enumerate(due[number]):
                lists = before[number, row]
                if is_due:
                    split = self.config.split(self.case.budgets[number][row])
                    before[number, row], self.taus[number, row] = naive_compress(
                        lists, *split, self.taus[number, row], self.rules, finalize=False
                    )
                found = [[p for p in head if p >= 0] for head in gone[row].tolist()]
                both = zip(lists, before[number, row], strict=True)
                assert found == [[p for p in old["p"] if p not in new["p"]] for old, new in both]
                self.check_state(number, row)
        self.held = [list(rows) for rows in left]
        for (number, row), lists in before.items():
            self.check(number, row, lists)
        return blocks

    def check_state(self, number: int, row: int) -> None:
        if self.config.merge.merges:
            tau, found = self.taus[number, row], float(self.states[number].threshold[row])
            assert math.isnan(found) if tau is None else found == pytest.approx(tau, rel=TOLERANCE[self.dtype]["rtol"])

    def check(self, number: int, row: int, expected: list[dict]) -> None:
        """A row of a block holds what the lists hold, and what is free of it is clean."""
        view = self.evictions.arena.view(number)
        for found, head in zip(self.lists(number, row), expected, strict=True):
            assert found["p"] == head["p"] and len(head["p"]) == self.held[number][row]
            for name in "kvsrm":
                got, want = ([torch.as_tensor(x) for x in lists[name]] for lists in (found, head))
                if want:
                    torch.testing.assert_close(torch.stack(got), torch.stack(want), **TOLERANCE[self.dtype])
        free = view.positions[row] < 0
        assert not any(getattr(view, name)[row][free].any() for name in ("scores", "rates", "log_mass"))


def with_ties(slots: Slots) -> Slots:
    """Slots that also tie by their rates."""
    return slots.replace(rates=torch.where(slots.live, (slots.rates * 6).round() / 6 + 1e-3, 0))


def some_tokens(batch: int, heads: int, seed: int, dtype: torch.dtype) -> Slots:
    """One token a row [B, h, 1, ...] with statistics that tie with others; some keys are zero."""
    new = with_ties(random_slots([5] * batch, heads, 4, seed, dtype)).map(lambda x: x[:, :, :1])
    return new.replace(keys=torch.zeros_like(new.keys)) if seed % 3 == 0 else new


def configuration(rule: str):
    names = {**BASE, **RULES[rule]}
    return spec("paper_minmax", **names), flat("paper_minmax", **names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_loops_over_successive_evictions(rule, case, dtype, seed):
    config, rules = configuration(rule)
    twin = Twin(CASES[case], config, rules, dtype, 100 * seed)
    rows, num_evicted = len(twin.seen), dict.fromkeys(range(len(twin.held)), 0)
    for step in range(4 * CASES[case].interval + 7):
        # Now and then a row takes no token: it is due later than the others.
        present = [rows == 1 or (step + row + seed) % 4 > 0 for row in range(rows)]
        twin.put(present, some_tokens(rows, CASES[case].heads, 1000 * seed + step, dtype))
        for number in twin.evict():
            num_evicted[number] += 1
    assert min(num_evicted.values()) >= 2, "every block evicted again and again"


@pytest.mark.parametrize("rule", ["mass_tail", "released", "recent", "keys_values"])
def test_a_row_that_is_not_due_changes_nothing(rule):
    config, rules = configuration(rule)
    twin = Twin(CASES["ragged"], config, rules, torch.float64, 7)
    for step in range(3):
        twin.put([True, False, False], some_tokens(3, 2, step, torch.float64))
    before = [[twin.lists(number, row) for row in (1, 2)] for number in range(3)]
    assert twin.evict() == [0, 1, 2]
    for number, rows in enumerate(before):
        for row, lists in enumerate(rows, 1):
            twin.check(number, row, lists)
            state = twin.states[number]
            assert (state.num_merged[row], state.num_dropped[row]) == (0, 0)
            assert state.threshold is None or state.threshold[row].isnan()
        assert int(state.num_merged[0] + state.num_dropped[0]) == 3 * 2


@pytest.mark.parametrize("rule", ["mass_tail", "keys_values"])
def test_selected_rows_go_on_as_they_would_have(rule):
    config, rules = configuration(rule)
    twin = Twin(CASES["ragged"], config, rules, torch.float64, 3)
    index = torch.tensor([2, 0, 2, 1])
    for step in range(5):
        twin.put([True, step % 2 == 0, True], some_tokens(3, 2, step, torch.float64))
        twin.evict()
    case = Case(2, 3, *([[rows[i] for i in index] for rows in of] for of in (twin.case.budgets, twin.held)))
    other = Twin(case, config, rules, torch.float64, 3)
    other.evictions, other.seen = twin.evictions.select_rows(index), twin.seen[index]
    other.states = [state.map(lambda x: x[index]) for state in twin.states]
    other.taus = {(n, row): twin.taus[n, int(old)] for n in range(3) for row, old in enumerate(index)}
    for step in range(5, 14):
        new, present = some_tokens(3, 2, step, torch.float64), [step % 3 > 0, True, True]
        other.put([present[i] for i in index], new.map(lambda x: x[index]))
        other_due = other.evict()
        twin.put(present, new)
        assert twin.evict() == other_due
        for number in range(3):
            mine, chosen = (one.evictions.arena.view(number).in_order() for one in (twin, other))
            for name, tensor in vars(mine).items():
                assert torch.equal(tensor[index], getattr(chosen, name)), name


def pairs(left: torch.Tensor, right: torch.Tensor) -> list[list[tuple]]:
    """Row by row."""
    return [list(zip(*rows, strict=True)) for rows in zip(left.tolist(), right.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kinds", [1, 2, 5, 1000])
def test_lowest_first_sorts_as_python_does(dtype, kinds):
    """Many that rank alike; free slots, which rank last; both zeros, which are one number."""
    generator = torch.Generator().manual_seed(kinds)
    for width in (1, 2, 7, 40):
        ranking = (torch.randint(-kinds, kinds + 1, (6, width), generator=generator) / 3).to(dtype)
        ranking[ranking == 0] *= torch.where(torch.rand(int((ranking == 0).sum()), generator=generator) > 0.5, 1, -1)
        positions = torch.stack([torch.randperm(3 * width, generator=generator)[:width] for _ in range(6)])
        free = torch.rand(6, width, generator=generator) > 0.8
        ranking, positions = ranking.masked_fill(free, torch.inf), positions.masked_fill(free, -1)
        for count in range(1, width + 1):
            index = lowest_first(ranking, positions, count)
            assert index.shape == (6, count) and all(len(set(row)) == count for row in index.tolist())
            sorts = [sorted(row, key=lambda one: (one[0], -one[1]))[:count] for row in pairs(ranking, positions)]
            assert pairs(ranking.gather(1, index), positions.gather(1, index)) == sorts


class Counted(TorchDispatchMode):
    """How many operators were called."""

    num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def operators_of_evictions(monkeypatch, num_layers: int, preset: str, dtype: torch.dtype) -> list[int]:
    """Of the first four evictions of a model, while it decodes."""
    monkeypatch.undo()
    model = tiny_model(num_hidden_layers=num_layers).to(dtype)
    cache = D2OCache(model.config, spec(preset, keep_ratio=0.3, min_layer_tokens=12, eviction_interval=4))
    model(tokens(2, 60), past_key_values=cache)
    evict, found = Evictions.while_decoding, []

    def counted(evictions: Evictions, *args) -> bool:
        with Counted() as mode:
            took_place = evict(evictions, *args)
        if took_place:
            found.append(mode.num_calls)
        return took_place

    monkeypatch.setattr(Evictions, "while_decoding", counted)
    for step in range(16):
        model(tokens(2, 1, seed=step), past_key_values=cache)
    assert all(layer.num_dropped for layer in cache.report().layers)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("preset", ["d2o", "lean", "h2o"])
def test_an_eviction_calls_as_many_operators_for_many_layers_as_for_few(preset, dtype, record_property, monkeypatch):
    """Beside the first one, which tells the device what the host knows of each block."""
    few, more, many = (operators_of_evictions(monkeypatch, layers, preset, dtype) for layers in (2, 4, 8))
    assert len(few) == 4 and few[1:] == more[1:] == many[1:] == [few[1]] * 3
    record_property("operators", few[1])
