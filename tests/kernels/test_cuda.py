"""The kernels in CUDA C++: the same source, built as loops over blocks and threads, against the oracles on a CPU.

Threads and blocks take turns in several orders. What depends on the order is wrong: a thread read what another wrote in
the same phase, or a block what another block writes.
"""

import ast
from pathlib import Path

import pytest
import torch

from d2o_dist.bench import cuda_step, layers
from d2o_dist.bench.checks import cuda_checks, cuda_evict
from d2o_dist.compression.evict import steps_in_place
from d2o_dist.config import D2OConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.core.types import D2OState, Slots
from d2o_dist.engine.session import Session
from d2o_dist.kernels import backend
from d2o_dist.kernels.backend import set_backend
from d2o_dist.kernels.cuda import build, library
from d2o_dist.kernels.cuda.append import cuda_append
from d2o_dist.kernels.cuda.evict import EvictionRows, cuda_evict_over_ranks, serves_eviction
from d2o_dist.kernels.cuda.evict import cuda_evict as evict
from d2o_dist.kernels.cuda.library import Host, host_build
from d2o_dist.kernels.update_scores import naive_update_scores, slot_probabilities, update_scores
from tests.kernels.cuda_ranks import on_rank_in_cuda
from tests.kernels.helpers import make
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks
from tests.sharded.play import Play, assert_same, play
from tests.test_house import REPO, imported, sources

SCHEDULES = (0, 1, 2, 7)  # in order, backwards, two mixed
needs_compiler = pytest.mark.skipif(build.find_host_compiler() is None, reason="no C++ compiler on this machine")
CHECKS = [pytest.param(check, SCHEDULES[n % len(SCHEDULES)], id=f"{check.op}-{check.name}")
          for n, check in enumerate(cuda_checks())]  # fmt: skip


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Path:
    return build.build_host(tmp_path_factory.mktemp("cuda") / "libhost.so")


@pytest.fixture
def on_cpu(host, monkeypatch):
    """Backend `cuda` serves CPU tensors."""
    monkeypatch.setattr(backend, "_chosen", "auto")
    with host_build(Host(host)):
        set_backend("cuda")
        yield


@needs_compiler
@pytest.mark.parametrize("check, schedule", CHECKS)
def test_equals_its_oracle(host, check, schedule):
    with host_build(Host(host, schedule)):
        result = check.run("cpu")
    assert result.errors and {name: x for name, x in result.errors.items() if not x[0] <= x[1]} == {}


@needs_compiler
@pytest.mark.parametrize("name", ["mass_tail", "ragged", "all_of_a_part", "released"])
def test_no_order_of_threads_and_blocks_changes_a_bit(host, name):
    case, found = cuda_evict.CASES[name], []
    config = D2OConfig.preset("paper_minmax", **{"num_sink_tokens": 2, **case.rule})
    rows = EvictionRows(case.held, [x or n for x, n in zip(case.heavy, case.held, strict=True)], case.recent, case.held)
    for schedule in range(9):
        slots = cuda_evict.buffers_of(case, torch.bfloat16, "cpu")
        with host_build(Host(host, schedule)):
            state = evict(slots, rows, D2OState(), config, num_parts=4)
        found.append((*vars(slots).values(), *vars(state).values()))
    for other in found[1:]:
        assert all(torch.equal(one.nan_to_num(7), two.nan_to_num(7)) for one, two in zip(found[0], other, strict=True))


def random_slots(held: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> Slots:
    keys, values = make(1, heads, held, dim, dtype=dtype), make(1, heads, held, dim, dtype=dtype, seed=1)
    statistics = (make(1, heads, held, dtype=torch.float32, seed=seed).abs() for seed in (2, 3, 4))
    return Slots(keys, values, torch.arange(held).expand(1, heads, held).clone(), *statistics)


@needs_compiler
def test_every_bfloat16_and_float16_is_stored_and_read_as_torch_does(on_cpu):
    """One victim whose weight is e folded into an equal slot: means of all numbers, and rounding to even."""
    for dtype in (torch.bfloat16, torch.float16):
        slots = random_slots(9, heads=1, dim=65536, dtype=dtype)
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        slots.values[0, 0, 4], slots.values[0, 0, 5] = every, every.flip(0)
        slots.keys[:] = 1
        slots.scores[0, 0] = torch.tensor([9.0, 9, 9, 9, 9, 0, 9, 9, 9])
        config = D2OConfig.preset("paper_minmax", num_sink_tokens=0, merge="values", merge_targets="tail")
        slots.scores[0, 0, 4] = 1  # the lowest that is kept: the only target
        evict(slots, EvictionRows((9,), (6,), (2,), (9,)), D2OState(), config)
        weight = torch.tensor(1.0).exp()
        mean = (torch.tensor(2.718281828459045) * every.float() + weight * every.flip(0).float()) / (
            torch.tensor(2.718281828459045) + weight
        )
        got, want = slots.values[0, 0, 4], mean.to(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        same = want.isfinite()
        assert ((got.view(torch.int16) - want.view(torch.int16))[same].abs() <= 1).all()
        assert (got == want)[same].double().mean() > 0.99


@needs_compiler
def test_kept_slots_hold_their_bits(on_cpu):
    """Whatever the bits: NaN with a payload, negative zero, subnormal numbers."""
    slots = random_slots(40, dtype=torch.bfloat16)
    slots.values.view(torch.int16).copy_(torch.arange(2 * 40 * 16).view(1, 2, 40, 16) * 40503 % 65536 - 32768)
    before = slots.map(torch.clone)
    evict(slots, EvictionRows((40,), (20,), (5,), (40,)), D2OState(), D2OConfig(merge="none"))
    for head in range(2):
        kept = slots.positions[0, head, :25]
        assert torch.equal(kept.sort().values, kept) and (slots.positions[0, head, 25:] == -1).all()
        for name in ("keys", "values"):
            got, old = (getattr(x, name)[0, head].view(torch.int16) for x in (slots, before))
            assert torch.equal(got[:25], old[kept])


@needs_compiler
def test_the_op_takes_it_where_it_was_chosen(on_cpu, monkeypatch):
    from d2o_dist.kernels.cuda import update_scores as module

    calls, kernel = [], module.cuda_update_scores
    monkeypatch.setattr(module, "cuda_update_scores", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    logits = make(2, 4, 30, dtype=torch.float32)
    scores, expected = torch.ones(2, 2, 30), torch.ones(2, 2, 30)
    update_scores(logits, logits.logsumexp(-1), scores)
    naive_update_scores(logits, logits.logsumexp(-1), expected)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(slot_probabilities(logits, logits.logsumexp(-1), 2), expected - 1)
    assert len(calls) == 2
    update_scores(logits.double(), logits.double().logsumexp(-1), scores.double())
    assert len(calls) == 2  # float64 is not for it


def assert_plays_alike(found: dict, wanted: dict) -> None:
    # Means of similarities are added up in another order.
    for mine, theirs in zip(found["thresholds"], wanted["thresholds"], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0, equal_nan=True)
    assert_same(found | {"thresholds": wanted["thresholds"]}, wanted, tolerance=1e-3)


PLAYS = {
    "d2o": Play(dtype=torch.float32),
    "ragged": Play(lengths=(61, 97, 30), dtype=torch.float32, ends=(1,)),
    "mass": Play(preset="mass", family="qwen2", dtype=torch.float32),
    "span_turn": Play(preset="span", lengths=(80, 50), turn=(20, 9), dtype=torch.float32),
    "reach_turn": Play(preset="reach", lengths=(80, 50), turn=(20, 9), dtype=torch.float32),
    "paper": Play(preset="paper", family="llama_mha", steps=12, dtype=torch.float32),
    "released": Play(preset="released", steps=12, dtype=torch.float32),
    "h2o": Play(preset="h2o", dtype=torch.float32),
    "streaming": Play(preset="streaming", family="gemma3", dtype=torch.float32),
}


@needs_compiler
@pytest.mark.parametrize("name", PLAYS)
def test_a_model_decodes_as_with_the_other_backends(host, monkeypatch, name):
    """Evictions and appends of the cache itself: positions, budgets and tokens equal, thresholds and logits near."""
    from d2o_dist.kernels.cuda import append
    from d2o_dist.kernels.cuda import evict as module

    wanted = play(PLAYS[name])
    calls = {"append": 0, "evict": 0}

    def counted(kind: str, original):
        def run(*args, **kwargs):
            calls[kind] += 1
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(append, "cuda_append", counted("append", append.cuda_append))
    monkeypatch.setattr(module, "cuda_evict", counted("evict", module.cuda_evict))
    monkeypatch.setattr(backend, "_chosen", "auto")
    with host_build(Host(host, 1)):
        set_backend("cuda")
        found = play(PLAYS[name])
    assert_plays_alike(found, wanted)
    assert calls["append"] > 40 and calls["evict"] > 3


@needs_compiler
def test_heads_with_budgets_of_their_own_are_evicted_by_others(host, monkeypatch, caplog):
    """Their tokens it appends all the same, and the logits are those without it."""
    from d2o_dist.kernels.cuda import evict as module

    def run() -> torch.Tensor:
        session = Session(tiny_model().float(), D2OConfig.preset("reread", eviction_interval=3, keep_ratio=0.4))
        logits = [session.prefill(*left_padded([60, 41], 3))]
        for token in range(2, 12):
            logits.append(session.decode([token, token + 1]))
        return torch.stack(logits)

    def refused(*args, **kwargs):
        raise AssertionError("evicted in CUDA C++")

    with torch.inference_mode():
        wanted = run()
        monkeypatch.setattr(module, "cuda_evict", refused)
        monkeypatch.setattr(backend, "_chosen", "auto")
        backend._say.cache_clear()
        with host_build(Host(host, 1)):
            set_backend("cuda")
            found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    said = [x.levelname for x in caplog.records if "evictions of heads with budgets of their own" in x.message]
    assert said == ["WARNING"]


@needs_compiler
@pytest.mark.multirank
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=2, tp_engine="transformers", check_replicas=True),
        ParallelConfig(sp=2, sp_prefill="ulysses", cache_layout="heads", check_replicas=True),
    ],
    ids=["tp", "sp_by_heads"],
)
def test_ranks_that_share_the_heads_decode_as_one_process(host, parallel):
    one = Play(preset="mass", lengths=(61, 40), dtype=torch.float32)
    wanted = play(one)
    for found, evictions in run_ranks(2, on_rank_in_cuda, one, parallel, host, fresh=True):
        assert_plays_alike(found, wanted)
        assert evictions > 3


@needs_compiler
def test_a_whole_eviction_of_what_it_does_not_serve_is_left_to_others(on_cpu, caplog):
    """Rows that are not whole words of sixteen bytes; float64."""
    assert serves_eviction(random_slots(9)) and not serves_eviction(random_slots(9, dim=6))
    assert not serves_eviction(random_slots(9, dim=12, dtype=torch.bfloat16))
    assert not serves_eviction(random_slots(9, dtype=torch.float64))
    assert not serves_eviction(random_slots(9).map(lambda x: x[:, :, ::2]).map(lambda x: x.transpose(0, -1)))
    lists = dict(held=[9], kept=[6], num_seen=[9], all_heads_here=True)
    backend._say.cache_clear()
    assert steps_in_place(random_slots(9, dim=6), D2OState(), D2OConfig(), **lists) is None
    assert [x.levelname for x in caplog.records if "6 numbers in torch.float32" in x.message] == ["WARNING"]
    assert steps_in_place(random_slots(9), D2OState(), D2OConfig(), **lists) is not None
    set_backend("torch")
    assert steps_in_place(random_slots(9), D2OState(), D2OConfig(), **lists) is None


@needs_compiler
@pytest.mark.parametrize(
    "name", ["ragged", "released", "mass_tail", "bounded_tail", "quantile", "none", "capped_mass", "turned"]
)
def test_heads_on_two_ranks_give_what_one_gives(on_cpu, name):
    """Two launches a rank, and an exchange of reports between them; one head here, the others there."""
    case, dtype = cuda_evict.CASES[name], torch.float32
    config = D2OConfig.preset("paper_minmax", **{"num_sink_tokens": 2, **case.rule})
    rows = EvictionRows(case.held, [x or n for x, n in zip(case.heavy, case.held, strict=True)], case.recent, case.held)
    whole, state = cuda_evict.buffers_of(case, dtype, "cpu"), D2OState()
    parts = [whole.map(lambda x: x[:, :1].clone()), whole.map(lambda x: x[:, 1:].clone())]
    states = [D2OState(), D2OState()]
    for number in range(2):
        state = evict(whole, rows, state, config)
        steps = [cuda_evict_over_ranks(*each, config, num_parts=2) for each in
                 ((part, rows, one) for part, one in zip(parts, states, strict=True))]  # fmt: skip
        found = run_in_turns(steps)
        states = [one for _, one in found]
        for name in vars(whole):
            mine, theirs = torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name)
            if name in ("keys", "values"):  # those of freed slots are anything
                mine, theirs = (x.masked_fill(whole.positions.unsqueeze(-1) < 0, 0) for x in (mine, theirs))
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(states[0].num_merged + states[1].num_merged, state.num_merged)
        assert torch.equal(states[0].num_dropped + states[1].num_dropped, state.num_dropped)
        if config.merge == "none":
            assert states[0].threshold is None
        else:
            for one in states:
                torch.testing.assert_close(one.threshold, state.threshold, rtol=1e-6, atol=0, equal_nan=True)
        # New tokens in the room that was freed: the same for both.
        for slots, first in ((whole, 0), (parts[0], 0), (parts[1], 1)):
            here = slice(first, first + slots.keys.shape[1])
            fresh = cuda_evict.buffers_of(case, dtype, "cpu").map(lambda x, here=here: x[:, here])
            free = slots.positions < 0
            for name in ("keys", "values", "scores", "rates"):
                old, new = getattr(slots, name), getattr(fresh, name)
                old.copy_(torch.where(free if old.dim() == 3 else free.unsqueeze(-1), new, old))
            later = 1000 * (number + 1) + torch.arange(free.shape[-1])
            inside = torch.arange(free.shape[-1]) < torch.tensor(case.held)[:, None, None]
            slots.positions.copy_(torch.where(free & inside, later, slots.positions))


def run_in_turns(steps: list) -> list:
    """All up to what they ask, then each with what all said; one that asks nothing is done at once."""
    asked, done = [], []
    for one in steps:
        try:
            asked.append(next(one))
        except StopIteration as end:
            done.append(end.value)
    for one in steps if asked else []:
        with pytest.raises(StopIteration) as end:
            one.send(torch.cat(asked, 1))
        done.append(end.value.value)
    return done


@needs_compiler
def test_errors_name_both_numbers(on_cpu):
    with pytest.raises(ValueError, match=r"2000 slots a head.*1024"):
        evict(random_slots(2010), EvictionRows((2010,), (6,), (4,), (2010,)), D2OState(), D2OConfig())
    with pytest.raises(ValueError, match=r"12 slots.*have 9"):
        evict(random_slots(9), EvictionRows((12,), (4,), (2,), (12,)), D2OState(), D2OConfig())
    slots, row, where = random_slots(9), torch.zeros(1, 2, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"keys \(1, 2, 8\).*\(1, 2, 9, 16\)"):
        cuda_append(slots, row[..., :8], row, where, where)
    with pytest.raises(ValueError, match=r"index \(2,\).*each of 1 rows"):
        cuda_append(slots, row, row, where.expand(2), where)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_timings_run_and_are_gated(on_cpu, monkeypatch, capsys, dtype):
    tiny = ["--heads", "2/1", "--head-dim", "16", "--length", "340", "--reps", "1", "--groups", "cuda"]
    assert layers.main([*tiny, "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    assert said.count("eviction, paper_minmax, CUDA C++") == 2 and said.count("<= 1.000x") == 5
    monkeypatch.setattr(cuda_step, "_score", lambda layer, *a, in_cuda: layer.layer.store.slots.scores.add_(in_cuda))
    with pytest.raises(SystemExit, match="gate of cuda is red"):
        layers.main([*tiny, "--dtype", dtype])


def test_it_must_be_built(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(backend, "_chosen", "auto")
    with pytest.raises(ValueError, match=r"not built: python -m d2o_dist\.kernels\.cuda\.build"):
        set_backend("cuda")
    assert backend.get_backend() == "auto"


@needs_compiler
def test_a_library_of_another_version_is_refused(host, monkeypatch):
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    with pytest.raises(ValueError, match="has version 3, but this package speaks 99"):
        library.load(host)


@needs_compiler
def test_what_does_not_compile_leaves_no_library(monkeypatch, tmp_path):
    (tmp_path / "bad.cu").write_text("int x = ;")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "bad.cu")
    with pytest.raises(RuntimeError, match="error"):
        build.build_host(tmp_path / "out.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.cu"]


def test_an_import_neither_builds_nor_loads():
    """Outside of its folder the kernels are imported within functions only, once they were chosen."""
    loaded = []
    for path, tree in sources(REPO):
        if not path.is_relative_to("d2o_dist/kernels/cuda"):
            top = ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])
            names = [name for _, name in imported(path, top) if name.startswith("d2o_dist.kernels.cuda")]
            loaded += [(path, name) for name in names if not name.startswith("d2o_dist.kernels.cuda.build.")]
    assert loaded == []
    for path in (REPO / "d2o_dist/kernels/cuda").glob("*.py"):
        body = ast.parse(path.read_text()).body
        assert [x for x in body if isinstance(x, ast.Expr) and isinstance(x.value, ast.Call)] == [], path
