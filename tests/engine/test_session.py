"""One batch: equal to `generate`, to itself in chunks, and to each of its rows alone. All in float64."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.loop import generate
from d2o_dist.engine.reading import chunk_ends
from d2o_dist.engine.session import Session, left_pad
from tests.engine.tiny import Numbers, request
from tests.models import left_padded, tiny_model, tokens
from tests.spec import spec

NEW = 40
SIZES = dict(keep_ratio=0.3, min_layer_tokens=12)
PRESETS = {
    "d2o": spec("d2o", **SIZES),
    "paper_minmax": spec("paper_minmax", **SIZES),
    "paper": spec("paper", **SIZES),
    "mass": spec("mass", **SIZES),
    "full": spec("full"),
}
RAGGED = [51, 23, 38]


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=3)


def prompts_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    ids, mask = left_padded(lengths, seed)
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def run(model, d2o, prompts, sampling=None, *, new=NEW, first_index=0, eos=(), stop=(), **options):
    """The rows of one batch; `new` is one limit, or one a row."""
    limits = new if isinstance(new, list) else [new] * len(prompts)
    requests = [request(first_index + i, ids, limits[i], stop) for i, ids in enumerate(prompts)]
    sampling = sampling or SamplingConfig()
    return generate(Session(model, d2o), requests, sampling, Numbers(), eos_ids=frozenset(eos), **options)


def cache_like_a_session(model, d2o):
    """Which compresses prompts when a session would."""
    return D2OCache(model.config, d2o, reading="layerwise" if d2o.suits_layerwise else "whole")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [[47], RAGGED], ids=["one", "ragged"])
def test_greedy_equals_generate(model, preset, lengths):
    ids, mask = left_padded(lengths, 1)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache_like_a_session(model, PRESETS[preset]), do_sample=False,
        max_new_tokens=NEW, pad_token_id=0,
    )  # fmt: skip
    found = run(model, PRESETS[preset], prompts_of(lengths))
    assert [result.tokens for result in found] == out[:, ids.shape[1] :].tolist()
    assert {result.finish_reason for result in found} == {"length"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("chunk", [2, 7, 25])
def test_a_prefill_in_chunks_gives_the_same(model, preset, chunk):
    prompts = prompts_of(RAGGED)
    whole, parts = Session(model, PRESETS[preset]), Session(model, PRESETS[preset])
    with torch.inference_mode():
        expected = whole.prefill(*left_pad(prompts, 0))
        torch.testing.assert_close(parts.prefill(*left_pad(prompts, 0), chunk), expected, rtol=1e-9, atol=1e-9)
    for layer, same in zip(parts.cache.layers, whole.cache.layers, strict=True):
        assert torch.equal(layer.positions, same.positions)


SAMPLINGS = {
    "greedy": SamplingConfig(),
    "warm": SamplingConfig(temperature=1.2, top_p=0.95, top_k=30, repetition_penalty=1.1, seed=7),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_row_alone_is_the_row_in_a_batch(family, sampling):
    """Rows end at different steps, so that some stay as padding and some are dropped."""
    model = tiny_model(family)
    prompts, new = prompts_of([51, 23, 38, 9]), [30, 5, 22, 12]
    together = run(model, PRESETS["d2o"], prompts, SAMPLINGS[sampling], new=new)
    for index, (ids, limit) in enumerate(zip(prompts, new, strict=True)):
        (alone,) = run(model, PRESETS["d2o"], [ids], SAMPLINGS[sampling], new=limit, first_index=index)
        assert alone.tokens == together[index].tokens and len(alone.tokens) == limit
        assert alone.usage == together[index].usage


def test_ends(model):
    prompts = prompts_of(RAGGED)
    free = run(model, PRESETS["d2o"], prompts)
    eos = free[1].tokens[6]
    cut = run(model, PRESETS["d2o"], prompts, eos=[eos, 88])
    for before, after in zip(free, cut, strict=True):
        at = next((n for n, token in enumerate(before.tokens) if token in (eos, 88)), None)
        assert after.tokens == (before.tokens if at is None else before.tokens[: at + 1])
        assert after.finish_reason == ("length" if at is None else "eos")
    ignored = run(model, PRESETS["d2o"], prompts, SamplingConfig(ignore_eos=True), eos=[eos])
    assert [r.tokens for r in ignored] == [r.tokens for r in free]
    one, two = free[0].tokens[4:6]
    (stopped,) = run(model, PRESETS["d2o"], prompts[:1], stop=[f" {one} {two} "])
    text = "".join(f"{token} " for token in free[0].tokens)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(f" {one} {two} ")]
    assert len(stopped.tokens) <= 6


def test_one_new_token_is_measured_after_compression(model):
    (result,) = run(model, PRESETS["d2o"], prompts_of([60]), new=1)
    assert result.tokens_per_s is None and result.time_to_first_token_s > 0
    assert result.usage.achieved_keep_ratio == pytest.approx(0.3, abs=0.03)
    assert result.usage.held_bytes < result.usage.full_bytes


def test_usage_of_rows_adds_up_to_the_report():
    model = tiny_model("gemma3")
    session = Session(model, PRESETS["d2o"])
    with torch.inference_mode():
        session.prefill(*left_pad(prompts_of([90, 20, 55]), 0))
    report, usage = session.cache.report(), [session.row_usage(row) for row in range(3)]
    assert sum(row.held_bytes for row in usage) == report.held_bytes
    assert sum(row.full_bytes for row in usage) == report.full_bytes
    held = sum(row.achieved_keep_ratio * seen for row, seen in zip(usage, [90, 20, 55], strict=True))
    assert held / 165 == pytest.approx(report.achieved_keep_ratio)


def test_pieces_of_text_are_handed_on(model):
    pieces = []
    (result,) = run(model, PRESETS["d2o"], prompts_of([30]), on_text=pieces.append)
    assert "".join(pieces) == result.text and len(pieces) == NEW


def test_a_prompt_of_one_token(model):
    (result,) = run(model, PRESETS["d2o"], [[5]], new=3)
    assert len(result.tokens) == 3


@pytest.mark.parametrize(
    ("length", "chunk", "ends"),
    [(1, None, [1]), (9, None, [9]), (9, 3, [3, 6, 9]), (10, 3, [3, 6, 10]), (4, 3, [4]), (5, 2, [2, 5]), (1, 2, [1])],
)
def test_no_chunk_has_one_column(length, chunk, ends):
    assert chunk_ends(length, chunk) == ends


def test_refusals(model):
    session = Session(model, PRESETS["d2o"])
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"chunk \(1\) must be at least 2"):
        session.prefill(ids, mask, 1)
    right = mask.clone()
    right[0, -1] = 0
    hole = mask.clone()
    hole[0, 2] = 0
    for bad in (right, hole):
        with pytest.raises(ValueError, match="padded on the left"):
            session.prefill(ids, bad)
    with torch.inference_mode():
        session.prefill(ids, mask)
    with pytest.raises(ValueError, match=r"a later turn needs at least 2 tokens \(1 was given\)"):
        session.prefill(ids[:, :1], mask[:, :1])


@torch.inference_mode()
def test_a_later_turn_is_that_of_the_model(model):
    """Through the session as through the model with the cache by hand."""
    ids, more = tokens(2, 30), tokens(2, 11, seed=1)
    session, cache = Session(model, PRESETS["d2o"]), cache_like_a_session(model, PRESETS["d2o"])
    session.prefill(ids, torch.ones_like(ids))
    model(ids, past_key_values=cache)
    for _ in range(3):
        session.decode([5, 6])
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    expected = model(more, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(session.prefill(more, torch.ones_like(more), 4), expected)
    assert session.cache.get_seq_length() == 44


@torch.inference_mode()
def test_a_dealt_prompt_on_one_rank_is_the_prompt(model):
    """`deal` works without other ranks too: code written for many runs on one."""
    ids, mask = left_padded(RAGGED)
    session, cache = Session(model, PRESETS["d2o"], reading="whole"), D2OCache(model.config, PRESETS["d2o"])
    expected = session.prefill(ids, mask)
    torch.testing.assert_close(model(**cache.deal(ids, mask), past_key_values=cache).logits[:, -1], expected)
    cache.finalize()
    assert cache.report().to_dict() == session.cache.report().to_dict()
