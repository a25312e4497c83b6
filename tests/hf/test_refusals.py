"""What the integration refuses, and that the error says what to do."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoConfig

from d2o_dist import D2OCache
from tests.models import tiny_model, tokens
from tests.spec import spec


def test_a_model_whose_attention_is_not_d2o_is_refused_at_once():
    model = tiny_model(attention="sdpa")
    with pytest.raises(ValueError, match='attention is "sdpa".*set_attn_implementation'):
        D2OCache(config=model.config)


def test_a_model_switched_to_other_attention_later_is_refused():
    model = tiny_model()
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match='attention is "eager"'), torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)


def test_attention_that_never_reads_the_cache_is_noticed():
    model = tiny_model(attention="sdpa")
    config = AutoConfig.for_model("llama", **{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    cache = D2OCache(config=config)
    with pytest.raises(ValueError, match="never reached d2o attention"), torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)


def test_a_cache_of_another_model_is_refused():
    model, other = tiny_model(), tiny_model(seed=1)
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="another model"):
            other(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 4}, "4 KV heads of dim 16, but the cache holds 2"),
        ({"num_hidden_layers": 5}, "another model|made for 4 layers"),
    ],
)
def test_a_cache_of_a_model_of_another_shape_is_refused(changes, message):
    model, other = tiny_model(), tiny_model(**changes)
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            other(tokens(1, 3), past_key_values=cache)


def test_a_batch_of_another_size_or_dtype_is_refused():
    model = tiny_model()
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="batch size 2 and is now used with 3"):
            model(tokens(3, 4), past_key_values=cache)
        with pytest.raises(ValueError, match="dtype torch.float64 and is now used with torch.float32"):
            model.float()(tokens(2, 4), past_key_values=cache)


def test_a_forward_that_was_broken_off_makes_the_cache_unusable():
    model = tiny_model()
    cache = D2OCache(config=model.config)
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("lost")))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="lost"):
            model(tokens(1, 20), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="broken off"):
            model(tokens(1, 20), past_key_values=cache)


def test_assisted_and_prompt_lookup_decoding_are_refused():
    model, assistant = tiny_model(), tiny_model(attention="sdpa", seed=2)
    for kwargs in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted|cropped|speculative"):
            model.generate(tokens(1, 40), past_key_values=D2OCache(config=model.config), max_new_tokens=8,
                           do_sample=False, **kwargs)  # fmt: skip


def test_prefix_tuning_is_refused():
    model, ids = tiny_model().float(), tokens(1, 20)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with pytest.raises(ValueError, match=r"prefix tuning \(peft\) brings a cache of its own"):
        tuned.generate(input_ids=ids, past_key_values=D2OCache(config=tuned.config), max_new_tokens=4)


def test_cropping_is_refused():
    with pytest.raises(ValueError, match="cannot be cropped"):
        D2OCache(config=tiny_model().config).crop(3)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", {"layer_types": ["linear_attention"] * 4}, r"llama has no layer with attention \(4 layers\)"),
        ("llama", {"layer_types": ["full_attention", "x"] * 2}, r"not known \(layer 1 is of type 'x'\)"),
        ("llama", {"is_encoder_decoder": True}, "llama has an encoder beside its decoder"),
    ],
)
def test_models_of_other_kinds_are_refused(family, changes, message):
    config = tiny_model(family).config
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        D2OCache(config=config)


def test_budgets_the_model_cannot_have_are_refused_before_any_forward():
    config = tiny_model().config
    with pytest.raises(ValueError, match="keep_ratio \\(0.2\\) of 4 layers is 0.8 layers.*2 protected layers"):
        D2OCache(config=config, d2o=spec(keep_ratio=0.2, protected_layers=(0, 1)))
    with pytest.raises(ValueError, match="protected_layers has 7, but the model has 4 layers"):
        D2OCache(config=config, d2o=spec(protected_layers=(7,)))
    with pytest.raises(ValueError, match="must be a D2OConfig, not dict"):
        D2OCache(config=config, d2o={"keep_ratio": 0.2})


def test_unknown_arguments_are_refused_with_a_cache_and_without():
    from d2o_dist.models.hf.attention import d2o_attention

    q = torch.randn(1, 4, 5, 8)
    module = torch.nn.Identity()
    for name, value in {"sinks": torch.zeros(4), "something": 0}.items():
        with pytest.raises(ValueError, match=f"attention has {name} "):
            d2o_attention(module, q, q, q, None, **{name: value})
    with pytest.raises(ValueError, match="position_bias beside softcap or s_aux"):
        d2o_attention(module, q, q, q, None, softcap=30.0, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match=r"takes a mask \[B, 1, n, S\], not one of shape \(1, 5\)"):
        d2o_attention(module, q, q, q, torch.ones(1, 5))
    model = tiny_model()
    for name, value in {"position_bias": torch.zeros(1), "cu_seq_lens_q": torch.zeros(2)}.items():
        cache = D2OCache(config=model.config)
        with pytest.raises(ValueError, match=f"attention has {name} .*a D2OCache"), torch.no_grad():
            model(tokens(1, 9), past_key_values=cache, **{name: value})


def test_attention_weights_are_refused_with_a_cache_and_without():
    model = tiny_model()
    for cache in (None, D2OCache(config=model.config)):
        with pytest.raises(ValueError, match=r"no attention weights \(output_attentions\).*eager"), torch.no_grad():
            model(tokens(1, 9), past_key_values=cache, output_attentions=True)
    assert model(tokens(1, 9), use_cache=False, output_attentions=False).attentions is None


def test_a_4d_mask_is_honoured_without_a_cache_and_refused_with_one():
    model, reference = tiny_model(), tiny_model(attention="sdpa")
    ids, seen = tokens(1, 9), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    seen[..., 3:6] = False
    with torch.no_grad():
        found, expected = (one(ids, attention_mask=seen, use_cache=False).logits for one in (model, reference))
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match=r"2D padding mask.*\(1, 1, 9, 9\)"):
            model(ids, attention_mask=seen, past_key_values=D2OCache(config=model.config))


def test_finalize_before_any_token_and_in_the_middle_of_a_forward():
    cache = D2OCache(config=tiny_model().config)
    with pytest.raises(ValueError, match="before any token"):
        cache.finalize()
    cache.compressed._tiles.layer = 2
    with pytest.raises(ValueError, match="middle of a forward"):
        cache.finalize()


def test_a_static_cache_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="static size"):
        ids = tokens(1, 20)
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", max_new_tokens=4,
                       disable_compile=True)  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_through_the_cache_are_refused(training):
    """They would vanish, and the loss would be right."""
    model = tiny_model().train(training)
    with pytest.raises(ValueError, match=r"does not carry gradients: run the model under torch.no_grad\(\)"):
        model(tokens(1, 20), past_key_values=D2OCache(config=model.config))
    model.requires_grad_(False).model.layers[3].self_attn.v_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="does not carry gradients"):
        model(tokens(1, 20), past_key_values=D2OCache(config=model.config))


def test_where_nothing_has_gradients_they_may_be_on():
    model = tiny_model().requires_grad_(False)
    cache = D2OCache(config=model.config)
    assert torch.is_grad_enabled()
    assert model(tokens(1, 20), past_key_values=cache).logits.isfinite().all()
    assert not cache.layers[0].keys.requires_grad


def test_layers_on_several_devices():
    """As with `device_map`: budgets and steps of all layers are decided on one device."""
    model = tiny_model()
    cache = D2OCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
    elsewhere = torch.empty(1, 2, 1, 16, dtype=torch.float64, device="meta")
    with pytest.raises(ValueError, match=r"filled with device cpu and is now used with meta: .*\(device_map\)"):
        cache.update(elsewhere, elsewhere, 0)
