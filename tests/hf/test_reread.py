"""A prompt that is read twice, budgets of single heads, and budgets by rank: against the oracle, and the refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from tests.models import left_padded, tiny_model, tokens
from tests.oracle.naive_d2o import OracleConfig, OracleResult, run_oracle, use_float64_norms
from tests.ranks import run_ranks
from tests.spec import pair, spec

DROP = {"merge": "none", "merge_targets": "kept", "gate": "threshold"}
CASES = {
    "reread": {"min_layer_tokens": 6},
    "drop": {},
    "mass": {"merge": "mass", "merge_targets": "tail", "gate": "quantile", "eviction_interval": 5},
    "chunks": {"reread_chunk": 25, "merge": "keys_values", "protected_layers": (1,), "keep_ratio": 0.5},
    "dynamic layers": {"budget_per": "layer", "allocation": "dynamic", "reread_chunk": 40, "merge": "values"},
    "tokens": {"keep_tokens": 21, "eviction_interval": 3},
    "ranked layers": {"budget_per": "layer", "eviction_interval": 1},
    "ranked by rate": {"selection": "window", "merge": "mass", "eviction_interval": 4},
    "ranked by sums": {"selection": "cumulative", "min_layer_ratio": 0.1},
    "sampled sums": {"budget_per": "layer", "allocation": "dynamic", "reread_chunk": 40, "score_queries": "strided",
                     "score_near_distance": 5},
    "sampled heads": {"selection": "cumulative", "score_queries": "strided", "score_near_distance": 5,
                      "eviction_interval": 3},
    "dynamic heads": {"selection": "cumulative", "allocation": "dynamic", "temperature": 0.3, "merge": "keys_values"},
}  # fmt: skip


def both(case: str, **changes) -> tuple[D2OConfig, OracleConfig]:
    """The same configuration for the library and for the oracle."""
    rule = {} if case == "reread" else DROP
    overrides = {"keep_ratio": 0.3, "min_layer_tokens": 8, **rule, **CASES[case], **changes}
    return pair("reread", **overrides)


@torch.no_grad()
def read(model, ids: torch.Tensor, config: D2OConfig, chunks: list[int] | None = None) -> D2OCache:
    """A cache that has read a prompt as often as its configuration wants."""
    cache = D2OCache(config=model.config, d2o=config)
    for chunk in ids.split(chunks or [ids.shape[1]], 1):
        model(chunk, past_key_values=cache)
    if config.needs_reread:
        cache.reread(model, ids)
    return cache


def assert_equal_slots(cache: D2OCache, snapshot, row: int = 0) -> None:
    config = cache.d2o
    names = ["keys", "values", "log_mass"]
    names += ["scores"] if config.needs_column_sums or config.needs_reread else []
    names += ["rates"] if config.needs_rates else []
    for layer, expected in zip(cache.layers, snapshot, strict=True):
        count = layer.kv_len[row]
        assert torch.equal(layer.positions[row, :, :count], expected["positions"]), layer.index
        for name in names:
            found = getattr(layer, name)[row, :, :count]
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-11, msg=f"{layer.index} {name}")


def assert_equal_decoding(model, cache: D2OCache, expected: OracleResult) -> None:
    """From the same prompt, token by token."""
    with torch.no_grad():
        for step, token in enumerate(expected.tokens[:-1]):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(logits, expected.logits[step + 1], rtol=1e-8, atol=1e-8)
    assert_equal_slots(cache, expected.final)
    budgets = [unit.slot_budgets for layer in cache.compressed.layers for unit in layer.blocks]
    for unit, (found, wanted) in enumerate(zip(budgets, expected.budgets, strict=True)):
        if unit not in expected.session.cache.protected:
            assert cache.d2o.split(found[0]) == tuple(wanted)
    states = [unit.state.threshold for layer in cache.compressed.layers for unit in layer.blocks]
    for found, wanted in zip(states, expected.thresholds, strict=True):
        assert wanted is None or float(found[0]) == pytest.approx(wanted, rel=1e-9)


FAMILIES = [("llama", 93, 30), ("qwen3", 110, 30), ("llama_mha", 57, 32)]


@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=list(CASES))
def test_equals_the_oracle(number, case):
    others = [("gemma2", 71, 20), ("gpt_oss", 71, 20)] if case == "reread" else []
    for family, length, steps in FAMILIES + others if case in ("reread", "mass") else FAMILIES[number % 3 :][:1]:
        model = use_float64_norms(tiny_model(family, seed=number))
        ids = tokens(1, length, seed=length)
        config, oracle_config = both(case)
        expected = run_oracle(model, ids[0], oracle_config, steps)
        cache = read(model, ids, config)
        cache.finalize()
        assert_equal_slots(cache, expected.after_finalize)
        assert cache.report().achieved_keep_ratio == pytest.approx(expected.achieved_ratio)
        if config.budget.per_head and config.keep_tokens is None:
            held = {unit.kv_len[0] for layer in cache.compressed.layers for unit in layer.blocks}
            assert len(held) > 2  # or budgets of heads would not be tested
        assert_equal_decoding(model, cache, expected)


@pytest.mark.parametrize(
    "case", ["reread", "mass", "dynamic layers", "tokens", "ranked by rate", "sampled sums", "sampled heads"]
)
def test_equals_the_oracle_over_chunks_and_a_later_turn(case):
    model = use_float64_norms(tiny_model("llama", seed=3))
    first, second = tokens(1, 71, seed=5), tokens(1, 38, seed=6)
    config, oracle_config = both(case, eviction_interval=6)
    chunks = [29, 2, 40]
    one = run_oracle(model, first[0], oracle_config, 15, chunks=chunks)
    fed = torch.cat([torch.tensor(one.tokens[-1:]), second[0]])
    two = run_oracle(model, fed, oracle_config, 15, session=one.session, chunks=[20, 19])
    cache = read(model, first, config, chunks)
    with torch.no_grad():
        for token in one.tokens[:-1]:
            model(torch.tensor([[token]]), past_key_values=cache)
        for chunk in fed[None].split([20, 19], dim=1):
            model(chunk, past_key_values=cache)
    cache.finalize()
    assert_equal_slots(cache, two.after_finalize)
    assert_equal_decoding(model, cache, two)


def test_peaks_are_those_of_plain_attention_over_prompt_and_chunk():
    """A second reading in chunks is, chunk by chunk, a plain causal forward over the prompt and the chunk."""
    model, length, chunk = tiny_model("llama", seed=1), 50, 20
    ids = tokens(1, length, seed=2)
    config, _ = both("reread", reread_chunk=chunk, keep_ratio=0.99, min_layer_tokens=length)
    cache = read(model, ids, config)
    cache.finalize()
    eager = tiny_model("llama", seed=1, attention="eager")
    wanted = [torch.zeros(2, length, dtype=torch.float64) for _ in cache.layers]
    with torch.no_grad():
        for part in ids.split(chunk, 1):
            out = eager(torch.cat([ids, part], 1), output_attentions=True)
            for layer, attention in enumerate(out.attentions):
                received = attention[0].unflatten(0, (2, 2)).sum(1)[:, length:, :length]
                wanted[layer] = torch.maximum(wanted[layer], received.amax(1))
    for layer, peaks in zip(cache.layers, wanted, strict=True):
        # eager attention takes its softmax in float32
        torch.testing.assert_close(layer.scores[0], peaks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["reread", "mass", "dynamic layers"])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(case):
    model = use_float64_norms(tiny_model("llama", seed=4))
    lengths, config = [70, 33, 51], both(case, reread_chunk=40)[0]
    ids, mask = left_padded(lengths, seed=4)
    turn, turn_mask = left_padded([9, 12, 5], seed=8)

    def run(ids, mask, turn, turn_mask):
        session = Session(model, config)
        logits = [session.prefill(ids, mask, 30)]
        for _ in range(12):
            logits.append(session.decode(logits[-1].argmax(-1).tolist()))
        logits.append(session.prefill(turn, turn_mask))
        for _ in range(12):
            logits.append(session.decode(logits[-1].argmax(-1).tolist()))
        return session, torch.stack(logits, 1)

    together, logits = run(ids, mask, turn, turn_mask)
    for row, length in enumerate(lengths):
        real, last = slice(ids.shape[1] - length, None), slice(12 - int(turn_mask[row].sum()), None)
        alone, expected = run(
            ids[row : row + 1, real],
            mask[row : row + 1, real],
            turn[row : row + 1, last],
            turn_mask[row : row + 1, last],
        )
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-8, atol=1e-8)
        assert together.row_usage(row) == alone.row_usage(0)
        for layer, single in zip(together.cache.layers, alone.cache.layers, strict=True):
            count = single.kv_len[0]
            assert torch.equal(layer.positions[row, :, :count], single.positions[0])
            assert bool((layer.positions[row, :, count:] == -1).all())


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2", "qwen3", "phi3", "gemma3"])
def test_the_second_reading_changes_nothing_that_is_held(family):
    """Keys, values, lengths, and what is generated: with a cache that keeps everything it is the plain model."""
    model = use_float64_norms(tiny_model(family)) if family != "gemma3" else tiny_model(family)
    ids = tokens(1, 60, seed=3)
    config = both("reread", keep_ratio=1.0, eviction_interval=None, selection="window", reread_chunk=17)[0]
    cache = D2OCache(config=model.config, d2o=config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = copy.deepcopy(cache)
        cache.reread(model, ids)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys) and torch.equal(layer.positions, old.positions)
    assert cache.get_seq_length() == 60 and cache.compressed.num_seen == [60]
    assert cache.compressed.num_reread == [60]
    more = torch.cat([ids, tokens(1, 4, seed=9)], 1)
    found = model.generate(more, past_key_values=cache, max_new_tokens=12, do_sample=False)
    plain = tiny_model(family, attention="sdpa")
    plain = use_float64_norms(plain) if family != "gemma3" else plain
    assert found.tolist() == plain.generate(more, max_new_tokens=12, do_sample=False).tolist()


def test_one_prompt_many_questions_by_generate():
    model, ids = tiny_model("llama"), tokens(1, 80, seed=1)
    config = both("reread")[0]
    cache = read(model, ids, config)
    cache.finalize()
    held = cache.report().held_bytes
    answers = []
    for seed in (2, 3):
        question = torch.cat([ids, tokens(1, 6, seed=seed)], 1)
        mine = copy.deepcopy(cache)
        answers.append(
            model.generate(question, past_key_values=mine, max_new_tokens=8, do_sample=False)[0, 80:].tolist()
        )
        again = model.generate(question, past_key_values=copy.deepcopy(cache), max_new_tokens=8, do_sample=False)
        assert again[0, 80:].tolist() == answers[-1]
    assert answers[0] != answers[1] and cache.report().held_bytes == held


def test_tokens_between_the_second_reading_and_the_compression_count():
    """A question that is read before `finalize` is held, and its queries count like those of the second reading."""
    model, ids, more = tiny_model("llama", seed=2), tokens(1, 60, seed=1), tokens(1, 7, seed=5)
    config, _ = both("reread", keep_ratio=0.99, min_layer_tokens=67)
    cache = read(model, ids, config)
    with torch.no_grad():
        model(more, past_key_values=cache)
    cache.finalize()
    eager = tiny_model("llama", seed=2, attention="eager")
    with torch.no_grad():
        again = eager(torch.cat([ids, ids], 1), output_attentions=True).attentions
        asked = eager(torch.cat([ids, more], 1), output_attentions=True).attentions
    for layer, first, second in zip(cache.layers, again, asked, strict=True):
        first = first[0].unflatten(0, (2, 2)).sum(1)[:, 60:, :60].amax(1)
        second = second[0].unflatten(0, (2, 2)).sum(1)[:, 60:].amax(1)
        second[:, :60] = torch.maximum(second[:, :60], first)
        torch.testing.assert_close(layer.scores[0], second, rtol=1e-5, atol=1e-6)


def test_bytes_of_heads_with_budgets_of_their_own():
    """What the report says is held is what the buffers hold: a sum over heads, not heads times the fullest."""
    model, ids = tiny_model("llama"), tokens(2, 90, seed=1)
    session = Session(model, both("reread", eviction_interval=4)[0])
    session.prefill(ids, torch.ones_like(ids))
    session.decode([3, 4])
    live = sum(int((layer.positions >= 0).sum()) for layer in session.cache.layers)
    report = session.cache.report()
    assert report.held_bytes == live * 2 * 16 * 8 == sum(session.row_usage(row).held_bytes for row in (0, 1))
    assert report.achieved_keep_ratio == pytest.approx(live / (4 * 2 * 2 * 91))
    # 24 bytes of positions and statistics a slot, and room for what gathers between evictions.
    slots = sum(sum(unit.store.capacity for unit in layer.blocks) for layer in session.cache.compressed.layers) * 2
    assert report.allocated_bytes == session.rank_bytes == slots * (2 * 16 * 8 + 32)
    assert slots <= live + 2 * 4 * 2 * 8
    assert "compressed" in str(report) and report.to_dict()["layers"][0]["num_heavy"]


@pytest.mark.parametrize("select", ["repeat", "reorder"])
def test_rows_are_selected(select):
    model = use_float64_norms(tiny_model("llama", seed=6))
    config, ids = both("reread", eviction_interval=4)[0], tokens(2, 60, seed=6)
    cache = read(model, ids, config)
    rows = torch.tensor([0, 0, 1] if select == "repeat" else [1, 0])
    early, late = copy.deepcopy(cache), cache
    early.batch_select_indices(rows)
    late.finalize()
    late.batch_select_indices(rows)
    step = tokens(len(rows), 12, seed=7)
    with torch.no_grad():
        for column in step.split(1, 1):
            one, two = (model(column, past_key_values=which).logits for which in (early, late))
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_refusals():
    model, ids = tiny_model("llama"), tokens(1, 40)
    config = both("reread")[0]
    cache = D2OCache(config=model.config, d2o=config)
    with pytest.raises(ValueError, match=r"have \[40\] tokens, but the cache has seen \[\]"):
        cache.reread(model, ids)
    with pytest.raises(ValueError, match="there was none: call cache.reread"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    cache = read(model, ids, config)
    with pytest.raises(ValueError, match=r"have \[39\] tokens, but the cache has seen \[40\]"):
        cache.reread(model, ids[:, 1:])
    cache.finalize()
    with pytest.raises(ValueError, match="before it is compressed; this cache is in phase decode"):
        cache.reread(model, ids)
    with torch.no_grad():
        model(ids, past_key_values=cache)  # a later turn: nothing to read again, and finalize does not ask for it
        with pytest.raises(ValueError, match=r"\[40\] tokens, but the cache has seen \[80\]"):
            cache.reread(model, ids)
    cache.finalize()
    short = tiny_model("llama", max_position_embeddings=70)
    cache = D2OCache(config=short.config, d2o=config)
    with torch.no_grad():
        short(ids, past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"40 tokens in chunks of 2048 \(score.chunk\) needs 80 positions.* has 70"
        ):
            cache.reread(short, ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reread_chunk": 0}, r"score.chunk \(0\) must be at least 1"),
        ({"reread_chunk": 2.5}, r"score.chunk \(2.5\) must be an integer"),
        ({"selection": "recent"}, r"budget.rule \(ranked\) compares .* score.rule \(newest\) reads none"),
        ({"allocation": "pyramid"}, r"budget.per_head \(True\) must be false"),
    ],
)
def test_configurations_that_say_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        spec("reread", **changes)


SPREAD = [{"sp_prefill": "ring"}, {"cache_layout": "sequence"}, {"merge_scope": "local"}]


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_slots_of_a_head_on_several_ranks_are_refused_before_there_are_ranks(layout):
    parallel = ParallelConfig(sp=2, **layout).resolve(4)
    for changes in ({"selection": "window"}, {"budget_per": "layer"}, {}):
        with pytest.raises(ValueError, match=r"sp \(2\) and sp_prefill \(.*\) cache_layout is sequence. Use tp"):
            parallel.check_rules(spec("reread", **changes))
    parallel.check_rules(spec(allocation="ranked"))
    ParallelConfig(sp=2).resolve(4).check_rules(spec("reread"))


def on_rank(rank: int, world: int, layout: dict) -> str:
    mesh, model, parallel = build_mesh(sp=world), tiny_model("llama"), ParallelConfig(sp=world, **layout)
    with pytest.raises(ValueError, match="cache_layout is sequence"):
        D2OCache(model.config, spec("reread"), mesh, parallel)
    cache, ids = D2OCache(model.config, spec(), mesh, parallel), tokens(1, 20)
    with torch.no_grad():
        model(**cache.deal(ids), past_key_values=cache)
    if layout.get("cache_layout") != "sequence":
        with pytest.raises(ValueError, match="must be ulysses to read a prompt a second time"):
            cache.reread(model, ids)
    with pytest.raises(ValueError, match="cache_layout is sequence"):
        cache.with_config(spec(budget_per="head"))
    return "refused"


@pytest.mark.multirank
@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_slots_of_a_head_on_several_ranks_are_refused(layout):
    assert run_ranks(2, on_rank, layout) == ["refused", "refused"]


def test_configurations_share_one_second_reading():
    model, ids = tiny_model("llama"), tokens(1, 70, seed=2)
    gathering = spec(allocation="uniform", selection="mixed", merge="none")
    cache = D2OCache(config=model.config, d2o=gathering)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    config = both("mass")[0]
    with pytest.raises(ValueError, match="needs a second reading of the prompt, and there was none"):
        cache.with_config(config)
    cache.reread(model, ids)
    with pytest.raises(ValueError, match=r"score.chunk \(9\) must be the 2048"):
        cache.with_config(config.replace(score={"chunk": 9}))
    for case in ("reread", "mass", "ranked by rate", "dynamic layers"):
        config = both(case, reread_chunk=2048, score_queries="all")[0]
        shared, own = cache.with_config(config), read(model, ids, config)
        shared.finalize(), own.finalize()
        for mine, theirs in zip(shared.layers, own.layers, strict=True):
            for name in ("positions", "keys", "values", "scores", "rates", "log_mass"):
                torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-12, atol=1e-14)
