"""A float32 model under autocast: rotated queries and keys are float32 there, values are not."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from tests.models import tiny_model, tokens
from tests.spec import spec


@torch.inference_mode()
def logits(model, cache=None) -> torch.Tensor:
    ids = tokens(1, 96)
    with torch.autocast("cpu", torch.bfloat16):
        if cache is None:
            return model(ids).logits[:, -9:]
        parts = [model(ids[:, :88], past_key_values=cache).logits[:, -1:]]
        parts += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(88, 96)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_uncompressed_cache_is_plain_attention(family):
    expected = logits(tiny_model(family, attention="sdpa").float())
    model = tiny_model(family).float()
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.3)
    cache = D2OCache(config=model.config, d2o=spec("full"))
    torch.testing.assert_close(logits(model, cache), expected, rtol=0.05, atol=0.3)
    assert cache.layers[1].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("preset", ["d2o", "paper_minmax"])
def test_what_is_kept_and_merged_does_not_depend_on_where_it_is_compressed(preset):
    model, ids = tiny_model().float(), tokens(1, 96)
    d2o = spec(preset, keep_ratio=0.3, min_layer_tokens=8)
    caches = [D2OCache(config=model.config, d2o=d2o) for _ in range(2)]
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            for cache in caches:
                model(ids, past_key_values=cache)
            caches[0].finalize()
        caches[1].finalize()
    for inside, outside in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(inside.positions, outside.positions)
        assert torch.equal(inside.values, outside.values) and torch.equal(inside.keys, outside.keys)
