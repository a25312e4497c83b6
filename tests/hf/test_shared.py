"""Layers that attend to keys and values of others: Gemma 3n, and Gemma 4, which computes them only for the columns of a
prompt whose logits are asked for."""

from __future__ import annotations

import copy

import pytest
import torch

from d2o_dist import D2OCache
from d2o_dist.cache.order import Order
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.masks import LazyMask
from d2o_dist.models.hf.shard import mark_replicas
from d2o_dist.train.model import check_trainable
from tests.hf.test_softmaxes import read
from tests.models import SHARED, generated, left_padded, tiny_model, tokens
from tests.oracle.naive_d2o import use_float64_norms
from tests.oracle.naive_shared import SharedOracleCache
from tests.oracle.naive_softmax import OracleSoftmax
from tests.spec import pair, spec

PART = dict(keep_ratio=0.3, min_layer_tokens=12, eviction_interval=4)
WINDOW = 24


def test_the_order_of_layers():
    order = Order(4, (2, 3, 3, 2))
    assert [order.owner(layer) for layer in range(8)] == [0, 1, 2, 3, 2, 3, 3, 2]
    assert [order.place(layer) for layer in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [order.done_after(layer) for layer in range(8)] == [0, 1, None, None, None, None, 3, 2]
    assert [order.is_last(layer) for layer in range(8)] == [False] * 7 + [True]
    assert order.sharing(2) == (3, 3) and order.sharing(0) == (1, 1)
    assert Order(2, (1,), reads_prompts=False).sharing(1) == (2, 1) and Order(1).is_last(0)


@pytest.mark.parametrize("family", SHARED)
def test_nothing_evicted_is_sdpa(family):
    """Without a cache too; rows shorter and longer than the window. Layers with keys of their own are numbered."""
    model = tiny_model(family, attention="sdpa")
    ids, mask = left_padded([61, 25, 7])
    logits, written = generated(model, ids, mask)
    model.set_attn_implementation("d2o")
    caches = [D2OCache(config=model.config, d2o=spec("full"), reading=one) for one in ("whole", "layerwise")]
    for cache in (None, *caches):
        found, same = generated(model, ids, mask, **({} if cache is None else {"past_key_values": cache}))
        assert torch.equal(same, written)
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)
    report = cache.report()
    assert [layer.kind for layer in report.layers] == ["compressed", "sliding", "compressed"]
    assert report.achieved_keep_ratio == 1 and max(cache.compressed.layers[1].kv_len) < WINDOW + 64


@pytest.mark.parametrize(("family", "preset"), [("gemma3n", "paper_minmax"), ("gemma4", "d2o")])
def test_a_row_of_a_padded_batch_in_pieces_is_the_row_alone_and_whole(family, preset):
    """Over two turns; by `read`, which asks for logits of all columns."""
    model = use_float64_norms(tiny_model(family))
    lengths, config = [83, 7, 40], spec(preset, **PART)
    ids, mask = left_padded(lengths)
    more = tokens(3, 30, seed=5)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    steps = tuple(range(84, 100))
    batch, cache = read(model, ids, mask, (30, 83, *steps, 113), config)
    for row, length in enumerate(lengths):
        start = 83 - length
        alone, own = read(model, ids[row : row + 1, start:], mask[row : row + 1, start:],
                          [cut - start for cut in (83, *steps, 113)], config)  # fmt: skip
        torch.testing.assert_close(batch[row, start:], alone[0], rtol=1e-8, atol=1e-8)
        for layer, single in zip(cache.compressed.layers, own.compressed.layers, strict=True):
            count = single.kv_len[0]
            assert layer.kv_len[row] == count
            assert torch.equal(layer.slots.positions[row, :, :count], single.slots.positions[0, :, :count])


@torch.no_grad()
@pytest.mark.parametrize("family", SHARED)
def test_what_is_kept_does_not_depend_on_who_asks_for_logits(family):
    """Nor on chunks, of which Gemma 4 computes a last column each; nor on when a layer is compressed, if budgets are
    known."""
    model, ids = use_float64_norms(tiny_model(family)), tokens(1, 70)
    kept = []
    for logits, chunks, reading in ((0, [70], "whole"), (1, [70], "layerwise"), (3, [33, 37], "whole")):
        cache, seen = D2OCache(config=model.config, d2o=spec("lean", **PART), reading=reading), 0
        for count in chunks:
            last = model(ids[:, seen : seen + count], past_key_values=cache, logits_to_keep=logits).logits[:, -1]
            seen += count
        for token in range(12):
            last = model(torch.tensor([[token + 3]]), past_key_values=cache).logits[:, -1]
        layers = [layer.slots for layer in cache.compressed.layers]
        kept.append([last, *(layers[number].positions for number in (0, 2)), layers[2].rates])
    for other in kept[1:]:
        for one, same in zip(kept[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize("case", ["d2o", "paper_minmax"])
def test_equals_the_oracle_over_a_chunked_prompt_and_a_later_turn(family, case, monkeypatch):
    """Full layers as it has them, with what those that share their keys see; windows against all keys ever seen."""
    model = use_float64_norms(tiny_model(family))
    config, oracle_config = pair(case, keep_ratio=0.4, min_layer_tokens=6, eviction_interval=4)
    past = D2OCache(config=model.config, d2o=config)
    shape, full = past.shape, {0: 0, 2: 1}
    assert shape.looks == (2, 1, 2)
    oracle = SharedOracleCache(oracle_config, len(full), shape.num_heads, shape.num_kv_heads)
    attend_layer, everything, met = past.attend_layer, [], []

    def in_window(q):
        keys, values = (torch.cat(parts, 1) for parts in zip(*everything, strict=True))
        place = torch.arange(keys.shape[1])
        query = place[-q.shape[2] :, None]
        hidden = (place > query) | (place <= query - WINDOW)
        products = q[0] @ keys.repeat_interleave(2, 0).transpose(1, 2)  # the scale of these models is 1
        return products.masked_fill(hidden, -torch.inf).softmax(-1) @ values.repeat_interleave(2, 0)

    def compare(layer, q, k, v, softmax, *others):
        if layer == 0:
            oracle.begin_forward(q.shape[2] == 1)
        owner = layer if layer < 3 else shape.looks[layer - 3]
        if owner == 1:
            everything.extend([(k[0], v[0])] * (layer == owner))
            expected = in_window(q)
        elif layer == owner:
            expected = oracle.read(full[owner], q[0], k[0], v[0], OracleSoftmax(softmax.scale))
        else:
            expected = oracle.look(full[owner], q[0], OracleSoftmax(softmax.scale))
        if layer == 5:
            oracle.end_forward(reads_prompts=family == "gemma3n")
        found = attend_layer(layer, q, k, v, softmax, *others)
        torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-9)
        met.append((layer, q.shape[2]))
        return found

    monkeypatch.setattr(past, "attend_layer", compare)
    for given in (tokens(1, 41, 0), tokens(1, 11, 1)):
        with torch.no_grad():
            for chunk in given.split(21, dim=1):
                model(chunk, past_key_values=past, logits_to_keep=2)
            for token in range(8):
                model(torch.tensor([[token + 3]]), past_key_values=past)
    columns = 2 if family == "gemma4" else 21
    assert met[:6] == [(0, 21), (1, 21), (2, 21), (3, columns), (4, columns), (5, columns)]
    for index, expected in zip(full, oracle.snapshot(), strict=True):
        slots = past.layers[index]
        assert torch.equal(slots.positions[0], expected["positions"])
        for name in ("keys", "log_mass", *(("rates",) if config.needs_rates else ())):
            torch.testing.assert_close(getattr(slots, name)[0], expected[name], rtol=1e-8, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", SHARED)
def test_rows_come_go_and_pause_heads_have_budgets_and_a_cache_is_saved(family, tmp_path):
    model = use_float64_norms(tiny_model(family))
    config = spec("lean", **PART, budget_per="head")
    both, late = (Session(model, config) for _ in range(2))
    ids, mask = left_padded([50, 31])
    alone = Session(model, config)
    both.prefill(ids, mask, 20), late.prefill(*left_padded([9])), alone.prefill(ids[1:, -31:], mask[1:, -31:])
    for number in range(6):
        found = both.decode([5, number + 7], [True, number != 2])
        if number != 2:
            torch.testing.assert_close(found[1], alone.decode([number + 7])[0], rtol=1e-9, atol=1e-9)
    both.keep_rows([1])
    both.join(late)
    for number in range(6):
        expected = alone.decode([number + 9])
        torch.testing.assert_close(both.decode([number + 9, 4])[0], expected[0], rtol=1e-9, atol=1e-9)
    turn = tokens(1, 6)
    expected, cache = alone.prefill(turn, torch.ones_like(turn)), alone.cache
    cache.save(tmp_path)
    again = [D2OCache.load(tmp_path, model), copy.deepcopy(cache), cache]
    for token in (5, 6, 7):
        first, *others = [model(torch.tensor([[token]]), past_key_values=one).logits for one in again]
        assert all(torch.equal(first, other) for other in others)


def test_a_mask_of_the_last_queries_is_a_view_of_the_whole():
    """As `eager` gives it, and written through; other parts of a mask are tensors."""
    heard = []
    model = tiny_model("gemma4", num_hidden_layers=6)
    ids, mask = left_padded([12, 5])

    def hear(module, args, kwargs):
        heard.append(kwargs["attention_mask"])

    hooks = [layer.register_forward_pre_hook(hear, with_kwargs=True) for layer in model.model.layers]
    cache = D2OCache(config=model.config, d2o=spec("full"))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=3)
    for hook in hooks:
        hook.remove()
    whole, part = heard[0], heard[3]
    assert isinstance(part, LazyMask) and part.shape[2] == 3 and part.whole is whole and not whole.may_be_changed
    assert torch.equal(part + 0, whole[:, :, -3:] + 0) and not isinstance(whole[:, :, 2:5], LazyMask)
    fresh = heard[1][:, :, 4:]
    fresh[:, :, 0, 0] = 7.0
    assert heard[1].may_be_changed and float((heard[1] + 0)[0, 0, 4, 0]) == 7.0


def test_what_is_refused():
    config = tiny_model("gemma3n").config
    with pytest.raises(ValueError, match="a prompt cannot be read a second time .* 3 of them have none of their own"):
        D2OCache(config=config, d2o=spec("reread"))
    with pytest.raises(ValueError, match=r"sp \(2\) cannot share a text to this model: 3 of its layers attend to the"):
        D2OCache(config=config).shape.check_sequence_ranks(2)
    with pytest.raises(ValueError, match=r"reading \(layerwise\) needs .* is given per_layer_input, of which a"):
        Session(tiny_model("gemma3n"), spec("lean", **PART), reading="layerwise")
    with pytest.raises(ValueError, match=r"tp_engine \(deepspeed\) was not made for layers that share keys"):
        mark_replicas(config, ParallelConfig(tp=2))
    with pytest.raises(ValueError, match="layers that share keys and values, which is not supported in training"):
        check_trainable(config, None)
