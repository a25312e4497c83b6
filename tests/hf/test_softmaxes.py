"""Models whose attention is more than a softmax of scaled products: soft caps, learned sinks, values of another dim.

Compressed they are the oracle (`test_oracle_parity`, `test_reread`), and alike on all meshes (`tests/sharded`).
"""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from d2o_dist import D2OCache
from tests.families import build, tiny_config
from tests.models import OTHERS, left_padded, tiny_model, tokens, windowed
from tests.oracle.naive_d2o import use_float64_norms
from tests.spec import spec
from tests.tiny_types import class_of


@torch.no_grad()
def read(model, ids, mask, cuts, d2o):
    """Logits of all columns, read in these pieces, and the cache."""
    cache, places = D2OCache(config=model.config, d2o=d2o), (mask.cumsum(1) - 1).clamp_min(0)
    logits = [
        model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b], past_key_values=cache).logits
        for a, b in zip((0, *cuts[:-1]), cuts, strict=True)
    ]
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("windows", [False, True])
def test_nothing_evicted_is_eager_attention(family, windows):
    """Over two turns of a padded batch; without a cache too."""
    model = use_float64_norms(tiny_model(family, attention="eager", **(windowed(family) if windows else {})))
    ids, mask = left_padded([61, 61, 9])
    ids, mask = torch.cat([ids, tokens(3, 7, seed=4)], 1), torch.cat([mask, torch.ones_like(mask[:, :7])], 1)
    here = mask.bool()
    # `eager` takes its softmax in float32, and knows no number for rows of padding.
    near = dict(rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = torch.cat([model(row[kept][None]).logits[0] for row, kept in zip(ids, here, strict=True)])
        model.set_attn_implementation("d2o")
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[here], expected, **near)
    found, _ = read(model, ids, mask, (50, 60, 61, 62, 68), spec("full"))
    torch.testing.assert_close(found[here], expected, **near)


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("preset", ["d2o", "paper_minmax"])
def test_a_row_of_a_padded_batch_and_a_prompt_in_chunks_are_the_row_alone_and_whole(family, preset):
    model = use_float64_norms(tiny_model(family, **windowed(family)))
    lengths = [83, 7, 40]
    ids, mask = left_padded(lengths)
    more = tokens(3, 30, seed=5)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    config = spec(preset, keep_ratio=0.3, min_layer_tokens=12, eviction_interval=4)
    steps = tuple(range(84, 100))
    batch, cache = read(model, ids, mask, (30, 83, *steps, 113), config)
    for row, length in enumerate(lengths):
        start = 83 - length
        alone, own = read(model, ids[row : row + 1, start:], mask[row : row + 1, start:],
                          [cut - start for cut in (83, *steps, 113)], config)  # fmt: skip
        torch.testing.assert_close(batch[row, start:], alone[0], rtol=1e-9, atol=1e-9)
        for layer, single in zip(cache.layers, own.layers, strict=True):
            count = single.kv_len[0]
            assert layer.kv_len[row] == count
            assert torch.equal(layer.positions[row, :, :count], single.positions[0, :, :count])


def test_a_model_that_takes_a_view_of_what_attention_returns():
    """AFMoE, whose prompt is a single row, read in pieces, in layers with and without windows."""
    model = build(class_of("afmoe"), tiny_config(CONFIG_MAPPING["afmoe"]), "d2o")
    ids = tokens(1, 40)
    found, _ = read(model, ids, torch.ones_like(ids), (13, 39, 40), spec("full"))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-9, atol=1e-9)
