"""One prompt read once, for many configurations: on one process, and where ranks share it."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks
from tests.spec import spec

GATHERS = spec(keep_ratio=0.9, selection="mixed", allocation="uniform", merge="none", rate_window=32)
SIZE = {"keep_ratio": 0.4, "min_layer_tokens": 8}
CONFIGS = [
    spec("d2o", **SIZE, score_queries="all"),
    spec("paper_minmax", **SIZE),
    spec("mass", **SIZE, score_queries="all"),
    spec("snapkv", **SIZE, rate_window=16),
    spec("streaming", **SIZE),
    spec("full"),
]
TWICE = [spec("reread", **SIZE, rate_window=16), spec("reread", **SIZE, budget_per="layer")]


@torch.no_grad()
def compare(mesh=None, parallel=None) -> None:
    """Copies under each configuration against a prefill of its own: statistics to rounding, slots equal."""
    model = tiny_model()
    ids, mask = left_padded([50, 71])

    def read(config: D2OConfig) -> D2OCache:
        cache = D2OCache(model.config, config, mesh, parallel)
        model(**cache.deal(ids, mask), past_key_values=cache)
        if config.needs_reread:
            cache.reread(model, ids, mask)
        return cache

    prompt = read(GATHERS)
    twice = prompt.ranks.by_heads
    if twice:
        prompt.reread(model, ids, mask)
    for config in CONFIGS + TWICE * twice:
        mine, own = prompt.with_config(config), read(config)
        mine.finalize()
        own.finalize()
        assert mine.d2o == config
        for one, two in zip(mine.layers, own.layers, strict=True):
            assert torch.equal(one.positions, two.positions)
            assert one.slot_budgets == two.slot_budgets
            for name in ("keys", "values", "scores", "rates", "log_mass"):
                torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-10, atol=1e-12)
    assert prompt.compressed.phase == "prefill" and prompt.d2o == GATHERS


def on_rank(rank: int, world: int, parallel: ParallelConfig) -> None:
    compare(build_mesh(sp=world), parallel)


def test_one_process():
    compare()


@pytest.mark.multirank
@pytest.mark.parametrize("scheme", ["ulysses", "allgather", "ring"])
def test_sequence_ranks(scheme):
    run_ranks(2, on_rank, ParallelConfig(sp=2, sp_prefill=scheme))


@torch.no_grad()
def test_refusals():
    model = tiny_model()
    ids, _ = left_padded([30])
    cache = D2OCache(model.config, spec("snapkv", **SIZE))
    with pytest.raises(ValueError, match="only a cache in its first prefill .* phase prefill and has seen 0 tokens"):
        cache.with_config(CONFIGS[0])
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="the new configuration needs column sums, and the prefill did not gather"):
        cache.with_config(CONFIGS[0])
    with pytest.raises(ValueError, match=r"rate_window \(64\) must be at most the 32 of the prefill"):
        cache.with_config(spec("snapkv", **SIZE, rate_window=64))
    strided = spec("paper_minmax", **SIZE, score_queries="strided")
    other = D2OCache(model.config, strided)
    model(ids, past_key_values=other)
    with pytest.raises(ValueError, match=r"from all queries, and .* from one query in 8 \(all within 64 tokens\)"):
        other.with_config(spec("paper_minmax", **SIZE))
    other.with_config(spec("snapkv", **SIZE))  # reads no column sums
    other.with_config(strided.replace(keep_ratio=0.2))
    cache.finalize()
    with pytest.raises(ValueError, match="phase decode and has seen 30 tokens"):
        cache.with_config(spec("snapkv", keep_ratio=0.1))
