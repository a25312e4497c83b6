"""From arguments to a `GPTModel` whose core attention can serve a cache, for the ranks that `parallel_state` has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import activations, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from d2o_dist.config.megatron import MegatronArguments
from d2o_dist.models.megatron.attention import with_cache
from d2o_dist.models.megatron.quiet import quiet

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
    "squared_relu": activations.squared_relu,
    "quick_gelu": activations.quick_gelu,
}
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# Arguments of `GPTModel`, and those that are not Megatron's under their name. The rest are of `TransformerConfig`.
_OF_GPT = ("vocab_size", "max_sequence_length", "position_embedding_type", "rotary_base", "rotary_percent",
           "rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor",
           "share_embeddings_and_output_weights")  # fmt: skip
_NOT_TAKEN = (*_OF_GPT, "eos_token_ids")


class Router(TopKRouter):
    """Megatron's, where the weights are: its own product moves them to a GPU, and needs Transformer Engine in 0.16."""

    def gating(self, input: Tensor) -> Tensor:
        """input [..., hidden] -> logits [..., experts], in the router's dtype."""
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(input.to(dtype), self.weight.to(dtype), bias)


def build_gpt(arguments: MegatronArguments, **fields: Any) -> GPTModel:
    """The part of this rank of a model, with weights at random, on the CPU; of the local layer spec, without fusions.

    Args:
        fields: of `TransformerConfig`, in place of those that follow from the arguments.

    Raises:
        ValueError: what Megatron says of arguments that do not go together.
    """
    values = {field: getattr(arguments, field) for field in arguments.__dataclass_fields__ if field not in _NOT_TAKEN}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    values |= {
        "num_query_groups": arguments.query_groups,
        "kv_channels": arguments.head_dim,
        "activation_func": _ACTIVATIONS[arguments.activation_func],
        "window_size": arguments.window_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "tensor_model_parallel_size": tp,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "use_cpu_initialization": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    try:
        config = TransformerConfig(**{**values, **fields})
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        # The norm at the end would be Apex's where that is installed, which has none of RMS.
        spec.layer_norm = spec.layer_specs[0].submodules.input_layernorm
        spec = with_cache(spec)
        for layer in spec.layer_specs:
            made_by = layer.submodules.mlp  # a spec, or since 0.18 a function
            parts = made_by.keywords if isinstance(made_by, partial) else vars(made_by)
            if hasattr(parts.get("submodules"), "router"):
                parts["submodules"].router = Router
        given = {name: getattr(arguments, name) for name in _OF_GPT}
        # Every rank has as many rows of the vocabulary.
        given["vocab_size"] = -(-arguments.vocab_size // tp) * tp
        with quiet():
            return GPTModel(config, spec, **given).to(config.params_dtype)
    except (AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"megatron-core refuses these arguments: {error}") from error
