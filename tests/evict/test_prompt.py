"""`compress_layer` against loops over Python lists, over every rule, ragged rows and successive evictions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o_dist.evict import prompt
from d2o_dist.evict.prompt import compress_layer
from d2o_dist.slots.slots import D2OState, LayerBudget, Slots
from tests.core.naive import assert_row_equals, naive_compress, to_lists
from tests.oracle.published_step import PublishedStep
from tests.spec import flat, spec

BASE = {"num_sink_tokens": 2, "heavy_fraction": 0.6}
RULES = {
    "keys_values": {},
    "values": {"merge": "values", "threshold_agg": "mean"},
    "none": {"merge": "none"},
    "released": {"merge": "released", "ema_beta": 0.5, "threshold_agg": "mean"},
    "mass": {"merge": "mass", "selection": "window"},
    "mass_tail": {"merge": "mass", "selection": "window", "merge_targets": "tail", "gate": "quantile"},
    "quantile": {"gate": "quantile", "drop_quantile": 0.4},
    "tail": {"merge_targets": "tail", "tail_fraction": 0.4},
    "bounded_tail": {"merge_targets": "tail", "tail_fraction": 0.4, "max_decode_tail": 3},
    "mixed": {"merge": "mass", "selection": "mixed"},
    "recent": {"selection": "recent"},
    "after": {"selection": "window", "selection_pool": 5, "selection_pool_side": "after"},
    "reach": {"merge": "mass", "selection": "window", "selection_reach": 3.5, "merge_targets": "tail"},
    "mixed_reach": {"selection": "mixed", "selection_reach": 0.4},
}


def random_slots(lengths: list[int], heads: int, dim: int, seed: int, dtype=torch.float64, width: int = 0) -> Slots:
    """Slots of rows of these lengths; ties in the scores on purpose; a zero key; gaps between positions."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), max(max(lengths), width)

    def rand(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    keys = torch.randn(batch, heads, width, dim, dtype=torch.float64, generator=generator)
    keys[:, 0, min(3, width - 1)] = 0
    values = torch.randn(batch, heads, width, dim, dtype=torch.float64, generator=generator)
    gaps = torch.randint(1, 3, (batch, heads, width), generator=generator)
    gaps[:, :, :3] = 1
    positions = gaps.cumsum(-1) - 1
    unused = torch.arange(width) >= torch.tensor(lengths)[:, None, None]
    positions = positions.masked_fill(unused, -1)
    statistics = [(rand(batch, heads, width) * 6).round() / 6, rand(batch, heads, width) + 1e-3,
                  rand(batch, heads, width) * (rand(batch, heads, width) > 0.7)]  # fmt: skip
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    return Slots(keys.to(dtype), values.to(dtype), positions, *(s.to(stats) for s in statistics))


def append(slots: Slots, extra: Slots) -> Slots:
    """Both, the second at later positions."""
    last = slots.positions.amax((1, 2), keepdim=True)
    moved = torch.where(extra.positions >= 0, extra.positions + last + 1, -1)
    extra = extra.replace(positions=moved)
    parts = zip(slots.__dict__.items(), extra.__dict__.values(), strict=True)
    return Slots(**{name: torch.cat([left, right], 2) for (name, left), right in parts}).in_order()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    budget=st.tuples(st.integers(1, 10), st.integers(1, 6)),
    seed=st.integers(0, 10_000),
    finalize=st.booleans(),
)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_loops_over_successive_evictions(rule, lengths, heads, budget, seed, finalize):
    rules = flat("paper_minmax", **{**BASE, **RULES[rule]})
    config = spec("paper_minmax", **{**BASE, **RULES[rule]})
    slots, state = random_slots(lengths, heads, 4, seed), D2OState()
    taus = [None] * len(lengths)
    for step in range(3):
        expected = [to_lists(slots, row) for row in range(len(lengths))]
        slots, state = compress_layer(slots, LayerBudget(*budget), state, config, finalize=finalize)
        for row in range(len(lengths)):
            lists, taus[row] = naive_compress(expected[row], *budget, taus[row], rules, finalize=finalize)
            assert_row_equals(slots, row, lists)
            if taus[row] is not None and rule != "none":
                assert float(state.threshold[row]) == pytest.approx(taus[row], rel=1e-9)
        slots = append(slots, random_slots([n % 5 + 1 for n in lengths], heads, 4, seed + step + 1))


@pytest.mark.parametrize("rule", RULES)
def test_rows_may_have_budgets_of_their_own(rule):
    config = spec("paper_minmax", **{**BASE, **RULES[rule]})
    lengths, heavy, recent = [25, 9, 17], torch.tensor([5, 9, 3]), torch.tensor([4, 0, 2])
    slots = random_slots(lengths, 2, 4, seed=1)
    found, state = compress_layer(slots, LayerBudget(heavy, recent), D2OState(), config)
    assert found.kv_len.tolist() == [9, 9, 5]
    for row in range(3):
        alone = slots.map(lambda t, row=row: t[row : row + 1, :, : lengths[row]])
        one, own = compress_layer(alone, LayerBudget(int(heavy[row]), int(recent[row])), D2OState(), config)
        for name in one.__dict__:
            torch.testing.assert_close(getattr(one, name)[0], getattr(found, name)[row, :, : one.positions.shape[-1]])
        if own.threshold is None:
            assert state.threshold is None or state.threshold[row].isnan()
        else:
            torch.testing.assert_close(own.threshold[0], state.threshold[row])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_accumulates_in_float32_and_stores_in_its_own(rule, dtype):
    config = spec("paper_minmax", **{**BASE, **RULES[rule]})
    slots = random_slots([40, 31], 3, 16, seed=4, dtype=dtype)
    found, state = compress_layer(slots, LayerBudget(9, 4), D2OState(), config)
    wide = slots.replace(keys=slots.keys.float(), values=slots.values.float())
    expected, _ = compress_layer(wide, LayerBudget(9, 4), D2OState(), config)
    assert found.keys.dtype == found.values.dtype == dtype and found.scores.dtype == torch.float32
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.keys, expected.keys.to(dtype)) and torch.equal(found.values, expected.values.to(dtype))
    if rule != "none":
        assert state.threshold.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 1000])  # one head, and two of five
@pytest.mark.parametrize("rule", RULES)
def test_heads_may_be_evicted_one_after_the_other(rule, at_once, monkeypatch):
    """As those of a long prompt are, so that not all of a layer is copied at once."""
    config, slots = spec("paper_minmax", **{**BASE, **RULES[rule]}), random_slots([40, 31], 5, 8, seed=4)
    expected, theirs = compress_layer(slots, LayerBudget(9, 4), D2OState(), config)
    monkeypatch.setattr(prompt, "EVICTED_AT_ONCE", at_once)
    found, state = compress_layer(slots, LayerBudget(9, 4), D2OState(), config)
    for name, tensor in found.__dict__.items():
        torch.testing.assert_close(tensor, getattr(expected, name), rtol=0, atol=1e-12)
    assert torch.equal(state.num_merged, theirs.num_merged)


@pytest.mark.parametrize("rule", RULES)
def test_permuting_heads_permutes_the_result(rule):
    config = spec("paper_minmax", **{**BASE, **RULES[rule]})
    slots, order = random_slots([33], 4, 8, seed=9), torch.tensor([2, 0, 3, 1])
    one, state = compress_layer(slots, LayerBudget(8, 3), D2OState(), config)
    two, other = compress_layer(slots.map(lambda t: t[:, order]), LayerBudget(8, 3), D2OState(), config)
    for name in one.__dict__:
        torch.testing.assert_close(getattr(one, name)[:, order], getattr(two, name))
    if rule != "none":
        torch.testing.assert_close(state.threshold, other.threshold)


def test_unordered_slots_with_gaps_are_put_in_order():
    config = spec("paper_minmax", **BASE)
    slots = random_slots([20], 2, 4, seed=2, width=26)
    shuffled = slots.map(lambda t: t[:, :, torch.randperm(26, generator=torch.Generator().manual_seed(0))])
    one, _ = compress_layer(slots, LayerBudget(6, 3), D2OState(), config)
    two, _ = compress_layer(shuffled, LayerBudget(6, 3), D2OState(), config)
    for name in one.__dict__:
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_within_the_budget_nothing_changes():
    slots = random_slots([12, 7], 2, 4, seed=3)
    found, state = compress_layer(slots, LayerBudget(9, 3), D2OState(), spec("paper_minmax", **BASE))
    live = slots.live
    assert all(torch.equal(getattr(found, name)[live], getattr(slots, name)[live]) for name in slots.__dict__)
    assert torch.equal(found.live, live)
    assert state.threshold is None and state.num_merged is None


def test_what_is_merged_and_dropped_adds_up_to_what_was_evicted():
    slots = random_slots([30, 12, 5], 3, 4, seed=5)
    _, state = compress_layer(slots, LayerBudget(6, 4), D2OState(), spec("paper_minmax", **BASE))
    assert (state.num_merged + state.num_dropped).tolist() == [20 * 3, 2 * 3, 0]
    assert 0 < int(state.num_merged.sum()) < 66


def test_the_tail_stays_apart_from_the_tokens_that_answers_are_read_from():
    config = spec("paper_minmax", **{**BASE, **RULES["mass_tail"]})
    slots = random_slots([60], 2, 8, seed=6)
    found, _ = compress_layer(slots, LayerBudget(20, 10), D2OState(), config)
    kept = slots.take((slots.positions[..., None] == found.positions[:, :, None]).int().argmax(2), found.live)
    changed = (found.values != kept.values).any(-1)
    assert changed.sum(-1).tolist() == [[3, 3]]
    assert torch.equal(found.keys, kept.keys)
    assert (found.log_mass >= kept.log_mass).all() and (found.log_mass <= 3).all()


@pytest.mark.parametrize("bound, decoding", [(None, 8), (9, 8), (8, 8), (7, 7), (1, 1)], ids=str)
def test_the_tail_is_bounded_only_while_decoding(bound, decoding):
    rule = {**RULES["mass_tail"], "tail_fraction": 0.2, "drop_quantile": 0.0, "max_decode_tail": bound}
    config = spec("paper_minmax", **{**BASE, **rule})
    slots = random_slots([400], 2, 8, seed=7)
    for finalize, size in ((True, 8), (False, decoding)):
        found, _ = compress_layer(slots, LayerBudget(28, 12), D2OState(), config, finalize=finalize)
        kept = slots.take((slots.positions[..., None] == found.positions[:, :, None]).int().argmax(2), found.live)
        # 360 evicted tokens of each head: every target takes some in.
        changed = (found.values != kept.values).any(-1)
        assert changed.sum(-1).tolist() == [[size, size]]
        if not finalize:  # not pooled: rates are what slots are ranked by
            rates = kept.rates[..., 2:28]
            assert torch.equal(changed[..., 2:28], rates <= rates.kthvalue(size, -1, keepdim=True).values)


@pytest.mark.parametrize(
    "heads, dim, length, heavy, recent", [(4, 8, 40, 9, 7), (32, 128, 70, 10, 20), (1, 5, 23, 6, 3)]
)
def test_released_equals_the_published_step(heads, dim, length, heavy, recent):
    generator = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    common = randn(1, heads, 1, dim)
    keys, values = randn(1, heads, length, dim) + common, randn(1, heads, length, dim)
    scores = torch.rand(1, heads, length, generator=generator)
    positions = torch.arange(length).expand(1, heads, length)
    slots = Slots(keys, values, positions, scores, scores + 0.1, torch.zeros_like(scores))
    config, state = spec("released"), D2OState()
    published = PublishedStep()
    attention = scores[0]
    for step in range(6):
        got = published(slots.keys, slots.values, attention, heavy, recent)
        slots, state = compress_layer(slots, LayerBudget(heavy, recent), state, config, finalize=step == 0)
        torch.testing.assert_close(slots.keys, got[0])
        torch.testing.assert_close(slots.values, got[1])
        assert float(state.threshold) == pytest.approx(float(published.threshold), rel=1e-6)
        assert torch.equal(slots.scores[0, :, 4:], published.scores[:, 4:])
        more = random_slots([1], heads, dim, seed=step, dtype=torch.float32)
        # Keys of their own: of two that are equal, the last bit of a product would say which is nearer.
        slots = append(slots, more.replace(keys=randn(1, heads, 1, dim) + common, scores=torch.zeros(1, heads, 1)))
        attention = torch.rand(heads, heavy + recent + 1, generator=generator)
        slots = slots.replace(scores=slots.scores + attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_token_alone_passes_the_mean_that_it_alone_makes(dtype):
    """First eviction, one token a head: the released gate compares their mean with itself, in any batch."""
    config = spec("released")
    for seed in range(40):
        slots = random_slots([12, 15], 8, 8, seed=seed, dtype=dtype)
        _, state = compress_layer(slots, LayerBudget(8, 3), D2OState(), config)
        assert state.num_merged[0] == 8 and state.num_dropped[0] == 0
