"""Layers that attend in chunks (Llama 4), among layers without rope that are compressed, whose queries grow with the
text. On meshes: `tests/sharded`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from d2o_dist import D2OCache
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.slots.windows import Chunked, first_seen, kept, kind_of, pieces
from tests.hf.test_softmaxes import read
from tests.models import generated, left_padded, tiny_model, tokens
from tests.oracle.naive_cache import OracleCache
from tests.oracle.naive_d2o import use_float64_norms
from tests.oracle.naive_softmax import OracleSoftmax
from tests.spec import pair, spec

CHUNK = 24
# What makes queries larger is in float32.
NEAR = dict(rtol=1e-6, atol=1e-7)
PART = dict(keep_ratio=0.3, min_layer_tokens=12, eviction_interval=4)


def text(length, seed=0):
    """[length]. No two chunks begin alike: those tokens, without rope, would have the same keys, and evictions ties."""
    return 2 + (torch.arange(length) * 37 + 11 * seed) % 87


def padded(rows):
    """Ids and mask of these rows, padded on the left."""
    _, mask = left_padded([len(row) for row in rows])
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows)
    return ids, mask


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_seen_and_what_is_held(size):
    """Against the definition, query by query."""
    window = Chunked(size)
    for query in range(4 * size):
        seen = [key for key in range(query + 1) if key // size == query // size]
        assert int(first_seen(window, torch.tensor(query))) == seen[0]
        assert kept(window, query) == len(seen) - 1
        for stop in range(query + 1, 4 * size + 1):
            cut = pieces(window, query, stop)
            assert [one for _, first, end in cut for one in range(first, end)] == list(range(query, stop))
            assert all(start == first // size * size and end <= start + size for start, first, end in cut)
    assert kind_of(window) == "chunked" and kind_of(size) == "sliding"


def test_nothing_evicted_is_sdpa():
    """Rows that end at a border, before and after it, over two borders; padding shifts borders, and warms queries."""
    model = tiny_model("llama4", attention="sdpa", moe_layers=[1, 2], num_local_experts=4)
    ids, mask = left_padded([61, 48, 24, 25, 7])
    logits, written = generated(model, ids, mask)
    model.set_attn_implementation("d2o")
    caches = [D2OCache(config=model.config, d2o=spec("full"), reading=one) for one in ("whole", "layerwise")]
    for cache in (None, *caches):
        given = {} if cache is None else {"past_key_values": cache}
        found, same = generated(model, ids, mask, **given)
        assert torch.equal(same, written)
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)
    kinds = [layer.kind for layer in cache.report().layers]
    assert kinds == ["chunked", "compressed"] * 2 and cache.report().achieved_keep_ratio == 1


def test_packed_rows_without_a_cache_are_sdpa():
    model, ids = tiny_model("llama4", attention="sdpa", attention_chunk_size=5), tokens(1, 31)
    places = torch.cat([torch.arange(13), torch.arange(18)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=places, use_cache=False).logits
        model.set_attn_implementation("d2o")
        torch.testing.assert_close(model(ids, position_ids=places, use_cache=False).logits, expected)


@pytest.mark.parametrize(("preset", "chunk"), [("d2o", CHUNK), ("paper_minmax", 5)])
def test_a_row_of_a_padded_batch_in_pieces_is_the_row_alone_and_whole(preset, chunk):
    """Over two turns. transformers counts padding where it makes queries larger: not here."""
    model = use_float64_norms(tiny_model("llama4", attention_chunk_size=chunk, attn_temperature_tuning=False))
    lengths, config = [83, 7, 48], spec(preset, **PART)
    ids, mask = padded([text(length + 30, row) for row, length in enumerate(lengths)])
    steps = tuple(range(84, 100))
    batch, cache = read(model, ids, mask, (30, 83, *steps, 113), config)
    for row, length in enumerate(lengths):
        start = 83 - length
        alone, own = read(model, ids[row : row + 1, start:], mask[row : row + 1, start:],
                          [cut - start for cut in (83, *steps, 113)], config)  # fmt: skip
        torch.testing.assert_close(batch[row, start:], alone[0], **NEAR)
        for layer, single in zip(cache.layers, own.layers, strict=True):
            count = single.kv_len[0]
            assert layer.kv_len[row] == count
            assert torch.equal(layer.positions[row, :, :count], single.positions[0, :, :count])


@torch.no_grad()
@pytest.mark.parametrize("reading", ["whole", "layerwise"])
def test_rows_of_the_engine_are_warmed_by_where_they_are(reading):
    """In tiles, over two turns, whatever padding they have; a row that pauses, and others that join, change nothing."""
    model, config = use_float64_norms(tiny_model("llama4")), spec("lean", **PART)
    lengths, turns = (50, 24, 9), (13, 5, 9)
    texts = [text(100, row) for row in range(3)]

    def start(*rows):
        session = Session(model, config, reading=reading)
        return session, session.prefill(*padded([texts[row][: lengths[row]] for row in rows]), 10)

    found, at = {row: [] for row in range(3)}, list(lengths)

    def step(session, rows, present=None):
        logits = session.decode([int(texts[row][at[row]]) for row in rows], present)
        for number, row in enumerate(rows):
            if present is None or present[number]:
                found[row].append(logits[number])
                at[row] += 1

    (both, logits), (late, first) = start(0, 1), start(2)
    for row, one in enumerate([*logits, *first]):
        found[row].append(one)
    for number in range(4):
        step(both, (0, 1), [True, number != 2])
    both.join(late)
    for _ in range(30):
        step(both, (0, 1, 2))
    turn = [texts[row][at[row] : at[row] + count] for row, count in enumerate(turns)]
    for row, one in enumerate(both.prefill(*padded(turn), 6)):
        found[row].append(one)
    for row in range(3):
        own, logits = start(row)
        wanted = [logits[0], *(own.decode([int(token)])[0] for token in texts[row][lengths[row] : at[row]])]
        wanted.append(own.prefill(*padded(turn[row : row + 1]))[0])
        torch.testing.assert_close(torch.stack(found[row]), torch.stack(wanted), **NEAR)


def test_equals_the_oracle_over_a_chunked_prompt_and_a_later_turn(monkeypatch):
    """Full layers as it has them; the others against softmax over the keys of the chunk, of all that were ever seen."""
    model = tiny_model("llama4")
    config, oracle_config = pair("d2o", keep_ratio=0.4, min_layer_tokens=6, eviction_interval=4)
    past = D2OCache(config=model.config, d2o=config)
    full = [1, 3]
    oracle = OracleCache(oracle_config, len(full), past.shape.num_heads, past.shape.num_kv_heads)
    attend_layer, seen, everything = past.attend_layer, {0: 0, 2: 0}, {0: [], 2: []}

    def in_chunks(layer, q, k, v):
        everything[layer].append((k[0], v[0]))
        keys, values = (torch.cat(parts, 1) for parts in zip(*everything[layer], strict=True))
        out = torch.zeros_like(q[0])
        for head in range(q.shape[1]):
            for number, query in enumerate(q[0, head]):
                place = seen[layer] + number
                here = slice(place // CHUNK * CHUNK, place + 1)
                weights = torch.softmax(keys[head // 2, here] @ query * q.shape[3] ** -0.5, 0)
                out[head, number] = weights @ values[head // 2, here]
        seen[layer] += q.shape[2]
        return out

    def compare(layer, q, k, v, softmax, *others):
        step = q.shape[2] == 1
        if step and layer == full[0]:
            oracle.finalize()
            oracle.num_seen_tokens += 1
        if layer in full:
            places = torch.arange(q.shape[2], dtype=torch.float64) + (oracle.num_seen_tokens - int(step))
            # "s = 1 + attn_scale log(1 + floor((i + 1) / floor_scale))" of query i, from 0.
            warmth = 1 + 0.5 * torch.log(1 + torch.floor((places + 1) / 7))
            expected = (oracle.decode_step if step else oracle.prefill_chunk)(
                full.index(layer), q[0] * warmth[:, None], k[0], v[0], OracleSoftmax(softmax.scale)
            )
            if not step and layer == full[-1]:
                oracle.finish_prefill_chunk(q.shape[2])
        else:
            expected = in_chunks(layer, q, k, v)
        found = attend_layer(layer, q, k, v, softmax, *others)
        # The model has the warmth in float32.
        torch.testing.assert_close(found[0], expected, **NEAR)
        return found

    monkeypatch.setattr(past, "attend_layer", compare)
    for given in (text(41)[None], text(11, 1)[None]):
        with torch.no_grad():
            for chunk in given.split(15, dim=1):
                model(chunk, past_key_values=past)
            for token in range(8):
                model(torch.tensor([[token + 3]]), past_key_values=past)
    for index, expected in zip(full, oracle.snapshot(), strict=True):
        assert torch.equal(past.layers[index].positions[0], expected["positions"])
        torch.testing.assert_close(past.layers[index].keys[0], expected["keys"], **NEAR)
    assert seen == {0: 68, 2: 68} and past.layers[0].kv_len[0] < CHUNK + past.compressed.layers[0].SLACK


@torch.no_grad()
def test_a_second_reading_and_a_saved_cache_go_on(tmp_path):
    """The second reading attends in chunks too: what it gives is what a first reading of both gives."""
    model, ids = tiny_model("llama4"), tokens(1, 37)
    cache, plain = (D2OCache(config=model.config, d2o=spec(one)) for one in ("reread", "full"))
    for one in (cache, plain):
        model(ids, past_key_values=one)
    heard = []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: heard.append(out))
    cache.reread(model, ids, chunk=64)
    hook.remove()
    torch.testing.assert_close(heard[0][:, -1], model(ids, past_key_values=plain).logits[:, -1], **NEAR)
    cache.save(tmp_path)
    again = D2OCache.load(tmp_path, model)
    for other in (again, copy.deepcopy(cache)):
        found = [model(torch.tensor([[token]]), past_key_values=other).logits for token in (5, 6, 7)]
        if other is again:
            kept_logits = found
    assert all(map(torch.equal, found, kept_logits))
    assert again.compressed.windows == [Chunked(CHUNK), None] * 2


def test_what_is_refused_and_the_whole_model_of_images_and_text():
    own = tiny_model("llama4").config
    assert shape_of(Llama4Config(text_config=own.to_dict())).windows == (Chunked(CHUNK), None) * 2
    assert Llama4ForConditionalGeneration.config_class is Llama4Config
    for changes, message in (
        ({"no_rope_layers": [1] * 4}, r"the model has chunked attention in all of its layers \(4\)"),
        ({"attention_chunk_size": None}, "layer_types has chunked_attention, but attention_chunk_size is None"),
    ):
        config = type(own)(**{**own.to_dict(), "layer_types": None, **changes})
        config._attn_implementation = "d2o"
        with pytest.raises(ValueError, match=message):
            D2OCache(config=config, d2o=spec("d2o", keep_ratio=0.5))
