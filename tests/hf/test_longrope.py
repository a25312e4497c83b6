"""Models that turn all tokens otherwise once a text is long: transformers lets go of the cache there; we never do."""

from __future__ import annotations

import pytest
import torch
from transformers import PhimoeConfig, PhimoeForCausalLM

from d2o_dist import D2OCache
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.batching import make_batches
from d2o_dist.engine.encode import Request, encode_row
from d2o_dist.engine.prompts import PromptRow
from d2o_dist.engine.session import Session, left_pad
from d2o_dist.models.hf.rope import rope_border
from d2o_dist.models.shape import ModelShape
from tests.hf.test_generate import make_cache
from tests.models import FAMILIES, left_padded, tiny_model, tokens
from tests.spec import spec

BORDER = 48
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
PHI3 = {"max_position_embeddings": 400, "original_max_position_embeddings": BORDER, "rope_parameters": LONG}
MOE = {
    "max_position_embeddings": 400,
    "num_local_experts": 2,
    "rope_parameters": {
        **LONG, "original_max_position_embeddings": BORDER, "short_mscale": 1.0, "long_mscale": 1.2
    },  # fmt: skip
}


@pytest.fixture(params=["phi3", "phimoe"])
def make_model(request, monkeypatch):
    """A tiny model with longrope, by its attention."""
    monkeypatch.setitem(FAMILIES, "phimoe", (PhimoeConfig, PhimoeForCausalLM, {}))
    changes = PHI3 if request.param == "phi3" else MOE
    # The experts of PhiMoE are not for float64.
    dtype = torch.float64 if request.param == "phi3" else torch.float32
    return lambda attention="d2o": tiny_model(request.param, attention=attention, **changes).to(dtype)


def generate(model, ids, cache, new, **kwargs):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **kwargs)


def full(model) -> D2OCache:
    return D2OCache(config=model.config, d2o=spec("full"))


@pytest.mark.parametrize("lengths", [[BORDER + 1, BORDER + 1], [90, 70], [BORDER - 12, 20]], ids=str)
def test_on_either_side_nothing_evicted_equals_transformers(make_model, lengths):
    reference, model = make_model("sdpa"), make_model()
    ids, mask = left_padded(lengths)
    cache = full(model)
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, cache, 12, attention_mask=mask), expected)
    assert cache.compressed.num_seen == [length + 11 for length in lengths]


def test_a_long_prompt_is_compressed(make_model):
    model = make_model()
    cache = make_cache(model)
    generate(model, tokens(1, 100), cache, 12)
    report = cache.report()
    assert report.num_seen_tokens == [111] and report.achieved_keep_ratio < 0.35


MESSAGE = r"the text would grow from [0-9]+ to [0-9]+ tokens, beyond original_max_position_embeddings \(48\)"


def test_what_crosses_the_border_is_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="grow from 48 to 49 tokens"):
        generate(model, tokens(1, 40), make_cache(model), 20)
    with pytest.raises(ValueError, match=MESSAGE):  # by chunks
        generate(model, tokens(1, 90), make_cache(model), 4, prefill_chunk_size=16)
    cache = make_cache(model)
    first = generate(model, tokens(1, 30), cache, 10)
    with pytest.raises(ValueError, match="grow from 39 to 50 tokens"):  # by a next turn
        generate(model, torch.cat([first, tokens(1, 10)], 1), cache, 4)
    session = Session(model, spec(keep_ratio=0.5))
    session.prefill(*left_pad([tokens(1, 47)[0].tolist()], 0))
    session.decode([5])
    with pytest.raises(ValueError, match="grow from 48 to 49 tokens"):
        session.decode([5])
    cache = D2OCache(config=model.config, d2o=spec("reread"))
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    with pytest.raises(ValueError, match="grow from 30 to 60 tokens"):
        cache.reread(model, tokens(1, 30))
    # One long row turns all rows of its batch; without it the others would be turned back.
    ids, mask = left_padded([60, 20])
    cache = make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match=MESSAGE):
            model(tokens(1, 1), position_ids=torch.tensor([[20]]), past_key_values=cache)


def test_a_border_without_longrope_is_none():
    """transformers lets go of the cache of any Phi-3 there, and reads the text again for nothing."""
    changes = {**PHI3, "rope_parameters": None}
    reference, model = (tiny_model("phi3", attention=name, **changes) for name in ("sdpa", "d2o"))
    expected = reference.generate(tokens(1, 40), max_new_tokens=30, do_sample=False)
    cache = full(model)
    assert rope_border(model.config) is None
    assert torch.equal(generate(model, tokens(1, 40), cache, 30), expected)
    assert cache.compressed.num_seen == [69]


def test_a_dynamic_embedding_is_that_of_transformers():
    """It turns each new token by the length of the text so far, and leaves what is held as it is, in any cache."""
    changes = {"max_position_embeddings": BORDER, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4,
                                                                      "factor": 2.0}}  # fmt: skip
    reference, model = (tiny_model("llama", attention=name, **changes) for name in ("sdpa", "d2o"))
    for length in (30, 90, 30):
        expected = reference.generate(tokens(1, length), max_new_tokens=40, do_sample=False)
        assert torch.equal(generate(model, tokens(1, length), full(model), 40), expected)


def test_a_cache_that_no_forward_was_given_says_so():
    model = tiny_model()
    cache = make_cache(model)
    assert "has seen no token" in str(cache.report())
    assert cache.report().to_dict()["achieved_keep_ratio"] is None
    with pytest.raises(ValueError, match="no forward of the model was given this cache"):
        cache.finalize()
    generate(model, tokens(1, 60), cache, 4)
    assert cache.report().compression_ratio > 0.5


SHAPE = ModelShape((None,), 4, 2, 16, vocab_size=89, max_positions=400, border=BORDER)


class Letters:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [5] * len(text)}


@pytest.mark.parametrize("count, new, fields, message", [
    (30, 19, {}, None),  # the last token is not fed
    (30, 20, {}, "from 30 to 49 tokens, beyond original_max_position_embeddings (48)"),
    (49, 50, {}, None),
    (49, 50, {"prefill_chunk": 49}, None),
    (49, 50, {"prefill_chunk": 48}, "prefill_chunk (48) must be above it"),
    (49, 50, {"parallel": {"sp": 2}}, "sp (2) ranks"),
    (30, 2, {"parallel": {"sp": 2}, "prefill_chunk": 16}, None),
    (30, 2, {"d2o": {"preset": "reread"}}, "from 30 to 60 tokens"),
    (30, 2, {"d2o": {"preset": "reread", "score": {"chunk": 18}}}, None),
], ids=str)  # fmt: skip
def test_rows_that_would_cross_the_border_are_refused_before_the_run(count, new, fields, message):
    config = InferConfig.from_dict({"model": "m", "sampling": {"max_new_tokens": new}, **fields})
    made = encode_row(PromptRow(0, 0, prompt="x" * count), Letters(), config, SHAPE)
    assert isinstance(made, Request) if message is None else message in made.error


def test_rows_on_both_sides_of_the_border_are_not_batched():
    lengths = [47, 48, 49, 60, 40]
    assert make_batches(lengths, 8, 1000, None) == [[3, 2, 1, 0, 4]]
    assert make_batches(lengths, 8, 1000, BORDER) == [[3, 2], [1, 0, 4]]
