"""A cache forked from one shared prefill is the cache of a prefill of its own."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.engine.session import Session
from d2o_dist.eval.gathering import gathering_config, group_by_queries
from d2o_dist.eval.reading import Reading
from d2o_dist.models.hf import D2OCache
from d2o_dist.policy.config import D2OConfig
from tests.models import left_padded, tiny_model, tokens
from tests.spec import PRESETS, spec

LENGTHS = [70, 41]


def config_of(name: str, **overrides) -> D2OConfig:
    size = {} if name == "full" else {"keep_ratio": 0.4}
    return spec(name, **({} if name == "full" else {"min_layer_tokens": 8}), **size, **overrides)


ALL = {name: config_of(name) for name in PRESETS} | {"short": config_of("mass", rate_window=5)}
STRIDED = {"score_queries": "strided", "score_query_stride": 5, "score_near_distance": 7}
ALL["strided"] = config_of("paper_minmax", **STRIDED)
ALL["strided_mass"] = config_of("mass", **STRIDED, rate_window=3)


def rows_of(lengths: list[int]) -> list[list[int]]:
    ids, mask = left_padded(lengths, seed=3)
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module", params=[None, 16])
def chunk(request):
    return request.param


@pytest.fixture(scope="module")
def reading(model, chunk):
    return Reading(model, rows_of(LENGTHS), list(ALL.values()), pad_id=0, chunk=chunk)


def state(cache: D2OCache):
    for layer in cache.layers:
        yield {name: getattr(layer, name) for name in ("keys", "values", "positions", "scores", "rates", "log_mass")}


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_fork_equals_a_prefill_of_its_own(model, reading, chunk, name):
    ids, mask = left_padded(LENGTHS, seed=3)
    own = Session(model, ALL[name], reading="whole")
    expected = own.prefill(ids, mask, chunk)
    forked = reading.start(ALL[name])
    torch.testing.assert_close(forked.prefill(ids, mask), expected, rtol=0, atol=1e-10)
    for step in range(20):
        for mine, theirs in zip(state(forked.cache), state(own.cache), strict=True):
            assert torch.equal(mine["positions"], theirs["positions"])
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-9)
        torch.testing.assert_close(forked.decode([5 + step, 7]), own.decode([5 + step, 7]), rtol=0, atol=1e-9)
    assert [forked.row_usage(row) for row in range(2)] == [own.row_usage(row) for row in range(2)]
    mine, theirs = forked.cache.report().to_dict(), own.cache.report().to_dict()
    for report in (mine, theirs):
        for layer in report["layers"]:
            layer["dispersion"] = [round(x, 8) for x in layer["dispersion"] or []]
            layer["threshold"] = [round(x, 8) for x in layer["threshold"] or [] if x is not None]
    assert mine == theirs


@torch.inference_mode()
def test_forks_do_not_touch_each_other_or_the_original(model, reading):
    before = [{key: value.clone() for key, value in layer.items()} for layer in state(reading.cache)]
    nothing = torch.zeros(0)
    for name in ("paper", "full", "mass"):
        session = reading.start(ALL[name])
        session.prefill(nothing, nothing)
        for _ in range(5):
            session.decode([3, 4])
    for old, new in zip(before, state(reading.cache), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert reading.cache.compressed.phase == "prefill"


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_other_families(family):
    model, config = tiny_model(family), config_of("mass")
    ids = tokens(1, 60, seed=1)
    own = Session(model, config, reading="whole")
    reading = Reading(model, ids.tolist(), [config, config_of("paper")], pad_id=0)
    with torch.inference_mode():
        expected = own.prefill(ids, torch.ones_like(ids))
        forked = reading.start(config)
        torch.testing.assert_close(forked.prefill(ids, ids), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(forked.decode([9]), own.decode([9]), rtol=0, atol=1e-9)


def test_gathers_no_more_than_is_needed():
    assert not gathering_config([ALL["full"], ALL["streaming"]]).needs_column_sums
    assert not gathering_config([ALL["full"]]).needs_rates
    only_rates = gathering_config([ALL["snapkv"], config_of("pyramidkv", rate_window=40)])
    assert only_rates.needs_rates and not only_rates.needs_column_sums and only_rates.statistics.rate_window == 40


def test_column_sums_from_different_queries_are_gathered_apart():
    strided, exact, shares, none = ALL["strided"], ALL["paper"], ALL["d2o"], ALL["snapkv"]
    assert group_by_queries([none, strided, shares, exact]) == [[strided, none], [shares], [exact]]
    assert group_by_queries([none]) == [[none]]
    assert gathering_config([strided, none]).query_sample == strided.query_sample
    with pytest.raises(ValueError, match="from different queries"):
        gathering_config([strided, exact])


def test_refusals(model, reading):
    ids = tokens(1, 50)
    bare = Reading(model, ids.tolist(), [ALL["full"]], pad_id=0)
    with pytest.raises(ValueError, match="needs column sums, and the prefill did not gather"):
        bare.cache.with_config(ALL["d2o"])
    with pytest.raises(ValueError, match=r"rate_window \(64\) must be at most the 32"):
        reading.cache.with_config(config_of("snapkv", rate_window=64))
    done = reading.cache.with_config(ALL["h2o"])
    done.finalize()
    with pytest.raises(ValueError, match="phase decode"):
        done.with_config(ALL["h2o"])
    with pytest.raises(ValueError, match="has seen 0 tokens"):
        D2OCache(config=model.config, d2o=ALL["h2o"]).with_config(ALL["h2o"])
