"""`torch.compile` of a model: what the cache does runs between the graphs, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import explain
from torch._dynamo.utils import counters

from d2o_dist import D2OCache
from tests.models import left_padded, tiny_model, tokens
from tests.spec import spec


def test_a_compiled_model_breaks_where_it_is_told_to_alone_and_computes_the_same():
    model = tiny_model(num_hidden_layers=3)
    ids, mask = left_padded([40, 23])
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    plain, traced = (D2OCache(config=model.config, d2o=spec(keep_ratio=0.4, min_layer_tokens=1)) for _ in range(2))
    with torch.no_grad():
        for step in (ids, ids[:, -1:], ids[:, -2:-1]):
            new = torch.ones_like(mask[:, :1])
            expected = model(step, attention_mask=mask, past_key_values=plain).logits
            found = compiled(step, attention_mask=mask, past_key_values=traced).logits
            torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-9, atol=1e-9)
            mask = torch.cat([mask, new], 1)
    breaks = counters["graph_break"]
    assert breaks and all("torch.compiler.disable()" in cause.splitlines()[0] for cause in breaks), breaks
    # Four a layer: two of the layer, around its attention, and two of that; of a prompt and of a decode step.
    assert counters["stats"]["unique_graphs"] <= 2 * 4 * 3
    assert all(layer.positions.equal(other.positions) for layer, other in zip(plain.layers, traced.layers, strict=True))


def test_a_layer_has_one_break():
    ids, mask = left_padded([40, 23])
    breaks = {}
    for layers in (2, 4):
        torch._dynamo.reset()
        model = tiny_model(num_hidden_layers=layers)
        cache = D2OCache(config=model.config, d2o=spec(keep_ratio=0.4, min_layer_tokens=1))
        with torch.no_grad():
            breaks[layers] = explain(model)(ids, attention_mask=mask, past_key_values=cache).graph_break_count
    assert breaks[4] - breaks[2] == 2, breaks


def test_what_a_compiled_model_hands_to_the_cache_is_checked():
    """By the attention function: `update` is part of a graph."""
    model = tiny_model(num_hidden_layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        compiled(tokens(2, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="batch size 2 and is now used with 3"):
            compiled(tokens(3, 1), past_key_values=cache)
