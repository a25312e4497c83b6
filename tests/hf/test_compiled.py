"""`torch.compile` of a model: what the cache does runs between the graphs, and changes nothing."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from d2o_dist import D2OCache
from tests.models import left_padded, tiny_model
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
    # A graph ends at the attention of each layer, and the next begins there; of a prompt and of a decode step.
    print(counters["stats"], breaks)
    assert counters["stats"]["unique_graphs"] <= 2 * (3 + 1)
    assert all(layer.positions.equal(other.positions) for layer, other in zip(plain.layers, traced.layers, strict=True))
