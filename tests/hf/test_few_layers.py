"""Models with few full layers among windowed ones: fewer than `min_layers` share equally."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.plan.memory import rules_of
from d2o_dist.plan.model_size import size_of
from d2o_dist.policy.budget import Dispersion
from tests.models import tiny_model, tokens
from tests.oracle.naive_budgets import layer_log_weights, layer_slots
from tests.ranks import run_ranks
from tests.sharded.play import Play, assert_same, on_rank, play
from tests.spec import pair

SIZE = {"keep_ratio": 0.3, "min_layer_tokens": 3}
LENGTH = 61


def kinds(full: int) -> list[str]:
    """Of so many full layers among windowed ones; of many, two are windowed."""
    if full > 6:
        return ["sliding_attention", *["full_attention"] * full, "sliding_attention"]
    return ["sliding_attention", "full_attention"] * full


def model_of(full: int, attention: str = "d2o", **changes):
    types = kinds(full)
    return tiny_model("gemma3", attention=attention, num_hidden_layers=len(types), layer_types=types, **changes)


def read(model, d2o: D2OConfig, reading: str = "whole") -> D2OCache:
    cache = D2OCache(model.config, d2o, reading=reading)
    with torch.no_grad():
        model(tokens(1, LENGTH), past_key_values=cache)
    cache.finalize()
    return cache


def budgets(cache: D2OCache) -> list[int]:
    return [layer.slot_budgets[0] for layer in cache.layers if not layer.is_sliding]


@torch.no_grad()
def column_sums(full: int) -> list[torch.Tensor]:
    """[Hq, T] of each full layer, from the attention that transformers computes."""
    attentions = model_of(full, "eager")(tokens(1, LENGTH), output_attentions=True).attentions
    return [one[0].double().sum(1) for one, kind in zip(attentions, kinds(full), strict=True) if kind[0] == "f"]


@pytest.mark.parametrize("full", [3, 6, 24])
def test_budgets_are_equal_with_few_layers_and_by_dispersion_with_many(full):
    """As the oracle has them, to a total that is exact."""
    fields = {**SIZE, "min_layers": Dispersion().min_layers, "score_queries": "all"}
    d2o, oracle = pair("d2o", **fields)
    cache, sums = read(model_of(full), d2o), column_sums(full)
    wanted, _ = layer_slots(oracle, layer_log_weights(oracle, sums), LENGTH)
    assert budgets(cache) == wanted and sum(wanted) == int(0.3 * full * LENGTH)
    few, report = full < 24, cache.report()
    assert (max(wanted) - min(wanted) <= 1) == few and cache.d2o.needs_column_sums != few
    assert report.budget_rule == ("uniform" if few else "dispersion") and report.budget_rule in str(report)
    assert [layer.dispersion is None for layer in report.layers if layer.kind == "compressed"] == [few] * full
    if few:  # what shares by dispersion would have been
        _, always = pair("d2o", **{**fields, "min_layers": 0})
        assert budgets(read(model_of(full), d2o.replace(budget={"min_layers": 0}))) == layer_slots(
            always, layer_log_weights(always, sums), LENGTH)[0] != wanted  # fmt: skip


def test_with_few_layers_the_default_is_lean_and_its_budgets_are_known_before():
    model = model_of(3)
    lean = D2OConfig.preset("lean", **{"keep_ratio": 0.3, "budget": {"min_layer_tokens": 3}})
    d2o = D2OConfig(keep_ratio=0.3, budget={"min_layer_tokens": 3})
    assert rules_of(size_of(model.config), d2o) == lean and rules_of(size_of(model_of(24).config), d2o) is d2o
    whole, by_layer = read(model, d2o), read(model, d2o, "layerwise")
    assert whole.d2o == by_layer.d2o == lean and not d2o.knows_budgets and lean.knows_budgets
    for one, other in zip(whole.layers, by_layer.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-10)
    # A cache that was read under other rules, too.
    mixed = D2OConfig(score={"add_accumulated": True})
    cache = D2OCache(model.config, mixed)
    with torch.no_grad():
        model(tokens(1, LENGTH), past_key_values=cache)
    assert cache.with_config(d2o).d2o == lean


def test_heads_that_have_budgets_of_their_own_count_as_layers():
    least, heads = Dispersion().min_layers, {"num_attention_heads": 4, "num_key_value_heads": 4}
    d2o = D2OConfig(budget={"per_head": True})
    assert 2 * 3 < least <= 4 * 3
    assert D2OCache(model_of(3, **heads).config, d2o).d2o is d2o
    few = D2OCache(model_of(3).config, d2o).d2o.budget
    assert few.name == "uniform" and few.per_head


@pytest.mark.multirank
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(sp=2), ParallelConfig(tp=2, tp_engine="transformers")], ids=["sequence", "tensor"]
)
def test_ranks_share_as_one_process_does(parallel):
    fields = {"min_layers": Dispersion().min_layers, "eviction_interval": 8, "min_layer_tokens": 3}
    one = Play(family="gemma3", lengths=(61, 40), steps=18, layers=6, model={"layer_types": kinds(3)}, d2o=fields)
    wanted = play(one)
    assert all(abs(row - mean) <= 1 for layer in wanted["budgets"] if layer is not None
               for row, mean in zip(layer, (24, 16), strict=True))  # fmt: skip
    for found, _ in run_ranks(2, on_rank, one, parallel, fresh=parallel.tp > 1):
        assert_same(found, wanted, 1e-10)
