"""Budgets: the total is met exactly, clamps hold, and everything impossible is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o_dist.core.ranked import count_highest, deal_level
from d2o_dist.core.statistics import column_sum_variance, naive_column_sums
from d2o_dist.policy import D2OConfig
from d2o_dist.policy import layer_slots as rules
from d2o_dist.policy.budget import Ranked, layer_dispersions, num_ranked
from d2o_dist.policy.layer_slots import water_fill
from tests.spec import spec

RATIOS = st.integers(2, 100).map(lambda n: n / 100)


def layer_slots(log_weights: list[float], num_tokens: int, config: D2OConfig) -> list[int]:
    return rules.layer_slots(log_weights, num_tokens, config.budget, config.size)


def check_total(config: D2OConfig, num_layers: int) -> None:
    rules.check_total(config.budget, config.size, num_layers)


def ranked_log_weights(counts: list[int]) -> list[float]:
    return Ranked().log_weights(len(counts), counts)


def log_softmax(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).log_softmax(0).tolist()


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(-60, 60), min_size=1, max_size=12),
    keep_ratio=RATIOS,
    num_tokens=st.integers(1, 5000),
    data=st.data(),
)
def test_the_total_is_met_and_never_exceeded(weights, keep_ratio, num_tokens, data):
    layers = len(weights)
    room = math.floor(keep_ratio * layers - 0.01 * layers - 1e-6)
    count = data.draw(st.integers(0, max(min(room, layers - 1), 0)))
    config = spec(keep_ratio=keep_ratio, min_layer_tokens=0, protected_layers=tuple(range(count)))
    slots = layer_slots(log_softmax(weights), num_tokens, config)
    assert sum(slots) == math.floor(keep_ratio * layers * num_tokens + 1e-9)
    assert all(s == num_tokens for s in slots[:count])
    assert all(math.floor(0.01 * num_tokens) <= s <= num_tokens for s in slots)
    assert sum(slots) / (layers * num_tokens) <= keep_ratio


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(-300, 300), min_size=1, max_size=10), total=st.floats(0.02, 1))
def test_water_fill_is_the_clamped_scaling_of_the_weights(weights, total):
    """The only shares of the form clamp(s * w) with the right sum: checked against bisection on s."""
    layers = len(weights)
    shares = water_fill(log_softmax(weights), total * layers, [0.01] * layers, [1.0] * layers)
    assert sum(shares) == pytest.approx(total * layers, abs=1e-9)
    logs = torch.tensor(log_softmax(weights), dtype=torch.float64)
    low, high = -10.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (logs + middle).exp().clamp(0.01, 1).sum() < total * layers else (low, middle)
    expected = (logs + high).exp().clamp(0.01, 1)
    # Where no layer is free, s is not unique and the sum alone decides.
    if ((expected > 0.01) & (expected < 1)).any():
        torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_a_round_that_hits_both_clamps_still_meets_the_total():
    shares = water_fill(log_softmax([0.0, -50, -80, -90]), 2.0, [0.01] * 4, [1.0] * 4)
    assert shares == pytest.approx([1.0, 0.98, 0.01, 0.01])


def test_remainders_go_to_the_largest_then_to_the_lower_layer():
    config = spec(keep_ratio=0.5, allocation="uniform", min_layer_tokens=0)
    assert layer_slots([0.0] * 4, 7, config) == [4, 4, 3, 3]
    config = spec(keep_ratio=0.29, allocation="uniform", min_layer_tokens=0)
    assert layer_slots([0.0], 100, config) == [29]


def test_short_prompts_are_not_squeezed_and_may_grow():
    config = spec(keep_ratio=0.1, allocation="uniform")
    assert [layer_slots([0.0] * 2, count, config) for count in (20, 1000, 5000)] == [[256] * 2, [256] * 2, [500] * 2]
    assert layer_slots(log_softmax([0.0, 9.0]), 5000, config) == [256, 950]
    small = config.replace(budget={"min_layer_tokens": 32})
    assert [layer_slots([0.0] * 2, count, small) for count in (20, 100, 1000)] == [[32] * 2, [32] * 2, [100] * 2]
    heads = spec("reread", keep_ratio=0.1)
    assert layer_slots([0.0] * 4, 20, heads) == [16] * 4
    assert layer_slots([0.0] * 2, 20, spec(keep_tokens=64)) == [256] * 2


@pytest.mark.parametrize("keep_ratio", [0.2, 0.1, 0.05, 0.02])
def test_what_ranked_heads_get_at_least_is_part_of_the_total(keep_ratio):
    """As on a model of 90 heads, of which a third has nearly all of the best tokens."""
    counts = [100 + head for head in range(30)] + [1, 0, 0] * 20
    config = spec("reread", keep_ratio=keep_ratio)
    slots = layer_slots(ranked_log_weights(counts), 1024, config)
    assert min(slots) == 16 and sum(slots) == max(math.floor(keep_ratio * 90 * 1024), 90 * 16)
    protected = config.replace(keep_ratio=0.2, budget={"protected_layers": [0, 1]})
    slots = layer_slots(ranked_log_weights(counts), 1024, protected)
    assert slots[:2] == [1024] * 2 and min(slots) == 16 and sum(slots) == math.floor(0.2 * 90 * 1024)
    absolute = spec("reread", keep_tokens=40)
    assert sum(layer_slots(ranked_log_weights(counts), 1024, absolute)) == 40 * 90


def test_absolute_budgets():
    config = spec(keep_tokens=64, allocation="uniform", min_layer_tokens=32)
    assert layer_slots([0.0] * 3, 50, config) == [64] * 3
    assert layer_slots([0.0] * 3, 100_000, config) == [64] * 3
    uneven = layer_slots(log_softmax([0.0, 1.0, 2.0]), 500, config.replace(budget={"min_layer_tokens": 0}))
    assert sum(uneven) == 3 * 64 and uneven[0] < uneven[1] < uneven[2]


def test_released_budgets_are_plain_floors():
    config = spec("released", keep_ratio=0.2)
    weights = [0.0, -0.5, -1.0, -0.2, -0.7]
    shares = torch.tensor(weights, dtype=torch.float64).softmax(0) * 5 * 0.2
    slots = layer_slots(log_softmax(weights), 1000, config)
    assert slots == [1000, 1000, math.floor(shares[2] * 1000), math.floor(shares[3] * 1000), 1000]


def test_pyramid_falls_linearly_to_a_twentieth_of_the_average():
    config = spec(keep_ratio=0.1, allocation="pyramid", min_layer_tokens=0, min_layer_ratio=0.0)
    slots = layer_slots(config.budget.log_weights(5, None), 10_000, config)
    assert slots == [1950, 1475, 1000, 525, 50]


def ranked_counts(rankings: list[torch.Tensor], config: D2OConfig) -> torch.Tensor:
    """[L, H] of one row whose tokens [H, T] are all at hand."""
    rows = [one[None] for one in rankings]
    heads, tokens = rankings[0].shape
    wanted = torch.tensor([num_ranked(tokens, heads * len(rankings), config.size)])
    live = [torch.ones_like(one, dtype=torch.bool) for one in rows]
    return deal_level(*count_highest(rows, live, wanted, lambda counts: counts), wanted)[0]


def test_shares_by_rank_are_counts_of_the_best():
    config = spec(allocation="ranked", selection="window", keep_ratio=0.5)
    first, second = torch.tensor([[9.0, 1.0, 8.0, 0.0]]), torch.tensor([[7.0, 1.0, 0.0, 6.0]])
    assert ranked_counts([first, second], config).tolist() == [[2], [2]]
    # Of the two ones the lower layer's is among the best 5 of 8.
    assert ranked_counts([first, second], config.replace(keep_ratio=0.625)).tolist() == [[3], [2]]
    # A layer without any of the best has next to nothing, and is still finite.
    counts = ranked_counts([torch.cat([first, second]), torch.zeros(2, 4)], config.replace(keep_ratio=0.25))
    assert counts.tolist() == [[2, 2], [0, 0]]
    shares = ranked_log_weights(counts.sum(1).tolist())
    assert shares[0] == 0 and -1000 < shares[1] < -700
    assert layer_slots(shares, 100, config.replace(keep_ratio=0.25, budget={"min_layer_tokens": 0})) == [49, 1]


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 5), heads=st.integers(1, 3), tokens=st.integers(1, 20), kinds=st.integers(1, 30),
    seed=st.integers(0, 99), keep=st.one_of(RATIOS, st.integers(1, 30)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_shares_by_rank_against_loops(layers, heads, tokens, kinds, seed, keep, dtype):
    """Many ties, negative numbers, zeros of both signs and infinities; absolute budgets beyond the prompt."""
    generator = torch.Generator().manual_seed(seed)
    rankings = [torch.randint(kinds, (heads, tokens), generator=generator).to(dtype) for _ in range(layers)]
    odd = torch.tensor([-torch.inf, -3.5e-30, -0.0, 1e-40, torch.inf, -2.0], dtype=dtype)
    for one in rankings:
        one.flatten()[:: 3] *= odd[torch.randint(len(odd), one.flatten()[:: 3].shape, generator=generator)].nan_to_num()
    size = {"keep_tokens": keep} if isinstance(keep, int) else {"keep_ratio": keep}
    config = spec(allocation="ranked", selection="window", **size)
    everything = sorted(
        (-float(rankings[layer][head, token]), layer, head, token)
        for layer in range(layers) for head in range(heads) for token in range(tokens)
    )  # fmt: skip
    ratio = min(1.0, keep / tokens) if isinstance(keep, int) else keep
    best = [place for _, *place, _ in everything[: max(1, math.floor(ratio * len(everything) + 1e-9))]]
    counts = ranked_counts(rankings, config)
    assert counts.tolist() == [[best.count([layer, head]) for head in range(heads)] for layer in range(layers)]
    for layer, share in enumerate(ranked_log_weights(counts.sum(1).tolist())):
        wanted = sum(place[0] == layer for place in best) / len(best)
        assert math.exp(share) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_highest_are_counted_row_by_row_over_shards_that_differ(dtype):
    """Ragged rows, an empty shard, a head without tokens: against a sort of everything."""
    generator = torch.Generator().manual_seed(1)
    layers, heads, lengths = 3, 2, [[40, 7], [0, 0], [23, 31]]  # of each shard, of each row
    shards = []
    for counts in lengths:
        width = max(counts)
        rankings = [torch.randn(2, heads, width, generator=generator).mul(9).round().to(dtype) for _ in range(layers)]
        live = [(torch.arange(width) < torch.tensor(counts)[:, None, None]).expand(2, heads, width).clone()
                for _ in range(layers)]  # fmt: skip
        live[1][0, 1] = False
        shards.append((rankings, live))
    num_highest = torch.tensor([100, 37])

    def everywhere(part: int, row: int) -> list[float]:
        """All live rankings of a row on all shards, of one layer and head or, with -1, of all."""
        places = [divmod(part, heads)] if part >= 0 else [(i, g) for i in range(layers) for g in range(heads)]
        return [value for rankings, live in shards for layer, head in places
                for value in rankings[layer][row, head][live[layer][row, head]].tolist()]  # fmt: skip

    # The ranks in turn: each call of `over_ranks` needs what the others have counted in theirs.
    asked = [[] for _ in shards]

    def add(number):
        def over_ranks(counts):
            asked[number].append(counts.clone())
            return sum(seen[len(asked[number]) - 1] for seen in known) if known else counts
        return over_ranks

    known: list[list[torch.Tensor]] = []
    # Digits are found one after the other: replay until the sums of all shards are known for every digit.
    for _ in range(8 * dtype.itemsize // 8 + 1):
        asked = [[] for _ in shards]
        found = [count_highest(*shard, num_highest, add(number)) for number, shard in enumerate(shards)]
        known = asked
    above, level = (sum(parts) for parts in zip(*found, strict=True))
    counts = deal_level(above, level, num_highest)
    for row in range(2):
        cut = sorted(everywhere(-1, row), reverse=True)[int(num_highest[row]) - 1]
        for part in range(layers * heads):
            layer, head = divmod(part, heads)
            mine = everywhere(part, row)
            assert int(above[row, head, layer]) == sum(value > cut for value in mine)
            assert int(level[row, head, layer]) == sum(value == cut for value in mine)
        assert int(counts[row].sum()) == int(num_highest[row])


def test_protected_layers_that_exceed_the_total_are_refused():
    with pytest.raises(ValueError, match=r"keep_ratio \(0.2\) of 4 layers is 0.8 layers.*2 protected.*2.02"):
        check_total(spec(keep_ratio=0.2, protected_layers=(0, 1)), 4)
    check_total(spec("released", keep_ratio=0.2), 4)
    config = spec(keep_tokens=64, protected_layers=(0,))
    with pytest.raises(ValueError, match=r"keep_tokens \(64\) of 4 layers is 256 tokens.*5000"):
        layer_slots([0.0] * 4, 5000, config)


@pytest.mark.parametrize("rule", ["heads_minmax", "layers_minmax", "raw", "log_zscore"])
def test_dispersions_by_their_formulas(rule):
    variances = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9
    found = layer_dispersions(variances, rule)
    means = [sum(row) / len(row) for row in variances.tolist()]
    if rule == "raw":
        expected = means
    elif rule == "layers_minmax":
        expected = [(m - min(means)) / (max(means) - min(means) + 1e-6) for m in means]
    elif rule == "heads_minmax":
        expected = [sum((x - min(r)) / (max(r) - min(r) + 1e-6) for x in r) / len(r) for r in variances.tolist()]
    else:
        logs = [math.log(m) for m in means]
        mean = sum(logs) / len(logs)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
        expected = [(x - mean) / deviation for x in logs]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ["heads_minmax", "layers_minmax", "raw", "log_zscore"])
def test_dispersions_of_one_layer_and_of_equal_layers_are_finite(rule):
    assert layer_dispersions(torch.zeros(1, 3), rule).isfinite().all()
    assert layer_dispersions(torch.full((4, 3), 2.5), rule).unique().numel() == 1


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 1000),
    sharpness=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_column_sums_add_up_to_the_length_and_permuting_heads_permutes_them(length, heads, seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], length, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(2, heads[1], length, 8, dtype=torch.float64, generator=generator)
    sums = naive_column_sums(q, k, sharpness)
    torch.testing.assert_close(sums.sum(-1), torch.full((2, heads[0]), float(length), dtype=torch.float64))
    variance = column_sum_variance(sums)
    if length > 1:
        torch.testing.assert_close(variance, sums.var(-1, unbiased=True))
    else:
        assert variance.eq(0).all()
    if heads[0] == heads[1]:
        return
    group = heads[0] // heads[1]
    order = torch.cat([torch.arange(group).flip(0) + group * g for g in range(heads[1])])
    torch.testing.assert_close(naive_column_sums(q[:, order], k, sharpness), sums[:, order])


def test_remainders_that_are_equal_in_exact_arithmetic_tie():
    config = spec(keep_ratio=0.25, allocation="pyramid", min_layer_tokens=0, min_layer_ratio=0.0)
    assert layer_slots(config.budget.log_weights(2, None), 40, config) == [20, 0]


def test_without_an_exact_total_the_minimum_holds_above_the_ratio():
    config = spec("released", keep_ratio=0.005, protected_layers=())
    assert layer_slots(log_softmax([0.0, -9.0]), 100_000, config) == [1000, 1000]
