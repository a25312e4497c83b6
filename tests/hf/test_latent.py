"""Latent attention: what is cached is the latent and the rotated part of the key, and attention goes over latents.

Compressed it is the oracle (`test_oracle_parity`); rows and chunks are in `test_softmaxes` and `test_hybrids`, meshes
in `tests/sharded/test_parity`.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import CONFIG_MAPPING

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.latent import Expansion
from d2o_dist.models.hf.shard import mark_replicas
from d2o_dist.train.model import check_trainable
from tests.families import VARIANTS, build, tiny_config
from tests.models import left_padded, tiny_model, tokens
from tests.oracle.naive_d2o import use_float64_norms
from tests.spec import spec
from tests.tiny_types import CHANGES, class_of

FULL = D2OConfig(keep_ratio=1.0)
PART = D2OConfig(keep_ratio=0.3, eviction_interval=4, budget={"min_layers": 0, "min_layer_tokens": 6})
TYPES = ("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash",
         "minicpm3", "mistral4", "youtu")  # fmt: skip


def modules_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def asked(module: nn.Module) -> Expansion:
    like = torch.zeros(1, 1, 1, module.kv_lora_rank + module.qk_rope_head_dim, dtype=torch.float64)
    return Expansion.asked(module, *like.tensor_split([module.kv_lora_rank], -1))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_weight_that_is_read_is_what_its_module_says(model_type):
    config = tiny_config(CONFIG_MAPPING[model_type], {"num_key_value_heads": 4, **CHANGES.get(model_type, {})},
                         VARIANTS[1][0])  # fmt: skip
    module = modules_of(build(class_of(model_type), config, "d2o"))[0]
    read, said = Expansion.of_weight(module), asked(module)
    assert torch.equal(read.keys, said.keys) and torch.equal(read.values, said.values)
    assert read.offset is None and not said.offset.any()


def changed(module: nn.Module, how: str) -> None:
    """Let something else than a plain matrix make keys and values of the latents."""
    projection = module.kv_b_proj
    if how == "bias":
        projection.bias = nn.Parameter(torch.randn(projection.out_features, dtype=torch.float64))
    elif how == "hook":
        projection.register_forward_hook(lambda _, given, out: out * 1.5)
    elif how == "adapter":
        forward, more = projection.forward, torch.randn_like(projection.weight)
        projection.forward = MethodType(lambda _, x: forward(x) + 0.1 * x @ more.T, projection)
    else:
        weight_norm(projection)
        projection.parametrizations.weight.original0.data *= 1.5


@pytest.mark.parametrize("how", ["bias", "hook", "adapter", "parametrized"])
def test_whatever_makes_keys_of_latents_is_followed_at_once(how):
    """Of the last layer, whose latents are the same before and after it changes."""
    model, ids = tiny_model("deepseek"), tokens(1, 20)
    cache, module = D2OCache(config=model.config, d2o=FULL), modules_of(model)[-1]
    with torch.no_grad():
        before = model(ids).logits[:, 13:]
        model(ids[:, :13], past_key_values=cache)
        changed(module, how)
        found = model(ids[:, 13:], past_key_values=cache).logits
        model.set_attn_implementation("sdpa")
        expected = model(ids).logits[:, 13:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected - before).abs().max() > 0.01 and Expansion.of_weight(module) is None


def test_a_slot_holds_its_latent_once():
    """In a prompt and while decoding: the value is a view of the key, whose part is merged with it."""
    model, ids = tiny_model("deepseek"), tokens(2, 60)
    cache = D2OCache(config=model.config, d2o=PART)
    size, statistics = 8 * (12 + 4), 8 + 3 * 8

    def held_once():
        report = cache.report()
        assert report.full_bytes == 4 * size * sum(report.num_seen_tokens)
        assert report.held_bytes == size * sum(sum(layer.kv_len) for layer in report.layers)
        for layer, inner in zip(cache.layers, cache.compressed.layers, strict=True):
            assert torch.equal(layer.values, layer.keys[..., :12]) and layer.shape == (1, 16)
            store = inner.blocks[0].store
            assert store.num_allocated_bytes == 2 * store.capacity * (size + statistics)
            assert inner.slot_bytes == inner.token_bytes == size

    with torch.no_grad():
        model(ids, past_key_values=cache)
        held_once()
        for _ in range(9):
            model(ids[:, :1], past_key_values=cache)
        held_once()
        model(ids[:, :7], past_key_values=cache)
        held_once()
    assert cache.report().layers[0].num_merged > 0


@torch.no_grad()
@pytest.mark.parametrize("preset", ["mass", "paper"])
def test_layer_by_layer_in_tiles_is_whole(preset):
    model = use_float64_norms(tiny_model("deepseek"))
    config = spec(preset, keep_ratio=0.4, allocation="uniform", min_layer_tokens=8, eviction_interval=4)
    found = []
    for reading in ("whole", "layerwise"):
        session = Session(model, config, reading=reading)
        logits = [session.prefill(*left_padded([41, 30]), 12), session.prefill(*left_padded([9, 9], seed=1))]
        logits += [session.decode([token, token + 1]) for token in range(3, 9)]
        found.append((torch.stack(logits), [layer.positions for layer in session.cache.layers]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_a_forward_that_broke_off_leaves_other_forwards_alone(monkeypatch):
    """Latents that were announced, and never reached attention, are not taken for those of another forward."""
    model, ids = tiny_model("deepseek"), tokens(1, 9)
    cache, module = D2OCache(config=model.config, d2o=FULL), modules_of(model)[1]

    def broken(*_):
        raise MemoryError

    with torch.no_grad():
        monkeypatch.setattr(module, "expand_kv", broken)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        monkeypatch.undo()
        found = model(ids, use_cache=False).logits
        other = model(ids, past_key_values=D2OCache(config=model.config, d2o=FULL)).logits
        with pytest.raises(ValueError, match="the keys of layer 1 never reached d2o attention.*Make a new cache"):
            model(ids, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        expected = model(ids).logits
    for logits in (found, other):
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_what_is_refused(monkeypatch):
    model, ids = tiny_model("deepseek"), tokens(1, 6)
    cache = D2OCache(config=model.config, d2o=FULL)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="the model's masks are not made by transformers"):
        model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 brings 4 keys of 10, not one latent of 12 \(kv_lora_rank\)"):
        cache.update(torch.zeros(1, 4, 6, 10), torch.zeros(1, 4, 6, 10), 0)
    with pytest.raises(ValueError, match="a D2OCache does not carry gradients"):
        model(ids, past_key_values=D2OCache(config=model.config, d2o=FULL))
    with pytest.raises(ValueError, match=r"tp_engine \(deepspeed\) was never tried with latent attention"):
        mark_replicas(model.config, ParallelConfig(tp=2, tp_engine="deepspeed"))
    assert mark_replicas(model.config, ParallelConfig(tp=2, tp_engine="transformers")) == 2
    training = TrainConfig.from_dict({"model": "m", "data": {"train": "t.txt"}, "output": "o"})
    with pytest.raises(ValueError, match="deepseek_v3 has latent attention, which is not supported in training"):
        check_trainable(model.config, training)
    monkeypatch.delattr(type(modules_of(model)[0]), "expand_kv")
    with pytest.raises(ValueError, match=r"latent attention \(kv_lora_rank 12\) whose modules do not cache the latent"):
        D2OCache(config=model.config)
