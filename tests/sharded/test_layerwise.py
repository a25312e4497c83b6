"""Prompts that are compressed layer by layer while they are read: against the whole reading, and over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.cache import D2OCache
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks
from tests.sharded.play import Play, assert_same, on_rank, play
from tests.sharded.test_parity import LAYOUTS
from tests.spec import spec

pytestmark = pytest.mark.multirank

# Ragged prompts, a second turn, tiles that the prompts do not divide.
PLAY = Play(lengths=(61, 97), chunk=20, turn=(33, 40), steps=10, layers=4, reading="layerwise")


@pytest.mark.parametrize(
    ("family", "preset"),
    [("llama", name) for name in ("lean", "snapkv", "pyramidkv", "h2o", "streaming", "full")]
    + [(name, "lean") for name in ("gemma3", "mistral_sliding", "phi3", "qwen3")],
)
@pytest.mark.parametrize("chunk", [None, 20])
def test_budgets_that_are_known_give_what_a_whole_reading_gives(family, preset, chunk):
    one = replace(PLAY, family=family, preset=preset, chunk=chunk)
    assert_same(play(one), play(replace(one, reading="whole")))


def test_heads_with_budgets_of_their_own():
    one = replace(PLAY, preset="lean", d2o={"budget_per": "head", "protected_layers": (1,)})
    assert_same(play(one), play(replace(one, reading="whole")))


def test_tiles_of_two_columns_and_prompts_shorter_than_a_tile():
    for one in (replace(PLAY, preset="lean", chunk=2), replace(PLAY, preset="lean", lengths=(3, 1), chunk=2)):
        assert_same(play(one), play(replace(one, reading="whole")))


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("lean", "heads"),
        ("lean", "ring"),
        ("d2o", "moved"),
        ("d2o", "allgather"),
        ("paper", "ring"),
        ("paper", "heads"),
    ],
)
def test_sequence_ranks(preset, layout):
    """Known budgets, and shares that are trimmed as layers come."""
    sp = 3 if layout in ("allgather", "ring") else 2
    check(replace(PLAY, preset=preset), ParallelConfig(sp=sp, **LAYOUTS[layout]))


def test_tensor_and_sequence_ranks():
    check(replace(PLAY, preset="d2o"), ParallelConfig(tp=2, sp=2, tp_engine="transformers", sp_prefill="allgather"))


def check(one: Play, parallel: ParallelConfig) -> None:
    wanted = play(one)
    for found, _ in run_ranks(parallel.sp * parallel.tp, on_rank, one, parallel, fresh=parallel.tp > 1):
        assert_same(found, wanted)


# ---- shares that are known at the end ----------------------------------------------------------------------------


@torch.no_grad()
def read_by(config, reading: str, lengths=(120, 77), layers: int = 8) -> D2OCache:
    model = tiny_model(num_hidden_layers=layers)
    session = Session(model, config, reading=reading)
    session.prefill(*left_padded(list(lengths)))
    return session.cache


@pytest.mark.parametrize("score", ["reach", "h2o", "snapkv"])
@pytest.mark.parametrize("temperature", [20.0, 3.3, 0.5])
def test_trims_leave_what_one_eviction_leaves_where_no_share_was_too_small(score, temperature):
    """Of a layer that lacks slots: a part of it, and as many fewer as the report says."""
    config = spec(score, keep_ratio=0.3, min_layer_tokens=8)
    budget = {"rule": "dispersion", "temperature": temperature, "min_layers": 0, "min_layer_tokens": 8}
    config = config.replace(budget=budget)
    whole, found = read_by(config, "whole"), read_by(config, "layerwise")
    lacking = [0, 0]
    for one, other in zip(whole.layers, found.layers, strict=True):
        assert one.slot_budgets == other.slot_budgets
        for row in range(2):
            kept, some = ({tuple(position) for position in enumerate_positions(view, row)} for view in (one, other))
            assert some <= kept
            lacking[row] += (len(kept) - len(some)) // 2  # of two heads
    assert found.report().num_short_slots == lacking
    if temperature != 3.3:
        assert any(lacking) == (temperature == 0.5), lacking
    assert ("slots that layers lack" in str(found.report())) == any(lacking)


def enumerate_positions(view, row):
    return [(head, int(at)) for head, positions in enumerate(view.positions[row]) for at in positions if at >= 0]


# ---- who asks for it ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_by_itself():
    """`generate` reads a prompt in one forward; so does a later turn, without a decode step between."""
    model, config = tiny_model(), spec("lean", keep_ratio=0.4, min_layer_tokens=8)
    ids, mask = left_padded([61, 97])
    texts, held = [], []
    for reading in ("whole", "layerwise"):
        cache = D2OCache(config=model.config, d2o=config, reading=reading)
        texts.append(
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
        )
        cache = D2OCache(config=model.config, d2o=config, reading=reading)
        model(ids, attention_mask=mask, past_key_values=cache)
        assert (cache.compressed.phase == "decode") == (reading == "layerwise")
        cache.finalize()
        later = torch.cat([mask, torch.ones_like(ids[:, :9])], 1)
        held.append(model(ids[:, :9], attention_mask=later, past_key_values=cache).logits)
    assert torch.equal(*texts)
    torch.testing.assert_close(*held, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["reread"])
def test_what_needs_all_layers_at_once_is_refused(preset):
    model, config = tiny_model(), spec(preset, keep_ratio=0.4)
    with pytest.raises(ValueError, match=r"score.rule \(reread\) reads the prompt a second time"):
        D2OCache(config=model.config, d2o=config, reading="layerwise")
    with pytest.raises(ValueError, match=r"score.rule \(reread\) reads the prompt a second time"):
        Session(model, config, reading="layerwise")
    ranked = spec("lean", keep_ratio=0.4).replace(budget="ranked")
    with pytest.raises(ValueError, match=r"budget.rule \(ranked\) compares the tokens of all layers"):
        D2OCache(config=model.config, d2o=ranked, reading="layerwise")
    with pytest.raises(ValueError, match=r"reading \('half'\) must be one of whole, layerwise"):
        D2OCache(config=model.config, reading="half")


def test_a_model_that_takes_no_tiles_is_read_whole_unless_told_otherwise():
    class Strange(type(tiny_model().model.layers[0])):
        def forward(self, hidden_states, memory=None, **kwargs):
            return super().forward(hidden_states, **kwargs)

    model, config = tiny_model(), spec("lean", keep_ratio=0.4, min_layer_tokens=8)
    model.model.layers[0].__class__ = Strange
    with pytest.raises(ValueError, match=r"reading \(layerwise\) needs .* Strange is given memory, of which a tile"):
        Session(model, config, reading="layerwise")
    session = Session(model, config)
    session.prefill(*left_padded([61, 97]), 20)
    assert max(session.cache.layers[0].kv_len) < 97


# ---- streams -----------------------------------------------------------------------------------------------------

STREAM = {"keep_ratio": None, "keep_tokens": 24, "eviction_interval": 8}


@torch.no_grad()
def stream(lengths, chunk: int) -> tuple[list[list[int]], list[int], int]:
    """Tokens, slots held in the end, and the most bytes of the cache."""
    session = Session(tiny_model(), spec("lean", **STREAM, min_layer_tokens=8), reading="stream")
    logits, tokens = session.prefill(*left_padded(list(lengths)), chunk), []
    for _ in range(12):
        tokens.append(logits.argmax(-1).tolist())
        logits = session.decode(tokens[-1])
    return tokens, session.cache.layers[0].kv_len, session.rank_bytes


def test_a_stream_is_turns_without_answers():
    session = Session(tiny_model(), spec("lean", **STREAM, min_layer_tokens=8), reading="whole")
    ids, mask = left_padded([61, 97])
    for start, end in ((0, 40), (40, 80), (80, 97)):
        logits = session.prefill(ids[:, start:end], mask[:, start:end])
    tokens = []
    for _ in range(12):
        tokens.append(logits.argmax(-1).tolist())
        logits = session.decode(tokens[-1])
    assert stream((61, 97), 40)[0] == tokens


def test_what_a_stream_holds_does_not_grow_with_the_text():
    assert stream([400], 40)[1:] == stream([2000], 40)[1:]


def test_a_stream_over_sequence_ranks():
    one = replace(PLAY, preset="lean", reading="stream", chunk=40, turn=(), d2o=STREAM)
    check(one, ParallelConfig(sp=2, sp_prefill="allgather"))


def test_streams_whose_budgets_would_change_are_refused():
    for preset, fields in (("lean", {"keep_ratio": 0.4}), ("d2o", STREAM)):
        with pytest.raises(ValueError, match=r"reading \(stream\) needs keep_tokens and equal or fixed shares"):
            Session(tiny_model(), spec(preset, **fields, min_layer_tokens=8), reading="stream")
