"""Rows that come and go: each is what it is alone, the limits hold, and what fails costs itself."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import Running, generate
from d2o_dist.engine.reading import tokens_while_reading
from d2o_dist.engine.scheduler import Room, Scheduler, longest_first
from d2o_dist.engine.session import Session
from d2o_dist.engine.steady import steady_rows
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.policy.config import D2OConfig
from tests.engine.tiny import Numbers, request
from tests.models import tiny_model, tokens
from tests.spec import spec

LENGTHS = [51, 23, 38, 9, 30, 66, 12, 2]
LIMITS = [30, 5, 22, 12, 1, 17, 8, 9]
SIZES = dict(keep_ratio=0.3, min_layer_tokens=12, eviction_interval=5)
D2O = spec("d2o", **SIZES)
WARM = SamplingConfig(temperature=1.2, top_p=0.95, top_k=30, repetition_penalty=1.1, seed=7)
REQUESTS = [
    request(index, tokens(1, length, seed=index)[0].tolist(), limit)
    for index, (length, limit) in enumerate(zip(LENGTHS, LIMITS, strict=True))
]


def allocated(session) -> float:
    """Slots of all rows that there is room for, or that are held where rooms grow, in a layer in the mean."""
    cache = session.cache.compressed
    blocks = [(layer.blocks, block.store) for layer in map(cache.layers.__getitem__, cache.full_layers)
              for block in layer.blocks]  # fmt: skip
    sizes = [(store.capacity if store.in_arena else max(store.kv_len)) / len(of_layer) for of_layer, store in blocks]
    return sum(sizes) * len(cache.num_seen) / len(cache.full_layers)


class Watch:
    """Runs requests, and notes what happens: ("read", indices) and ("step", indices of the rows that go on); in `sizes`
    for steps of which no row has ended the slots that there are for them.

    Args:
        before: called before each reading or step with its note.
    """

    def __init__(self, model, d2o=D2O, sampling=None, rows=3, most_tokens=10**6, before=lambda note: None, **options):
        self.model, self.d2o, self.sampling = model, d2o, sampling or SamplingConfig()
        self.notes: list[tuple[str, list[int]]] = []
        self.beside: list[list[int]] = []  # rows that went on, of each reading
        self.held: list[float] = []  # slots of the rows that were read before each reading, and have not ended
        self.sizes: list[float] = []
        self.log: list[str] = []
        self.spoilt: tuple[int, int] | None = None
        self._before = before
        room = Room(rows, most_tokens, **options)
        self.scheduler = Scheduler(iter(longest_first(REQUESTS)), self._read, room, log=self.log.append)

    def _note(self, what, requests):
        self.notes.append((what, [each.index for each in requests]))
        self._before(self.notes[-1])

    def _read(self, group):
        going = [] if self.scheduler.running is None else self.scheduler.running.going
        self.beside.append([row.request.index for row in going])
        read = [*([self.scheduler.running] if going else []), *self.scheduler._arrived]
        self.held.append(sum(allocated(each.session) for each in read))
        self._note("read", group)
        watch = self

        class Watched(Running):
            def _take(self, logits):
                """Spoilt: (a row, the new token from which its logits are none)."""
                for place, row in enumerate(self.rows):
                    if watch.spoilt is not None and row.request.index == watch.spoilt[0]:
                        if len(row.result.tokens) + 1 >= watch.spoilt[1]:
                            logits = logits.index_fill(0, torch.tensor(place), torch.nan)
                return super()._take(logits)

            def step(self):
                watch._note("step", [row.request for row in self.going])
                if len(self.going) == len(self.rows):
                    watch.sizes.append(allocated(self.session))
                return super().step()

        return Watched(Session(self.model, self.d2o), group, self.sampling, Numbers())

    def run(self) -> dict[int, object]:
        """Results by index; each request ends once."""
        ended = [each for some in self.scheduler.run() for each in some]
        found = {each.index: result for each, result in ended}
        assert len(ended) == len(found) == len(REQUESTS)
        return found

    def check(self, found, lost=()):
        """All but the lost ones are what they are alone."""
        for each in REQUESTS:
            if each.index not in lost:
                (alone,) = generate(Session(self.model, self.d2o), [each], self.sampling, Numbers())
                mine = found[each.index]
                assert (mine.error, mine.tokens, mine.text) == (None, alone.tokens, alone.text)
                assert mine.usage == alone.usage and mine.finish_reason == alone.finish_reason

    @property
    def joined(self) -> int:
        """Readings beside rows that went on."""
        return sum(bool(going) for going in self.beside)


PRESETS = {
    "d2o": D2O,
    "every token": D2O.replace(eviction_interval=1),
    "paper": spec("paper", **SIZES),
    "released": spec("released", **SIZES),
    "reread": spec("reread", **SIZES),
    "full": spec("full"),
}


@pytest.mark.parametrize(
    ("family", "preset", "sampling"),
    [("llama", preset, None) for preset in PRESETS]
    + [("llama", "d2o", WARM), ("mistral_sliding", "d2o", WARM), ("gemma3", "paper", None)],
)
def test_rows_that_come_and_go_are_the_rows_alone(family, preset, sampling):
    watch = Watch(tiny_model(family), PRESETS[preset], sampling)
    watch.check(watch.run())
    assert watch.joined >= 2


def assert_like(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Products of 4, 8 and more rows are other shapes: what was found of their bits is of processors with AVX-512, and
    others are promised rounding alone (docs/inference.md)."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("family", "preset", "dtype"),
    [("llama", preset, torch.float32) for preset in PRESETS]
    + [("mistral_sliding", "d2o", torch.float32), ("llama", "d2o", torch.bfloat16), ("llama", "paper", torch.float64),
       ("deepseek", "d2o", torch.float32)],
)  # fmt: skip
def test_logits_are_those_of_the_row_alone_to_the_last_bit(family, preset, dtype):
    """Whenever a row comes, whatever the others hold, and whichever its place is."""
    model, seen = tiny_model(family).to(dtype), []

    class Noting(Running):
        def _take(self, logits):
            for row, own in zip(self.rows, logits, strict=True):
                if not row.result.has_ended:
                    seen[-1].setdefault(row.request.index, []).append(own.clone())
            return super()._take(logits)

    def read(group):
        return Noting(Session(model, PRESETS[preset], steady=steady_rows(model)), group, SamplingConfig(), Numbers())

    for rows in (1, 3, 8):
        seen.append({})
        scheduler = Scheduler(iter(longest_first(REQUESTS)), read, Room(rows, 10**6))
        assert all(result.error is None for some in scheduler.run() for _, result in some)
    for row, alone in seen[0].items():
        assert len(alone) == LIMITS[row]
        for others in seen[1:]:
            assert_like(torch.stack(others[row]), torch.stack(alone))


def test_rows_run_as_soon_as_there_is_a_place():
    watch = Watch(tiny_model(num_hidden_layers=2))
    watch.run()
    steps = [group for kind, group in watch.notes if kind == "step"]
    assert len(steps) < sum(LIMITS) / 3 + max(LIMITS) and max(map(len, steps)) == 3
    assert all(len(group) == 1 for kind, group in watch.notes if kind == "read")


@pytest.mark.parametrize("preset", ["d2o", "full", "reread"])
def test_the_limit_of_tokens_holds(preset):
    """For what is held, as memory is allocated, and for prompts that are read beside it."""
    limit, d2o = 100, PRESETS[preset]
    watch = Watch(tiny_model(num_hidden_layers=2), d2o, rows=8, most_tokens=limit)
    watch.check(watch.run())
    assert max(watch.sizes) <= limit
    readings = [group for kind, group in watch.notes if kind == "read"]
    for (row,), going, held in zip(readings, watch.beside, watch.held, strict=True):
        assert not going or LENGTHS[row] + held <= limit
    assert watch.joined >= 1


def test_a_row_beyond_the_limit_runs_alone():
    watch = Watch(tiny_model(num_hidden_layers=2), rows=8, most_tokens=50)
    watch.run()
    for long in (0, 5):
        assert all(group == [long] for _, group in watch.notes if long in group)


def test_more_rows_fit_than_of_the_full_cache():
    model, most = tiny_model(num_hidden_layers=2), []
    for d2o in (spec("full"), D2OConfig(keep_ratio=0.1, budget={"min_layer_tokens": 4}, eviction_interval=2)):
        watch = Watch(model, d2o, rows=8, most_tokens=160)
        watch.run()
        most.append(max(len(group) for kind, group in watch.notes if kind == "step"))
    assert most[1] > 1.5 * most[0]


def test_both_sides_of_a_border_never_run_together():
    watch = Watch(tiny_model(num_hidden_layers=2), rows=8, border=25)
    watch.run()
    assert all(len({LENGTHS[index] > 25 for index in group}) == 1 for _, group in watch.notes)


@pytest.mark.parametrize(
    "config", [D2O, spec("full"), PRESETS["reread"], spec("paper", **{**SIZES, "protected_layers": (0,)}),
               D2O.replace(eviction_interval=None), D2OConfig(keep_tokens=20, budget={"min_layer_tokens": 8})],
)  # fmt: skip
def test_no_row_keeps_more_than_is_counted(config):
    model = tiny_model()
    for each in REQUESTS:
        session = Session(model, config)
        running = Running(session, [each], SamplingConfig(), Numbers())
        while running.going:
            running.step()
            held = [layer.mean_kv_len[0] for layer in session.cache.compressed.layers]
            kept = session.most_kept(0, len(each.input_ids) + each.max_new_tokens)
            heads = len(kept) // len(held)
            assert all(one <= sum(kept[n * heads :][:heads]) / heads for n, one in enumerate(held))


def failing(*bad, at="read", error=MemoryError):
    """Raises when one of some rows is read, or when it makes a step."""

    def before(note):
        kind, group = note
        if kind == at and set(bad) & set(group):
            raise error("no room")

    return before


def test_a_reading_that_fails_costs_one_row():
    watch = Watch(tiny_model(num_hidden_layers=2), before=failing(2))
    found = watch.run()
    assert found[2].error == "MemoryError: no room"
    watch.check(found, lost=[2])
    assert watch.log == ["row 2 failed beside others (MemoryError: no room); it is tried alone"]
    # Tried again when nobody else was there.
    last = max(n for n, note in enumerate(watch.notes) if note == ("read", [2]))
    assert watch.notes[last + 1][0] == "read"


def test_a_step_that_fails_costs_one_row():
    watch = Watch(tiny_model(num_hidden_layers=2), before=failing(3, at="step"), sampling=WARM)
    found = watch.run()
    assert found[3].error == "MemoryError: no room"
    watch.check(found, lost=[3])


def test_nobody_joins_a_row_that_is_tried_alone():
    """Or it would take others with it when it fails again, some steps later."""
    steps = [0]

    def before(note):
        kind, group = note
        steps[0] = 0 if kind == "read" and 2 in group else steps[0] + (kind == "step" and 2 in group)
        if steps[0] > 2 and kind == "step" and 2 in group:
            raise MemoryError("no room")

    watch = Watch(tiny_model(num_hidden_layers=2), before=before)
    found = watch.run()
    assert found[2].error == "MemoryError: no room" and len(watch.log) == 1
    watch.check(found, lost=[2])


def test_rows_that_do_not_fit_together_run_alone():
    def crowded(note):
        if note[0] == "step" and len(note[1]) > 2:
            raise MemoryError("no room")

    watch = Watch(tiny_model(num_hidden_layers=2), before=crowded)
    watch.check(watch.run())


def test_a_prompt_whose_attention_is_no_number_fails_beside_others():
    watch = Watch(tiny_model(num_hidden_layers=2), before=failing(3, error=NotFiniteError), rows=3)
    found = watch.run()
    assert found[3].error == "no room"
    watch.check(found, lost=[3])


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("row", [1, 5])
def test_a_row_without_a_next_token_ends_alone(row, at):
    """One that joined, and the one that was there first."""
    watch = Watch(tiny_model(num_hidden_layers=2), sampling=WARM)
    watch.spoilt = (row, at)
    found = watch.run()
    assert found[row].error.startswith(f"the logits of new token {at}") and len(found[row].tokens) == at - 1
    watch.check(found, lost=[row])
    assert watch.log == []


def test_what_a_failure_raises_ends_the_run():
    class Ends(Exception):
        pass

    def give_up(requests, error):
        raise Ends(len(requests)) from error

    watch = Watch(tiny_model(num_hidden_layers=2), before=failing(5))
    watch.scheduler._on_failure = give_up
    with pytest.raises(Ends):
        watch.run()


def test_a_prompt_that_is_read_layer_by_layer_takes_less_room():
    d2o = spec("lean", keep_ratio=0.2, min_layer_tokens=16)
    assert tokens_while_reading("whole", d2o, 10, 1000) == 1000
    assert tokens_while_reading("layerwise", d2o, 10, 1000) == pytest.approx(300)  # a fifth, and one layer
    assert tokens_while_reading("layerwise", d2o, 10, 20) == pytest.approx(18)  # as many as a layer keeps at least
    assert tokens_while_reading("layerwise", d2o, 10, 10) == 10
    new, held = Request(0, "a", (5,) * 1000, 8), [[300.0] * 10]
    assert not Room(4, 1000).reads(held, [new], new)
    assert Room(4, 1000, reading=lambda count: 0.3 * count).reads(held, [new], new)
