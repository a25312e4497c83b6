"""`attn_implementation="d2o"` without a `D2OCache` equals `sdpa`, or refuses, in whatever module takes it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import CONFIG_MAPPING, masking_utils

from d2o_dist import D2OCache
from tests.families import build, classes_of, compare, sweep, tiny_config
from tests.models import left_padded, tiny_model, tokens

# Decoders, encoders, vision towers, both in one; windows, chunks, blocks, biases; layers that attend by themselves.
EQUAL = [
    "mistral", "gemma3_text", "llama4_text", "inkling_text", "deepseek_v3", "minimax", "moshi", "clip",
    "siglip_vision_model", "vit", "bert", "modernbert", "bart", "whisper", "bloom", "codegen", "roformer",
    "gemma2", "gpt_oss",
]  # fmt: skip
MORE = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma3", "gpt2", "gpt_neox", "opt", "stablelm",
    "granite", "olmo2", "cohere2", "starcoder2", "glm4", "mixtral", "minimax_m2", "inkling_mm_model",
    "clip_vision_model", "siglip", "dinov2", "distilbert", "roberta", "t5", "mbart", "marian", "pegasus", "xglm", "mpt",
    "blip", "mpnet", "rembert", "megatron-bert", "imagegpt", "trocr",
]  # fmt: skip
REFUSED = {
    "deepseek_v32": "attention has indices",
    "moonshine": "mask is causal, but MoonshineAttention says is_causal=False",
    "gptj": "KeyError: 'd2o'",  # of transformers, when the model is made
}


@pytest.mark.parametrize("model_type", [*EQUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_equals_sdpa(model_type):
    outcomes = sweep(model_type)
    assert outcomes and {outcome.kind for outcome in outcomes.values()} == {"equal"}, outcomes


@pytest.mark.parametrize("model_type", REFUSED)
def test_is_refused_by_name(model_type):
    outcomes = sweep(model_type)
    assert outcomes
    for outcome in outcomes.values():
        assert outcome.kind == "refused" and re.search(REFUSED[model_type], outcome.why), outcome


def config_of(model_type: str, **changes):
    """(class of the bare model, tiny configuration)."""
    kind = CONFIG_MAPPING[model_type]
    return classes_of(kind)[0], tiny_config(kind, changes)


def image_prompt(model_type: str):
    """(class, configuration, inputs): two rows with one image each, of which something is not causal."""
    model_class, config = config_of(model_type, **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}))
    count = 4 if model_type == "gemma3" else 16
    image = torch.full((2, count), config.image_token_index)
    ids = torch.cat([tokens(2, 3), image, tokens(2, 6, seed=1)], 1)
    inside = (ids == config.image_token_index).long()
    # PaliGemma: 0 marks the prefix, which sees all of itself. Gemma 3: 1 marks images, each of which does.
    kinds = inside if model_type == "gemma3" else (torch.arange(ids.shape[1]) >= count + 5).long().expand(2, -1)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return model_class, config, dict(input_ids=ids, pixel_values=pixels, token_type_ids=kinds, attention_mask=mask)


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma"])
def test_images_and_prefixes_equal_sdpa_with_a_cache_too(model_type):
    model_class, config, inputs = image_prompt(model_type)
    outcome = compare(model_class, config, {**inputs, "use_cache": False})
    assert outcome.kind == "equal", outcome
    # It matters: without the kinds of tokens the mask is causal.
    model = build(model_class, config, "d2o")
    with torch.no_grad():
        found, causal = (model(**{**inputs, "token_type_ids": kinds, "use_cache": False}).last_hidden_state
                         for kinds in (inputs["token_type_ids"], None))  # fmt: skip
        tokens = inputs["attention_mask"].bool()
        assert (found - causal)[tokens].abs().max() > 1e-2
        cached = model(**inputs, past_key_values=D2OCache(config=model.config)).last_hidden_state
        torch.testing.assert_close(cached[tokens], found[tokens], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "roformer"])
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoder_and_the_same_as_a_decoder_equal_sdpa(model_type, is_decoder, padded):
    outcome = compare(*config_of(model_type, is_decoder=is_decoder), padded=padded)
    assert outcome.kind == "equal", outcome


def test_sparse_layers_that_hand_on_blocks_are_refused():
    outcome = compare(*config_of("minimax_m3_vl_text", layer_types=["full_attention", "minimax_m3_sparse"]))
    assert outcome.kind == "refused" and "attention has block_indices" in outcome.why


def test_a_causal_mask_in_a_module_that_is_not_causal_is_refused():
    """`sdpa` would drop the mask of an unpadded row and keep that of a padded one."""
    model, cache = tiny_model(), D2OCache(config=tiny_model().config)
    ids, mask = left_padded([12, 7])
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        with pytest.raises(ValueError, match="mask is causal, but LlamaAttention says is_causal=False"):
            model(ids, use_cache=False)
        with pytest.raises(ValueError, match="a D2OCache attends causally, but LlamaAttention says is_causal=False"):
            model(ids, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("padded", [True, False])
def test_a_call_that_is_not_causal_equals_sdpa_and_a_cache_refuses_it(padded):
    model, reference = tiny_model(), tiny_model(attention="sdpa")
    ids, mask = left_padded([12, 7])
    inputs = dict(input_ids=ids, attention_mask=mask if padded else None, is_causal=False)
    with torch.no_grad():
        found, expected = (one(**inputs, use_cache=False).logits for one in (model, reference))
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=0)
        with pytest.raises(ValueError, match="a D2OCache attends causally"):
            model(**inputs, past_key_values=D2OCache(config=model.config))


def test_layers_that_attend_by_themselves_are_refused_by_a_cache_before_anything_is_computed():
    for model_type in ("bloom", "codegen", "mpt"):
        _, config = config_of(model_type)
        config._attn_implementation = "d2o"
        with pytest.raises(ValueError, match=f"{model_type} has attention beside transformers' attention interface"):
            D2OCache(config=config)


def test_a_window_that_is_not_the_configurations_is_refused():
    model = tiny_model("mistral_sliding")
    cache = D2OCache(config=model.config)
    model.config.sliding_window = 12
    with pytest.raises(ValueError, match="mask has a window of 12, but its configuration has 24"), torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma3"])
@pytest.mark.parametrize(
    "positions",
    [[*range(20), *range(9), *range(30)], [*range(3, 33), *range(50, 79)], [0, *range(58)]],
    ids=["restart", "gap", "repeat"],
)
def test_packed_documents_equal_sdpa_without_a_mask_of_all_pairs(family, positions, monkeypatch):
    model, reference = tiny_model(family), tiny_model(family, attention="sdpa")
    inputs = dict(input_ids=tokens(2, 59), position_ids=torch.tensor([positions] * 2), use_cache=False)
    with torch.no_grad():
        expected = reference(**inputs).logits
        forbid_masks(monkeypatch)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


def forbid_masks(monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a mask of all pairs was made")

    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masking_utils, name, refuse)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma3", "phi3"])
def test_a_cache_never_needs_a_mask_of_all_pairs(family, monkeypatch):
    model = tiny_model(family)
    ids, mask = left_padded([60, 31])
    forbid_masks(monkeypatch)
    model.generate(ids, attention_mask=mask, past_key_values=D2OCache(config=model.config), max_new_tokens=4)


@pytest.mark.parametrize("window", [None, 7])
def test_without_a_mask_position_ids_and_windows_hold(window):
    """As engines that share the tokens of a row over ranks call it: they know no mask of the whole row."""
    from d2o_dist.models.hf.attention import d2o_attention

    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place, document = torch.arange(30), torch.tensor([0] * 11 + [1] * 19)
    for positions, packed in ((torch.cat([place[:11], place[:19]])[None], True), (place[None], False)):
        seen = place <= place[:, None]
        if packed:
            seen = seen & (document == document[:, None])
        if window:
            seen = seen & (place > place[:, None] - window)
        found = d2o_attention(torch.nn.Identity(), q, k, v, None, position_ids=positions, sliding_window=window)[0]
        logits = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(found.transpose(1, 2), logits.softmax(-1) @ v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_the_model_writes_to_is_the_one_that_holds(mode):
    from d2o_dist.models.hf.masks import make_mask

    with mode():
        mask = make_mask(batch_size=1, q_length=4, kv_length=4, dtype=torch.float64)
        assert type(mask + 0) is torch.Tensor and not mask.may_be_changed and mask.of("sdpa") is None
        mask[..., 0] = -7.0
        assert mask.may_be_changed and (mask.of("sdpa")[0, 0, :, 0] == -7).all()
        assert torch.equal(mask + 0, mask.of("sdpa"))
