"""What masks and position ids say of columns that the cache has seen: honoured or refused, never ignored."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from tests.hf.test_generate import make_cache
from tests.models import left_padded, tiny_model, tokens
from tests.spec import spec

LENGTHS, NEW = [50, 23, 37], 24


def end_early(model, cache, ids, mask, eos, **kwargs):
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False,
                          eos_token_id=eos, pad_token_id=0, **kwargs)  # fmt: skip


def read_prompt(model, ids, mask, preset="d2o") -> D2OCache:
    """A cache that has read all but the last token of each row."""
    cache, ids, mask = make_cache(model, preset), ids[:, :-1], mask[:, :-1]
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    if preset == "reread":
        cache.reread(model, ids, mask)
    return cache


def eos_of_rows(model, ids, mask, preset="d2o") -> tuple[list[int], list[int]]:
    """Tokens that end the first two rows early, and how many tokens each row then has."""
    free = model.generate(ids, attention_mask=mask, past_key_values=read_prompt(model, ids, mask, preset),
                          max_new_tokens=NEW, do_sample=False)[:, -NEW:].tolist()  # fmt: skip
    for eos in [(one, other) for one in free[0][3:12] for other in free[1][8:20]]:
        ends = [next((n + 1 for n, token in enumerate(row) if token in eos), NEW) for row in free]
        if 0 not in eos and 3 < ends[0] < ends[1] < ends[2] == NEW:
            return list(eos), ends
    raise AssertionError("the model has no such tokens")


@pytest.mark.parametrize("preset", ["d2o", "paper_minmax", "reread"])
def test_a_second_turn_after_rows_ended_early_is_that_of_the_rows_alone(preset):
    """`generate` feeds padding to ended rows, as if it were tokens. Told so, the cache takes none of it."""
    model = tiny_model(seed=3)
    ids, mask = left_padded(LENGTHS)
    more, more_mask = left_padded([9, 20, 2], seed=8)
    eos, ends = eos_of_rows(model, ids, mask, preset)
    batch = read_prompt(model, ids, mask, preset)
    first = end_early(model, batch, ids, mask, eos, stopping_criteria=[batch.ended_rows(eos, 0)])
    answers = (torch.arange(NEW) < torch.tensor(ends)[:, None]).long()
    # All that was fed: the end-of-sequence token too, but the very last token of the longest row not yet.
    assert batch.compressed.num_seen == [50 + ends[0], 23 + ends[1], 37 + NEW - 1]
    joined, joined_mask = torch.cat([first, more], 1), torch.cat([mask, answers, more_mask], 1)
    second = model.generate(joined, attention_mask=joined_mask, past_key_values=batch, max_new_tokens=10,
                            do_sample=False)  # fmt: skip
    for row, (one, two) in enumerate(zip(LENGTHS, [9, 20, 2], strict=True)):
        alone = read_prompt(model, ids[row : row + 1, -one:], mask[row : row + 1, -one:], preset)
        text = end_early(model, alone, ids[row : row + 1, -one:], None, eos)
        assert text.shape[1] == one + ends[row]
        if ends[row] < NEW:
            with torch.no_grad():
                model(text[:, -1:], past_key_values=alone)
        text = torch.cat([text, more[row : row + 1, -two:]], 1)
        # With a mask: `generate` would make one with zeros at tokens of the padding's id.
        expected = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=alone, max_new_tokens=10,
                                  do_sample=False)  # fmt: skip
        assert torch.equal(second[row, -10:], expected[0, -10:])
        assert alone.compressed.num_seen == [batch.compressed.num_seen[row]]
        for left, right in zip(batch.layers, alone.layers, strict=True):
            mine, theirs = left.positions[row, :, : right.positions.shape[2]], right.positions[0]
            assert torch.equal(mine, theirs) and int((left.positions[row] >= 0).sum()) == int((theirs >= 0).sum())
            for name in ("keys", "values", "scores", "rates", "log_mass"):
                one, other = getattr(left, name)[row, :, : theirs.shape[1]], getattr(right, name)[0]
                torch.testing.assert_close(one[theirs >= 0], other[theirs >= 0], rtol=1e-5, atol=1e-6)


def test_a_mask_that_takes_tokens_back_is_refused_and_says_what_to_do():
    model = tiny_model(seed=3)
    ids, mask = left_padded(LENGTHS)
    eos, ends = eos_of_rows(model, ids, mask)
    cache = read_prompt(model, ids, mask)
    first = end_early(model, cache, ids, mask, eos)
    answers = (torch.arange(NEW) < torch.tensor(ends)[:, None]).long()
    joined = torch.cat([first, tokens(3, 5)], 1)
    joined_mask = torch.cat([mask, answers, torch.ones(3, 5, dtype=torch.long)], 1)
    seen = list(cache.compressed.num_seen)
    with pytest.raises(ValueError, match=f"padding in {NEW - 1 - ends[0]} columns of row 0, the first of them "
                       f"{50 + ends[0]}, but the cache took in tokens there.*ended_rows"):  # fmt: skip
        model.generate(joined, attention_mask=joined_mask, past_key_values=cache, max_new_tokens=4)
    assert cache.compressed.num_seen == seen
    # Those who want the padding attended, as it was, say so.
    joined_mask[:, : 50 + NEW - 1] = torch.cat([mask, torch.ones(3, NEW - 1, dtype=torch.long)], 1)
    model.generate(joined, attention_mask=joined_mask, past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("length", [1, 6], ids=["a step", "a chunk"])
@pytest.mark.parametrize("change, message", [
    (lambda mask: mask[:, 40:], "rows of [16] columns, but the batch has 2 rows, of which 40 columns were seen"),
    (lambda mask: mask[:, 1:], "pass the mask of the whole text"),
    (lambda mask: torch.cat([mask, mask[:, -1:]], 1), "pass the mask of the whole text"),
    (lambda mask: mask[:1], "attention_mask has 1 rows of"),
    (lambda mask: torch.ones_like(mask), "tokens in 9 columns of row 1, the first of them 0, but the cache saw pad"),
    (lambda mask: mask.index_fill(1, torch.tensor([30, 33]), 0), "padding in 2 columns of row 0, the first of them 30"),
], ids=["new only", "one too few", "one too many", "rows", "padding to tokens", "tokens to padding"])  # fmt: skip
def test_other_masks_that_contradict_what_was_seen(change, message, length):
    model = tiny_model()
    ids, mask = left_padded([40, 31])
    cache, whole = make_cache(model), torch.cat([mask, torch.ones(2, length, dtype=torch.long)], 1)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model(tokens(2, length), attention_mask=change(whole), past_key_values=cache)
        assert cache.compressed.num_seen == [40, 31] and cache.compressed.phase == "prefill"
        model(tokens(2, length), attention_mask=whole, past_key_values=cache)
    assert cache.compressed.num_seen == [40 + length, 31 + length]


def test_a_next_turn_whose_mask_forgets_the_padding_is_refused():
    """`generate` drops a mask of ones; its position ids tell of it all the same."""
    model = tiny_model()
    ids, mask = left_padded([40, 31])
    cache = make_cache(model)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    joined = torch.cat([first, tokens(2, 6)], 1)
    with pytest.raises(ValueError, match="position ids of row 1 begin at 44, .* up to 34: the row has padding"):
        model.generate(joined, attention_mask=torch.ones_like(joined), past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("where", ["call", "configuration"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_text_that_is_read_again_is_refused(family, padded, where):
    """Without `use_cache` each step of `generate` is a forward of the whole text."""
    model = tiny_model(family)
    ids, mask = left_padded([40, 31] if padded else [40, 40])
    kwargs = {"use_cache": False} if where == "call" else {}
    model.config.use_cache = model.generation_config.use_cache = where == "call"
    cache = make_cache(model)
    with pytest.raises(ValueError, match="(40 columns were seen and 41 are new|up to 39): .*use_cache False") as caught:
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, **kwargs)
    assert ("2 rows of 41 columns" if padded else "begin at 0") in str(caught.value)


def test_another_text_in_a_used_cache_is_refused():
    model = tiny_model()
    cache = make_cache(model)
    generated = model.generate(tokens(1, 30), past_key_values=cache, max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match="up to 33: .* Another text needs a new cache"), torch.no_grad():
        model(tokens(1, 30, seed=1), position_ids=torch.arange(30)[None], past_key_values=cache)
    model.generate(torch.cat([generated, tokens(1, 3)], 1), past_key_values=cache, max_new_tokens=5)


def test_rows_are_told_to_have_ended_where_they_have_not():
    model = tiny_model(seed=3)
    ids, mask = left_padded(LENGTHS)
    eos, _ = eos_of_rows(model, ids, mask)
    cache = read_prompt(model, ids, mask)
    with pytest.raises(ValueError, match="row 0 goes on with token [0-9]+ after one of eos_token_id"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False,
                       stopping_criteria=[cache.ended_rows(eos, 0)])  # fmt: skip
    cache = make_cache(model)
    with pytest.raises(ValueError, match="no beam search"):
        end_early(model, cache, ids, mask, eos, num_beams=2, stopping_criteria=[cache.ended_rows(eos, 0)])


def test_columns_follow_rows_that_are_selected_and_copied():
    model = tiny_model()
    ids, mask = left_padded([40, 31, 9])
    cache = D2OCache(config=model.config, d2o=spec("full"))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        whole = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match="row 0"):
            model(tokens(2, 1), attention_mask=whole[:2], past_key_values=cache)
        model(tokens(2, 1), attention_mask=whole[[2, 0]], past_key_values=cache)
        assert cache.compressed.num_seen == [10, 41]
