"""Plain `model.generate` with a `D2OCache`: families, batches, chunks, turns, copies, beams."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from d2o_dist import D2OCache
from tests.models import FAMILIES, left_padded, tiny_model, tokens
from tests.spec import spec

SQUEEZE = dict(keep_ratio=0.3, min_layer_tokens=10, eviction_interval=4)
FULL = dict(keep_ratio=1.0, eviction_interval=None)
PRESETS = ["d2o", "paper_minmax", "released", "snapkv", "streaming"]


def make_cache(model, preset="d2o", **changes) -> D2OCache:
    values = {**SQUEEZE, **changes}
    if preset == "released":
        values["protected_layers"] = (0,)
    return D2OCache(config=model.config, d2o=spec(preset, **values))


def generate(model, ids, cache, new=24, mask=None, **kwargs):
    kwargs.update(attention_mask=mask, past_key_values=cache)
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


def assert_same_rows(left: D2OCache, row: int, right: D2OCache, other: int = 0) -> None:
    """Row `row` of one cache holds what row `other` of another holds."""
    for one, two in zip(left.layers, right.layers, strict=True):
        count = one.kv_len[row]
        if one.is_sliding:
            # Between trims a window may hold a few tokens more than the next query sees.
            count = min(count, two.kv_len[other], one._cache.windows[one.index] - 1)
            here, there = slice(one.kv_len[row] - count, one.kv_len[row]), slice(two.kv_len[other] - count, None)
        else:
            assert count == two.kv_len[other]
            here = there = slice(0, count)
        assert torch.equal(one.positions[row, :, here], two.positions[other, :, : two.kv_len[other]][:, there])
        for name in ("keys", "values"):
            torch.testing.assert_close(
                getattr(one, name)[row, :, here], getattr(two, name)[other, :, : two.kv_len[other]][:, there],
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_evicted_equals_the_full_cache(family):
    model = tiny_model(family, attention="sdpa")
    ids, mask = left_padded([61, 61, 9])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    model.set_attn_implementation("d2o")
    full = D2OCache(config=model.config, d2o=spec("full"))
    for cache in (full, make_cache(model, keep_ratio=None, keep_tokens=90), None):
        found = generate(model, ids, cache, 20, mask)
        assert torch.equal(found, expected), cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["d2o", "paper_minmax"])
def test_families_compress_their_full_attention_layers(family, preset):
    model = tiny_model(family)
    cache = make_cache(model, preset)
    generate(model, tokens(1, 80), cache, 20)
    report = cache.report()
    assert [layer.kind for layer in report.layers] == [
        "compressed" if window is None else "sliding" for window in cache.compressed.windows
    ]
    compressed = [layer for layer in report.layers if layer.kind == "compressed"]
    held_at_most = sum(layer.num_heavy[0] + layer.num_recent[0] + 3 for layer in compressed)
    assert sum(layer.kv_len[0] for layer in compressed) <= held_at_most
    if compressed:
        assert sum(n.num_heavy[0] + n.num_recent[0] for n in compressed) == int(0.3 * len(compressed) * 80)
        assert report.held_bytes < report.full_bytes
    for layer in report.layers:
        if layer.kind == "sliding":
            assert layer.kv_len[0] >= 23 and not layer.num_merged


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_of_a_left_padded_batch_equals_the_row_alone(family, preset):
    model = tiny_model(family)
    lengths = [83, 7, 40, 83, 31]
    ids, mask = left_padded(lengths)
    batch = make_cache(model, preset)
    found = generate(model, ids, batch, 20, mask)
    for row, length in enumerate(lengths):
        alone = make_cache(model, preset)
        expected = generate(model, ids[row : row + 1, -length:], alone, 20)
        assert torch.equal(found[row, -20:], expected[0, -20:])
        assert_same_rows(batch, row, alone)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_in_chunks_equals_the_prompt_in_one_piece(preset):
    model = tiny_model()
    ids, mask = left_padded([70, 33])
    whole, pieces = make_cache(model, preset), make_cache(model, preset)
    expected = generate(model, ids, whole, 20, mask)
    found = generate(model, ids, pieces, 20, mask, prefill_chunk_size=16)
    assert torch.equal(found, expected)
    for row in range(2):
        assert_same_rows(pieces, row, whole, row)


def test_a_second_turn_continues_on_the_same_cache():
    model = tiny_model()
    cache, length = make_cache(model), 64
    first = generate(model, tokens(1, length), cache, 12)
    assert cache.get_seq_length() == length + 11
    again = torch.cat([first, tokens(1, 30, seed=4)], 1)
    second = generate(model, again, cache, 12)
    assert second.shape[1] == length + 12 + 30 + 12
    slots = [layer.slot_budgets[0] for layer in cache.layers]
    assert sum(slots) == int(0.3 * 4 * (length + 12 + 30))
    assert cache.layers[0].positions.max() == second.shape[1] - 2


def test_a_second_turn_of_ragged_rows_equals_the_rows_alone():
    model = tiny_model()
    ids, mask = left_padded([50, 23])
    more, more_mask = left_padded([9, 20], seed=8)
    batch = make_cache(model, "mass")
    first = generate(model, ids, batch, 8, mask)
    joined = torch.cat([first, more], 1)
    joined_mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long), more_mask], 1)
    found = generate(model, joined, batch, 10, joined_mask)
    for row, (one, two) in enumerate([(50, 9), (23, 20)]):
        alone = make_cache(model, "mass")
        start = generate(model, ids[row : row + 1, -one:], alone, 8)
        expected = generate(model, torch.cat([start, more[row : row + 1, -two:]], 1), alone, 10)
        assert torch.equal(found[row, -10:], expected[0, -10:])
        assert_same_rows(batch, row, alone)


def test_a_prompt_is_reused_by_copies():
    model = tiny_model()
    prompt = tokens(1, 60)
    for compress_first in (False, True):
        cache = make_cache(model, "mass")
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        if compress_first:
            cache.finalize()
        outputs = []
        for seed in (1, 2, 1):
            question = torch.cat([prompt, tokens(1, 9, seed=seed)], 1)
            outputs.append(generate(model, question, copy.deepcopy(cache), 12))
        assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
        assert cache.get_seq_length() == 60
        if not compress_first:
            fresh = make_cache(model, "mass")
            assert torch.equal(generate(model, torch.cat([prompt, tokens(1, 9, seed=1)], 1), fresh, 12), outputs[0])


def test_sampling_and_several_sequences_per_prompt():
    model = tiny_model()
    ids = tokens(2, 50)
    cache = make_cache(model)
    torch.manual_seed(3)
    found = model.generate(ids, past_key_values=cache, do_sample=True, max_new_tokens=10, num_return_sequences=3)
    assert found.shape == (6, 60)
    torch.manual_seed(3)
    again = model.generate(ids, past_key_values=make_cache(model), do_sample=True, max_new_tokens=10,
                           num_return_sequences=3)  # fmt: skip
    assert torch.equal(found, again)
    assert len(cache.compressed.num_seen) == 6


def test_beam_search_scores_are_those_of_each_sequence_alone():
    model = tiny_model()
    ids, new = tokens(2, 50), 14
    cache = make_cache(model)
    found = model.generate(
        ids, past_key_values=cache, num_beams=3, max_new_tokens=new, do_sample=False, num_return_sequences=2,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for number, sequence in enumerate(found.sequences):
        alone, total = make_cache(model), 0.0
        with torch.no_grad():
            logits = model(sequence[None, :50], past_key_values=alone).logits[0, -1]
            for token in sequence[50:]:
                total += float(logits.log_softmax(-1)[token])
                logits = model(token[None, None], past_key_values=alone).logits[0, -1]
        assert float(found.sequences_scores[number]) == pytest.approx(total, abs=1e-4)


def test_without_a_d2o_cache_attention_is_plain():
    reference = tiny_model("gemma3", attention="sdpa")
    model = tiny_model("gemma3")
    ids, mask = left_padded([50, 21])
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, use_cache=False).logits
        found = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=1e-6)
        expected, found = DynamicCache(config=model.config), DynamicCache(config=model.config)
        one = reference.generate(ids, attention_mask=mask, past_key_values=expected, max_new_tokens=9, do_sample=False)
        two = model.generate(ids, attention_mask=mask, past_key_values=found, max_new_tokens=9, do_sample=False)
    assert torch.equal(one, two)


def test_a_prompt_of_one_token():
    model = tiny_model()
    cache = make_cache(model)
    assert generate(model, tokens(1, 1), cache, 30).shape == (1, 31)
    assert cache.report().num_seen_tokens == [30]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_runs_and_counts_bytes(dtype):
    model = tiny_model().to(dtype)
    cache = make_cache(model, "mass")
    generate(model, tokens(2, 70), cache, 20)
    layer = cache.layers[0]
    assert layer.keys.dtype == dtype and layer.scores.dtype == layer.log_mass.dtype == torch.float32
    report = cache.report()
    held = sum(sum(one.kv_len) for one in cache.layers)
    assert report.held_bytes == 2 * held * 2 * 16 * dtype.itemsize
    assert report.full_bytes == 2 * 4 * 2 * 89 * 2 * 16 * dtype.itemsize


@pytest.mark.parametrize("preset", ["d2o", "paper_minmax", "snapkv", "released"])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_budgets_of_next_to_nothing_run(preset, length):
    model = tiny_model()
    cache = make_cache(model, preset, keep_ratio=0.02, min_layer_tokens=0, eviction_interval=1,
                       exact_total=preset != "released")  # fmt: skip
    assert generate(model, tokens(2, length), cache, 9).shape == (2, length + 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_holds_no_memory_but_its_slots(family):
    """Phi-3 makes queries, keys and values in one projection: to hold values is not to hold all of it."""
    model = tiny_model(family)
    cache = make_cache(model)
    with torch.no_grad():
        model(tokens(2, 40), past_key_values=cache)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() <= (40 + 64) * 2 * cache.layers[0].shape[0] * tensor.shape[3] * 8


@pytest.mark.parametrize(
    ("preset", "long"),
    [(preset, True) for preset in ("d2o", "paper", "released", "reread")] + [("d2o", False), ("full", False)],
    ids=str,
)
@pytest.mark.parametrize("inside", ["prompt", "decoding", "turn", "all but finalize"])
def test_inference_mode_may_be_entered_and_left(preset, inside, long):
    """What is made in inference mode cannot be written outside of it: the cache sees to it, also with gradients on."""
    model = tiny_model().requires_grad_(False)
    parts = {"prompt": tokens(2, 40), "decoding": tokens(2, 1, 1), "turn": tokens(2, 9, 2)}
    found = []
    for modes in ({"prompt", "decoding", "turn"} if inside == "all but finalize" else {inside}, set()):
        cache = make_cache(model, preset, **(FULL if preset == "full" else {"keep_ratio": 0.3 if long else 0.99}))

        def read(part, modes=modes, cache=cache):
            with torch.inference_mode() if part in modes else nullcontext():
                return model(parts[part], past_key_values=cache).logits

        read("prompt")
        if preset == "reread":
            cache.reread(model, parts["prompt"])
        copied = copy.deepcopy(cache)
        cache.finalize()
        logits = [read("decoding") for _ in range(20)]
        cache.batch_select_indices(torch.tensor([1, 0]))
        logits += [read("turn"), read("decoding")]
        copied.finalize()
        found.append((torch.cat(logits, 1).detach(), cache, copied))
    (logits, cache, copied), (expected, plain, copied_plain) = found
    assert torch.equal(logits, expected)
    for one, other in ((cache, plain), (copied, copied_plain)):
        for layer, of_plain in zip(one.layers, other.layers, strict=True):
            assert torch.equal(layer.positions, of_plain.positions) and torch.equal(layer.values, of_plain.values)


@pytest.mark.parametrize(
    ("preset", "size"), [("d2o", {}), ("paper", {}), ("reread", {}), ("reread", {"keep_tokens": 12})], ids=str
)
def test_a_row_without_a_token_changes_nothing_for_the_others(preset, size):
    """Dummy rows fill up a batch; the tokens they are fed while decoding are theirs alone."""
    model = tiny_model()
    size = {"keep_ratio": None, **size} if size else {}
    ids, mask = left_padded([40, 0, 31])
    caches = []
    for rows in ([0, 1, 2], [0, 2]):
        cache, seen = make_cache(model, preset, **size), mask[rows]
        with torch.no_grad():
            model(ids[rows], attention_mask=seen, past_key_values=cache)
            if preset == "reread":
                cache.reread(model, ids[rows], seen)
            for step in range(12):
                seen = torch.cat([seen, torch.ones(len(rows), 1, dtype=seen.dtype)], 1)
                logits = model(tokens(3, 1, step)[rows], attention_mask=seen, past_key_values=cache).logits
                assert logits.isfinite().all()
        caches.append(cache)
    assert caches[0].compressed.num_seen == [52, 12, 43]
    assert_same_rows(caches[0], 0, caches[1], 0)
    assert_same_rows(caches[0], 2, caches[1], 1)


def test_attention_that_is_no_number_is_an_error():
    """Shares made of it would be equal ones, without a word."""
    model = tiny_model()
    model.model.layers[2].self_attn.q_proj.weight.data[0, 0] = torch.nan
    cache = make_cache(model)
    with torch.no_grad():
        model(tokens(2, 40), past_key_values=cache)
    with pytest.raises(ValueError, match="attention is not finite in 2 of 4 layers, the first of them 2"):
        cache.finalize()


@pytest.mark.parametrize("preset", [*PRESETS, "reread"])
@pytest.mark.parametrize("when", ["in the prompt", "after the prompt"])
def test_rows_are_selected_before_anything_is_compressed(preset, when):
    """The longest row goes, another comes twice, and each is as it is alone."""
    model = tiny_model()
    ids, mask = left_padded([61, 9, 40])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, rows, start = make_cache(model, preset), torch.tensor([1, 2, 1]), 0
    with torch.no_grad():
        for end in (58, 61):
            model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                  past_key_values=cache)  # fmt: skip
            if end == 61 and preset == "reread":
                cache.reread(model, ids, mask)
            if (end == 61) == (when == "after the prompt"):
                cache.batch_select_indices(rows)
                ids, mask, positions = ids[rows], mask[rows], positions[rows]
            start = end
        cache.finalize()
        for row, length in enumerate([9, 40, 9]):
            alone, prompt = make_cache(model, preset), ids[row : row + 1, 61 - length :]
            model(prompt, past_key_values=alone)
            if preset == "reread":
                alone.reread(model, prompt)
            alone.finalize()
            assert_same_rows(cache, row, alone)


@pytest.mark.parametrize(
    ("rows", "message"), [([], "no row was selected of the cache's 2"), ([0, 2], "row 2 was selected, but")], ids=str
)
def test_rows_that_are_not_there_are_refused(rows, message):
    model = tiny_model()
    cache = make_cache(model)
    with torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64))
