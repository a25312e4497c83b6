"""Models cut by either engine on meshes of several axes: the logits and tokens of one process, and really cut."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedModel

from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.hf import shard
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.shard import mark_replicas, shard_model
from d2o_dist.models.hf.tensor_parallel import kv_replicas, repeat_kv_heads
from tests.models import left_padded, tiny_model
from tests.oracle.naive_d2o import use_float64_norms
from tests.ranks import run_ranks

ENGINES = ("transformers", "deepspeed")
CPU = torch.device("cpu")


def config(heads=4, kv_heads=2, **fields) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=8 * heads, **fields)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "replicas"),
    [(4, 2, 1, 1), (4, 2, 2, 1), (4, 4, 2, 1), (8, 2, 4, 2), (8, 2, 8, 4), (4, 1, 4, 4), (9, 3, 3, 1), (12, 6, 3, 1)],
)
def test_how_often_a_kv_head_is_copied(heads, kv_heads, tp, replicas):
    model_config = config(heads, kv_heads)
    assert kv_replicas(model_config, tp) == replicas
    assert mark_replicas(model_config, ParallelConfig(tp=tp, tp_engine="transformers")) == replicas
    assert getattr(model_config, "d2o_kv_replicas", 1) == replicas
    assert shape_of(model_config).kv_heads_of_rank(tp) == max(1, kv_heads // tp)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "message"),
    [
        (4, 2, 3, r"num_attention_heads \(4\) must be divisible by tp \(3\)"),
        (9, 3, 2, r"num_attention_heads \(9\) must be divisible by tp \(2\)"),
        (12, 4, 6, r"num_key_value_heads \(4\) must be divisible by tp \(6\), or tp by num_key_value_heads"),
        (12, 3, 2, r"num_key_value_heads \(3\) must be divisible by tp \(2\), or tp by num_key_value_heads"),
        (4, 2, 8, r"num_attention_heads \(4\) must be divisible by tp \(8\)"),
    ],
)
def test_head_counts_that_do_not_divide(heads, kv_heads, tp, message):
    with pytest.raises(ValueError, match=message):
        mark_replicas(config(heads, kv_heads), ParallelConfig(tp=tp, tp_engine="transformers"))


def test_quantised_weights_are_refused():
    quantised = config(4, 2)
    quantised.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r"tp \(2\) cannot shard quantised weights \(quant_method fp8\): use sp"):
        mark_replicas(quantised, ParallelConfig(tp=2))
    assert mark_replicas(quantised, ParallelConfig(sp=2)) == 1


def test_packed_projections_are_refused():
    packed = Phi3Config(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, pad_token_id=0)
    with pytest.raises(ValueError, match="a model whose q_proj, k_proj, v_proj are separate .*phi3 has qkv_pr"):
        mark_replicas(packed, ParallelConfig(tp=2))
    assert mark_replicas(packed, ParallelConfig(sp=2)) == 1


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("d2o_dist.models.hf.deepspeed.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tp_engine \(deepspeed\) needs the package deepspeed: pip install deepspeed"):
        mark_replicas(config(), ParallelConfig(tp=2))
    assert mark_replicas(config(), ParallelConfig(tp=2, tp_engine="transformers")) == 1


def perturbed(model):
    """The model with biases and norms that are no constants, as they begin."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_copied_heads_compute_what_one_did(family):
    model = perturbed(tiny_model(family, num_attention_heads=8))
    ids, mask = left_padded([5, 19])
    want = model(ids, attention_mask=mask).logits
    repeat_kv_heads(model, 4)
    assert model.config.num_key_value_heads == 8
    out = model(ids, attention_mask=mask, use_cache=True)
    # Not bit by bit: products of another shape are added up in another order. The norms of qwen3's heads are float32.
    limit = 1e-5 if family == "qwen3" else 1e-12
    torch.testing.assert_close(out.logits[mask.bool()], want[mask.bool()], rtol=limit, atol=limit)
    keys = out.past_key_values.layers[0].keys.unflatten(1, (2, 4))
    assert keys.shape[1] == 2
    torch.testing.assert_close(keys, keys[:, :, :1].expand_as(keys), rtol=limit, atol=limit)


def make_model(family, dtype, fields) -> PreTrainedModel:
    model = perturbed(tiny_model(family, **fields)).to(dtype)
    if dtype == torch.float64 and family != "gemma3":
        use_float64_norms(model)  # norms in float32 would round differences of 1e-16 away, or make them 1e-8
    return model


@torch.no_grad()
def computed(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a ragged batch, where its rows have tokens, and the tokens that it goes on with."""
    ids, mask = left_padded([9, 17, 30])
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    return logits, model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)


@cache
def wanted(family, dtype, fields) -> tuple[torch.Tensor, torch.Tensor]:
    return computed(make_model(family, dtype, dict(fields)))


def sharded(rank, world, engine, cases):
    """For every case the largest difference of logits, equality of tokens, and what of the model this rank has."""
    found = []
    for family, (dp, sp, tp), dtype, fields, (logits, tokens) in cases:
        mesh = build_mesh(dp, sp, tp)
        model = make_model(family, dtype, fields)
        heads = model.config.num_key_value_heads
        whole = sum(parameter.numel() for parameter in model.parameters())
        model = shard_model(model, mesh, ParallelConfig(tp=tp, sp=sp, tp_engine=engine), CPU)
        my_logits, my_tokens = computed(model)
        with torch.no_grad():
            cached = model(tokens[:1, :5], use_cache=True).past_key_values
        mine = {id(p): getattr(p, "_local_tensor", p) for p in model.parameters()}.values()
        found.append(
            {
                "error": float((my_logits - logits).abs().max()),
                "tokens": torch.equal(my_tokens, tokens),
                "dtype": my_logits.dtype == dtype,
                "local_heads": cached.layers[0].keys.shape[1],
                "global_heads": model.config.num_key_value_heads == heads,
                "replicas": model.config.d2o_kv_replicas,
                "attention": model.config._attn_implementation,
                "smaller": sum(p.numel() for p in mine) < whole,
                "kept_memory": all(p.untyped_storage().nbytes() == p.nbytes for p in mine),
            }
        )
    return found


FAMILIES = ["llama", "llama_mha", "mistral", "mistral_sliding", "qwen2", "qwen3", "gemma3"]
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
WORLDS = {
    2: [(family, (1, 1, 2), torch.float64, {}, 2 if family == "llama_mha" else 1, 1) for family in FAMILIES]
    + [("llama", (1, 1, 2), torch.float32, {"tie_word_embeddings": True}, 1, 1)],
    3: [("llama", (1, 1, 3), torch.float64, NINE, 1, 1)],
    4: [(family, (1, 1, 4), torch.float64, {"num_attention_heads": 8}, 1, 2) for family in FAMILIES[2:]]
    + [
        ("llama", (1, 2, 2), torch.float64, {}, 1, 1),
        ("llama", (2, 1, 2), torch.float64, {"tie_word_embeddings": True}, 1, 1),
        ("qwen2", (2, 1, 2), torch.float64, {"num_key_value_heads": 1}, 1, 2),
        ("llama", (1, 1, 4), torch.float64, {"num_key_value_heads": 1}, 1, 4),
    ],
}  # fmt: skip


@pytest.mark.multirank
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_model_is_the_model(engine, world):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    cases = [(*case[:4], wanted(case[0], case[2], tuple(case[3].items()))) for case in WORLDS[world]]
    for rank, found in enumerate(run_ranks(world, sharded, engine, cases, fresh=True)):
        for (family, shape, dtype, fields, local_heads, replicas), have in zip(WORLDS[world], found, strict=True):
            where = (rank, family, shape, fields)
            exact = dtype == torch.float64 and family != "gemma3"
            error = have.pop("error")
            assert error < (1e-10 if exact else 1e-3), (where, error)
            assert have == {
                "tokens": True, "dtype": True, "local_heads": local_heads, "global_heads": True, "replicas": replicas,
                "attention": "d2o", "smaller": True, "kept_memory": True,
            }, where  # fmt: skip


def failing(rank, world):
    model = tiny_model(num_attention_heads=8)
    shard.shard_with_transformers = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        shard_model(model, build_mesh(tp=world), ParallelConfig(tp=world, tp_engine="transformers"), CPU)
    return model.config.num_key_value_heads


@pytest.mark.multirank
def test_the_configuration_counts_the_models_heads_whatever_happens():
    assert run_ranks(4, failing, fresh=True) == [2] * 4


def on_another_device(rank, world):
    mesh = build_mesh(tp=world)
    with pytest.raises(ValueError, match=r"drives cpu devices here, but device is cuda: set DS_ACCELERATOR=cuda"):
        shard_model(tiny_model(), mesh, ParallelConfig(tp=world), torch.device("cuda"))


@pytest.mark.multirank
def test_deepspeed_for_another_device():
    pytest.importorskip("deepspeed")
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed drives CUDA here")
    run_ranks(2, on_another_device, fresh=True)


def test_another_version_of_transformers_is_refused_before_weights_are_loaded(monkeypatch):
    """Since 5.17 the modules are there, but plans are resolved as they must be only by later versions."""
    config = tiny_model().config
    parallel = ParallelConfig(tp=2, tp_engine="transformers")
    assert mark_replicas(config, parallel) == 1
    owner = next(base for base in PreTrainedModel.__mro__ if "_resolve_parallel_plans" in vars(base))
    monkeypatch.delattr(owner, "_resolve_parallel_plans")
    with pytest.raises(ValueError, match=r"_resolve_parallel_plans.*use tp_engine deepspeed"):
        mark_replicas(config, parallel)
