"""Replayed decode steps are those of Python, bit for bit: logits, tokens, and all that the cache holds."""

from __future__ import annotations

import copy
import logging
import weakref

import pytest
import torch

import d2o_dist.cache.window
import d2o_dist.layout.heads
from benchmarks.checks import decode_graph
from d2o_dist import D2OCache
from d2o_dist.cache import evictions as cache_evictions
from d2o_dist.cache import moving
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine import session as session_module
from d2o_dist.engine.cuda_graph import graph_recorder, obstacle
from d2o_dist.engine.loop import generate
from d2o_dist.engine.session import Session, left_pad
from d2o_dist.engine.stepper import Stepper
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.policy.merge import nearest_kept
from tests.engine.tape import HostSync, TapeRecorder, watched
from tests.engine.tiny import Numbers, request
from tests.models import left_padded, tiny_model, tokens
from tests.spec import spec

SIZES = dict(keep_ratio=0.3, min_layer_tokens=12)
INTERVAL = 5
NAMES = ("d2o", "paper_minmax", "mass", "reread", "h2o", "snapkv", "streaming", "released", "paper")
PRESETS = {
    name: spec(name, **SIZES, **({} if name in ("released", "paper") else {"eviction_interval": INTERVAL}))
    for name in NAMES
} | {"full": spec("full")}
BATCHES = {"one": [47], "ragged": [51, 23, 38]}
FIELDS = ("keys", "values", "positions", "scores", "rates", "log_mass")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def prompts_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    ids, mask = left_padded(lengths, seed)
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def pair(model, config, lengths, reading="auto"):
    """Two sessions that read the same prompts: run by Python, and recorded. And their first logits."""
    plain, taped = Session(model, config, reading=reading), Session(model, config, reading=reading)
    record_by(taped, TapeRecorder())
    first = [session.prefill(*left_pad(prompts_of(lengths), 0)) for session in (plain, taped)]
    assert torch.equal(*first)
    return plain, taped, first[0]


def record_by(session: Session, recorder, required: bool = False) -> None:
    """Give a session on a CPU something that records its steps."""
    session._stepper = Stepper(session.model, recorder, required=required)


def assert_same(plain: Session, taped: Session) -> None:
    """All that the two caches hold and count."""
    assert plain.cache.report().to_dict() == taped.cache.report().to_dict()
    for one, other in zip(plain.cache.layers, taped.cache.layers, strict=True):
        assert one.kv_len == other.kv_len
        assert [row.max().item() + 1 for row in one.positions] == plain.cache.compressed.num_seen
        for name in FIELDS:
            left, right = getattr(one, name), getattr(other, name)
            live = one.positions >= 0
            assert torch.equal(live, other.positions >= 0)
            assert torch.equal(left[live], right[live]), (one.index, name)
        if not one.is_sliding and one.threshold is not None:
            assert torch.equal(one.threshold.nan_to_num(-9), other.threshold.nan_to_num(-9))


def go_on(plain, taped, logits, steps, live=None):
    """Greedy steps of both; the logits of the last."""
    for _ in range(steps):
        chosen = logits.argmax(-1).tolist()
        logits, found = plain.decode(chosen, live), taped.decode(chosen, live)
        rows = slice(None) if live is None else torch.tensor(live)
        assert torch.equal(logits[rows], found[rows])
    return logits


@pytest.mark.parametrize(
    ("family", "preset", "batch"),
    [("llama", preset, "ragged") for preset in PRESETS]
    + [("llama", preset, "one") for preset in ("d2o", "mass", "full")]
    + [("qwen3", preset, batch) for preset in ("mass", "released") for batch in BATCHES],
)
def test_replays_are_the_steps_of_python(family, preset, batch):
    """Over several evictions, with groups of two query heads a KV head."""
    plain, taped, logits = pair(tiny_model(family), PRESETS[preset], BATCHES[batch])
    steps = 3 * INTERVAL + 2
    for _ in range(steps):
        logits = go_on(plain, taped, logits, 1)
        assert_same(plain, taped)
    assert taped._stepper.num_replayed == steps - 1
    assert (taped._stepper._recorder.num_warm, taped._stepper._recorder.num_recorded) == (1, 1)
    if preset != "full":
        heads = plain.cache.compressed.kv_heads(0)
        gone = sum(layer.num_merged + layer.num_dropped for layer in plain.cache.report().layers)
        held = sum(sum(layer.mean_kv_len) for layer in plain.cache.layers)
        assert gone == heads * (4 * sum(plain.cache.compressed.num_seen) - held), "evictions took place"


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3", "phi3", "llama_mha", "qwen2", "deepseek"])
def test_other_models(family, monkeypatch):
    """Windows that move, packed projections, biases; a window's buffers grow to their size first."""
    monkeypatch.setattr(d2o_dist.cache.window.WindowLayer, "SLACK", 9)
    plain, taped, logits = pair(tiny_model(family), PRESETS["mass"], [51, 9])
    go_on(plain, taped, logits, 40)
    assert_same(plain, taped)
    assert taped._stepper.num_replayed == 39


def test_half_precision():
    plain, taped, logits = pair(tiny_model().bfloat16(), PRESETS["mass"], BATCHES["ragged"])
    go_on(plain, taped, logits, 2 * INTERVAL + 3)
    assert_same(plain, taped)


def test_layers_that_grow_are_recorded_again(monkeypatch):
    """Protected layers hold everything: when their buffers move, the old recording may not be replayed."""
    monkeypatch.setattr(d2o_dist.layout.heads, "GROWTH", 6)
    plain, taped, logits = pair(tiny_model(), PRESETS["released"], [40, 31])
    go_on(plain, taped, logits, 30)
    assert_same(plain, taped)
    recorder = taped._stepper._recorder
    assert recorder.num_warm == recorder.num_recorded == 5 and taped._stepper.num_replayed == 25


def test_rows_that_end():
    plain, taped, logits = pair(tiny_model(), PRESETS["mass"], [51, 23, 38, 30])
    logits = go_on(plain, taped, logits, 4)
    logits = go_on(plain, taped, logits, INTERVAL + 3, [True, False, True, True])
    # Another row ends: the same recording serves.
    logits = go_on(plain, taped, logits, INTERVAL + 3, [True, False, True, False])
    assert_same(plain, taped)
    assert taped._stepper._recorder.num_recorded == 2
    for session in (plain, taped):
        session.keep_rows([0, 2])
    logits = go_on(plain, taped, logits[[0, 2]], 2 * INTERVAL)
    assert_same(plain, taped)
    assert taped._stepper._recorder.num_recorded == 3


def test_later_turns():
    plain, taped, logits = pair(tiny_model(), PRESETS["d2o"], BATCHES["ragged"])
    go_on(plain, taped, logits, 7)
    more = tokens(3, 11, seed=3)
    turn = [session.prefill(more, torch.ones_like(more)) for session in (plain, taped)]
    assert torch.equal(*turn)
    go_on(plain, taped, turn[0], INTERVAL + 4)
    # Two tokens fit into buffers that need not move for them.
    more = more[:, :2]
    turn = [session.prefill(more, torch.ones_like(more)) for session in (plain, taped)]
    assert torch.equal(*turn)
    go_on(plain, taped, turn[0], INTERVAL + 4)
    assert_same(plain, taped)
    assert taped._stepper._recorder.num_recorded == 3


def test_a_copy_of_the_cache_goes_its_own_way():
    plain, taped, logits = pair(tiny_model(), PRESETS["mass"], BATCHES["one"])
    logits = go_on(plain, taped, logits, 6)
    kept = [copy.deepcopy(session.cache) for session in (plain, taped)]
    go_on(plain, taped, logits, INTERVAL)
    plain.cache, taped.cache = kept
    go_on(plain, taped, logits, INTERVAL + 1)
    assert_same(plain, taped)


@pytest.mark.parametrize("preset", ["mass", "released"])
def test_generate_is_the_same(preset):
    """The whole loop: rows that end at different steps are left out, then let go of."""
    model, found = tiny_model(num_hidden_layers=3), []
    requests = [
        request(index, ids, limit)
        for index, (ids, limit) in enumerate(zip(prompts_of([51, 23, 38, 9]), [30, 5, 22, 12], strict=True))
    ]
    sampling = SamplingConfig(temperature=1.2, top_p=0.95, seed=7)
    for recorder in (None, TapeRecorder()):
        session = Session(model, PRESETS[preset])
        record_by(session, recorder)
        found.append(generate(session, requests, sampling, Numbers()))
    assert [row.tokens for row in found[0]] == [row.tokens for row in found[1]]
    assert [row.usage for row in found[0]] == [row.usage for row in found[1]]
    assert recorder.num_recorded >= 3 and session._stepper.num_replayed > 15


def test_logits_stay_those_of_their_step():
    _, taped, logits = pair(tiny_model(), PRESETS["mass"], BATCHES["one"])
    kept = []
    for token in range(2, 9):
        kept.append(taped.decode([token]))
    assert len({tuple(one[0, :3].tolist()) for one in kept}) == len(kept)


# ---- what cannot be recorded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).any()), lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0], lambda x: torch.tensor([1.0]) + x, lambda x: x.cpu(), lambda x: int(x.argmax()),
        lambda x: torch.unique(x), lambda x: torch.equal(x, x), lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_the_watch_finds_what_a_capture_refuses(sync):
    with pytest.raises(HostSync), watched():
        sync(torch.arange(4.0))


def test_a_number_kept_in_python_is_found():
    """The comparison itself can fail: a step that counts on the host is not what its replay does."""
    count, x, total = [0], torch.ones(3), torch.zeros(3)

    def run():
        count[0] += 1
        total.add_(x * count[0])
        return total * 1

    replay = TapeRecorder().record(run)
    assert torch.equal(total, torch.zeros(3)), "recording changes nothing"
    assert [replay()[0].item() for _ in range(3)] == [1, 2, 3]
    assert [run()[0].item() for _ in range(2)] == [5, 8]


class Refusing(TapeRecorder):
    """Finds an obstacle in the warm-up, or fails in the middle of a recording."""

    def __init__(self, found: str | None, after: int = 0, model=None) -> None:
        super().__init__()
        self.found, self.after, self.model = found, after, model

    def warm_up(self, run):
        return super().warm_up(run)[0], self.found

    def record(self, run):
        layer = self.model.model.layers[self.after]
        handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("not permitted")))
        try:
            return super().record(run)
        finally:
            handle.remove()


def test_an_obstacle_in_the_warm_up_is_told_once(caplog):
    plain, taped, logits = pair(tiny_model(), PRESETS["mass"], BATCHES["ragged"])
    record_by(taped, Refusing("its forward waits"))
    with caplog.at_level(logging.WARNING):
        logits = go_on(plain, taped, logits, 2 * INTERVAL)
        # In the next batch it is no news.
        record_by(taped, Refusing("its forward waits"))
        go_on(plain, taped, logits, 2)
    assert_same(plain, taped)
    assert [record.message for record in caplog.records] == [
        "decode steps are run by Python, not as a CUDA graph: its forward waits"
    ]
    assert taped._stepper.num_replayed == 0


def test_an_obstacle_is_an_error_where_graphs_are_required():
    _, taped, logits = pair(tiny_model(), PRESETS["mass"], BATCHES["one"])
    record_by(taped, Refusing("its forward waits"), required=True)
    with pytest.raises(ValueError, match="cannot be recorded: its forward waits"):
        taped.decode([3])


@pytest.mark.parametrize("after", [0, 2])
def test_a_recording_that_breaks_off_leaves_the_cache_as_it_was(after):
    model = tiny_model()
    plain, taped, logits = pair(model, PRESETS["mass"], BATCHES["ragged"])
    record_by(taped, Refusing(None, after, model))
    logits = go_on(plain, taped, logits, 1)
    chosen = logits.argmax(-1).tolist()
    with pytest.raises(RuntimeError, match="not permitted"):
        taped.decode(chosen)
    assert_same(plain, taped)


def test_steps_must_be_closed():
    session = Session(tiny_model(), PRESETS["mass"])
    cache = session.cache
    with pytest.raises(ValueError, match="before any token was seen"):
        cache.begin_step()
    session.prefill(*left_pad(prompts_of([20, 9]), 0))
    with pytest.raises(ValueError, match="a step of 3 rows was announced, but the cache has 2"):
        cache.begin_step([True] * 3)
    cache.begin_step()
    with pytest.raises(ValueError, match="in the middle of another forward or step"):
        cache.begin_step()
    with pytest.raises(ValueError, match="a decode step was announced, but a chunk of 2 columns came"):
        session.model.forward(tokens(2, 2), torch.zeros(2, 2, dtype=torch.long), cache)


def test_nothing_outlives_the_session():
    """Without waiting for the garbage collector: a recording holds memory of the device."""
    model = tiny_model()
    _, taped, logits = pair(model, PRESETS["mass"], BATCHES["one"])
    for token in range(2, 6):
        taped.decode([token])
    left = [weakref.ref(one) for one in (taped._stepper._recorder, taped._stepper, taped.cache)]
    del taped
    assert [one() for one in left] == [None] * 3


@pytest.mark.parametrize("preset", ["d2o", "paper_minmax", "mass", "released", "reread", "h2o"])
def test_an_eviction_asks_the_device_nothing(monkeypatch, preset):
    """Beside what the kernels for a CPU ask: how many there are to keep and to evict follows from lengths. The first of
    a batch brings the rows' budgets, and so does that of a layer which was left with fewer slots."""
    monkeypatch.setattr(moving, "nearest_kept", nearest_kept)
    plain, other, logits = pair(tiny_model(), PRESETS[preset], BATCHES["ragged"], "whole")
    logits = go_on(plain, other, logits, INTERVAL)
    evict, evictions = cache_evictions.Evictions.while_decoding, []

    def watched_evict(*args):
        with watched():
            evictions.append(evict(*args))
        return evictions[-1]

    monkeypatch.setattr(cache_evictions.Evictions, "while_decoding", watched_evict)
    go_on(plain, other, logits, 2 * INTERVAL)
    assert_same(plain, other)
    assert sum(evictions) >= 4


class Stale(TapeRecorder):
    """Replays nothing."""

    def record(self, run):
        kept = run()
        return lambda: kept


@pytest.mark.parametrize("preset", ["lean", "reread"])
@pytest.mark.parametrize("recorder", [TapeRecorder, Stale])
def test_what_a_gpu_will_check(monkeypatch, recorder, preset):
    """The check itself, with the tape in place of CUDA graphs; and that it notices replays that do nothing."""
    monkeypatch.setattr(session_module, "graph_recorder", lambda mode, *_: None if mode == "never" else recorder())
    result = decode_graph.run(decode_graph.Case(preset, torch.float32, lengths=(40, 23)), "cpu")
    assert result.is_right == (recorder is TapeRecorder), result.errors
    assert len(result.errors) == 3 + 4 * 6


# ---- where CUDA graphs are possible --------------------------------------------------------------------------------


def test_obstacles_are_named():
    model, ranks = tiny_model(), D2OCache(tiny_model().config, PRESETS["mass"]).ranks
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert obstacle(shape_of(model.config), gpu, ranks) is None
    assert "on cpu" in obstacle(shape_of(model.config), cpu, ranks)
    dynamic = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).config
    assert "dynamic" in obstacle(shape_of(dynamic), gpu, ranks)
    assert graph_recorder("auto", shape_of(model.config), cpu, ranks) is None
    assert graph_recorder("never", shape_of(model.config), gpu, ranks) is None
    with pytest.raises(ValueError, match=r"decode_graph \(always\) is impossible: the model is on cpu"):
        Session(model, PRESETS["mass"], decode_graph="always")


def test_a_stepper_without_recorder_takes_tensors():
    model = tiny_model()
    plain, other, logits = pair(model, PRESETS["mass"], BATCHES["ragged"])
    assert torch.equal(plain.decode([2, 3, 4]), Stepper(plain.model, None).step(other.cache, torch.tensor([2, 3, 4])))
