"""Megatron models with a cache that evicts nothing, without one, and those that are refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from d2o_dist.engine.session import Session
from tests.models import left_padded, tiny_model, tokens
from tests.ranks import run_ranks
from tests.spec import spec

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.multirank
TIMEOUT_S = 300  # importing megatron-core takes its time
YARN = {
    "yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 64, "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": True,
}  # fmt: skip
# Of the model: position embedding, its other arguments; of its configuration: fields.
KINDS = {
    "rope": ("rope", {"rotary_base": 500000}, {}),
    "half of a head": ("rope", {"rotary_percent": 0.5}, {}),
    "interleaved": ("rope", {"seq_len_interpolation_factor": 2.0}, {"rotary_interleaved": True}),
    "llama 3": ("rope", {"rope_scaling": True}, {}),
    "yarn": ("yarn", {}, YARN),
    "learned": ("learned_absolute", {}, {"normalization": "LayerNorm", "add_bias_linear": True}),
    "experts": ("rope", {}, {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "allgather",
                             "moe_router_load_balancing_type": "none"}),
    "windows": ("rope", {}, {"window_size": (9, 0), "window_attn_skip_freq": 2}),
}  # fmt: skip


def make(kind="rope", *, cached=True, **fields):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from d2o_dist.models.megatron import with_cache

    position, arguments, own = KINDS[kind]
    config = TransformerConfig(**{
        "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
        "normalization": "RMSNorm", "qk_layernorm": True, "add_bias_linear": False, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "params_dtype": torch.float64, "init_method_std": 0.2, "use_cpu_initialization": True,
        "bias_dropout_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False,
        "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
        **({} if position == "yarn" else own), **fields,
    })  # fmt: skip
    if position == "yarn":
        vars(config).update(own)
    plain = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=True, normalization=config.normalization
    )
    torch.manual_seed(0)
    model = GPTModel(
        config, with_cache(plain) if cached else plain, vocab_size=89, max_sequence_length=256,
        position_embedding_type=position, **arguments,
    )  # fmt: skip
    return model.double()


def whole_text(model, ids):
    """Logits [B, T, V] of a forward of Megatron's own, without a cache."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    # Megatron makes masks of windows on a GPU, and draws what it drops from generators of one.
    ones, tracker = torch.ones, SimpleNamespace(fork=nullcontext)
    on_cpu = patch.object(torch, "ones", lambda *shape, device=None, **fields: ones(*shape, **fields))
    with on_cpu, patch("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: tracker):
        return model(ids, torch.arange(length).expand(len(ids), -1), mask)


def over_a_full_cache(rank, world, kind):
    """Prompt in chunks, then token by token; rows of different lengths; beside the whole text without a cache."""
    from tests.megatron.gpt import megatron_ranks

    with megatron_ranks(), torch.no_grad():
        model = make(kind).eval()
        ids, mask = left_padded([40, 31])
        session = Session(model, spec("full"))
        logits, rows = [session.prefill(ids, mask, chunk=17)], [ids[0], ids[1, 9:]]
        for step in range(6):
            new = tokens(2, 1, seed=step)
            rows = [torch.cat([row, one]) for row, one in zip(rows, new, strict=True)]
            logits.append(session.decode(new[:, 0]))
        for place, row in enumerate(rows):
            wanted = whole_text(model, row[None])[0, -7:]
            torch.testing.assert_close(torch.stack(logits)[:, place], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_evicts_nothing_changes_nothing(kind):
    run_ranks(1, over_a_full_cache, kind, timeout_s=TIMEOUT_S)


def trained(rank, world):
    """Three steps of a loop, with Megatron's own layers and with ours."""
    from tests.megatron.gpt import megatron_ranks

    losses = []
    with megatron_ranks():
        for cached in (False, True):
            model = make(cached=cached).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for step in range(3):
                ids = tokens(2, 20, seed=step)
                logits = whole_text(model, ids)
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return losses


def test_a_training_loop_runs_unchanged():
    (losses,) = run_ranks(1, trained, timeout_s=TIMEOUT_S)
    assert losses[:3] == losses[3:] and losses[2] < losses[0]


def converted(rank, world, family):
    """What comes back of the weights, by name, and whether each is what it was."""
    from d2o_dist.models.megatron.convert import to_hf
    from tests.megatron.gpt import gpt_of, megatron_ranks

    with megatron_ranks(tp=world) as mesh:
        model = tiny_model(family)
        back = to_hf(gpt_of(model), mesh, model.config.vocab_size)
        return {name: torch.equal(back.pop(name), value) for name, value in model.state_dict().items()}, list(back)


@pytest.mark.parametrize(("family", "world"), [("llama_mha", 1), ("qwen2", 2), ("qwen3", 2)])
def test_weights_come_back_as_they_were(family, world):
    for found, left in run_ranks(world, converted, family, timeout_s=TIMEOUT_S):
        assert all(found.values()) and left == []


def refused(rank, world):
    """What is said of models that cannot be served."""
    from megatron.core import parallel_state
    from megatron.core.transformer.spec_utils import ModuleSpec

    from d2o_dist.models.megatron import MegatronModel, with_cache
    from d2o_dist.models.megatron.convert import load_hf, make_gpt
    from tests.megatron.gpt import gpt_of, megatron_ranks

    said = []

    def attempt(call):
        with pytest.raises(ValueError) as caught:
            call()
        said.append(str(caught.value))

    with megatron_ranks():
        attempt(lambda: MegatronModel(make(cached=False)))
        model = make()
        with patch.object(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 4):
            attempt(lambda: MegatronModel(model))
        with patch.object(model.config, "sequence_parallel", True):
            attempt(lambda: MegatronModel(model))
        with patch.object(model, "position_embedding_type", "mrope"):
            attempt(lambda: MegatronModel(model))
        with patch.object(parallel_state, "get_context_parallel_world_size", lambda: 2):
            attempt(lambda: Session(model, spec("full")))
        latent = SimpleNamespace(submodules=SimpleNamespace(core_attention=torch.nn.Identity))
        attempt(lambda: with_cache(ModuleSpec(object, submodules=SimpleNamespace(self_attention=latent))))
        attempt(lambda: make_gpt(Gemma3TextConfig()))
        linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        attempt(lambda: make_gpt(LlamaConfig(rope_parameters=linear)))
        attempt(lambda: make_gpt(LlamaConfig(attention_bias=True)))
        llama = tiny_model()
        weights = llama.state_dict()
        attempt(lambda: load_hf(gpt_of(llama), {**weights, "model.own": weights["lm_head.weight"]}))
        del weights["model.norm.weight"]
        attempt(lambda: load_hf(make_gpt(llama.config), weights))
    return said


def test_what_cannot_be_served_is_refused():
    (said,) = run_ranks(1, refused, timeout_s=TIMEOUT_S)
    wanted = [
        "layer 0 has DotProductAttention: make the model from with_cache(spec)",
        "pipeline_model_parallel_size (4) must be 1",
        "sequence_parallel (True) must be False",
        "position_embedding_type (mrope) must be one of",
        "tp (1) and sp (1) of the mesh must be tensor_model_parallel_size (1) and context_parallel_size (2)",
        "core attention is <class 'torch.nn.modules.linear.Identity'>",
        "model_type (gemma3_text) must be one of llama, mistral, qwen2, qwen3",
        "must be of rope_type default, or llama3",
        "attention_bias (True) is not converted",
        "the model has no place for model.own, 1 weights",
        "weights of decoder.final_layernorm.weight are missing: model.norm.weight",
    ]
    for message, begin in zip(said, wanted, strict=True):
        assert begin in message
