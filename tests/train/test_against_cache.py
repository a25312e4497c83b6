"""A training step sees what inference sees: the same logits as a `D2OCache` that was finalized after the context."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from d2o_dist.policy import D2OConfig
from d2o_dist.train.compress import compress_prompt
from tests.models import tiny_model, tokens
from tests.spec import spec
from tests.train.helpers import cut, tiny_objective

CONTEXT, LENGTH = 70, 90
CASES = {
    "d2o": {},
    "paper_minmax": {},
    "paper": {},
    "released": {"protected_layers": (0, -1)},
    "mass": {"tail_fraction": 0.3},
    "full": {},
    "streaming": {},
    "h2o": {},
    "strided": {"score_queries": "strided", "score_query_stride": 6, "score_near_distance": 9},
    "snapkv": {},
    "pyramidkv": {},
}


def config_of(preset: str) -> D2OConfig:
    size = {} if preset == "full" else {"keep_ratio": 0.3, "min_layer_tokens": 8}
    return spec("paper_minmax" if preset == "strided" else preset, **size, **CASES[preset])


def cached_logits(family: str, d2o: D2OConfig, ids: torch.Tensor) -> tuple[torch.Tensor, D2OCache]:
    """The continuation's logits through inference: prefill, finalize, and the rest in one chunk."""
    model = tiny_model(family)
    cache = D2OCache(config=model.config, d2o=d2o)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=cache)
        cache.compressed.finalize()
        return model(ids[:, CONTEXT:], past_key_values=cache).logits, cache


@pytest.mark.parametrize(
    ("preset", "family"),
    [*((preset, "llama") for preset in CASES), ("mass", "gemma3"), ("paper_minmax", "gemma3"),
     ("paper_minmax", "mistral_sliding"), ("mass", "qwen3"), ("d2o", "qwen2"), ("paper_minmax", "phi3")],
)  # fmt: skip
def test_logits_and_budgets_are_those_of_the_cache(preset, family):
    d2o, ids = config_of(preset), tokens(2, LENGTH)
    expected, cache = cached_logits(family, d2o, ids)
    objective = tiny_objective(family)
    _, layers = objective.read_prompt(cut(ids, 0, CONTEXT), d2o)
    past = compress_prompt(layers, d2o)
    hidden = objective.read_continuation(cut(ids, CONTEXT, LENGTH), past)
    found = objective.causal_lm.get_output_embeddings()(hidden)
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
    if preset != "full":
        assert past.slots == [plan.slots for plan in cache.compressed.plans]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_teacher_is_the_model_with_its_full_cache(family):
    ids = tokens(2, LENGTH)
    objective = tiny_objective(family)
    with torch.no_grad():
        expected = tiny_model(family)(ids).logits[:, CONTEXT:]
    _, layers = objective.read_prompt(cut(ids, 0, CONTEXT), None)
    hidden = objective.read_full(cut(ids, CONTEXT, LENGTH), layers)
    torch.testing.assert_close(
        objective.causal_lm.get_output_embeddings()(hidden).detach(), expected, rtol=1e-6, atol=1e-6
    )
