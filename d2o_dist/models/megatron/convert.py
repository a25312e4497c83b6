"""Weights of Hugging Face's Llama, Mistral, Qwen2 and Qwen3 in a Megatron `GPTModel`, and back.

For tests and small use: every rank holds the whole checkpoint while it is converted.

Shape legend: G KV heads, r query heads of each, D head dim, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.models.megatron.build import build_gpt
from d2o_dist.models.megatron.families import arguments_of

# Megatron's name, where it is cut over tensor ranks, and Hugging Face's names.
_OUTER = (
    ("embedding.word_embeddings.weight", "vocabulary", ("model.embed_tokens.weight",)),
    ("decoder.final_layernorm.weight", "whole", ("model.norm.weight",)),
    ("output_layer.weight", "vocabulary", ("lm_head.weight",)),
)
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_LAYER = (
    ("input_layernorm.weight", "whole", ("input_layernorm.weight",)),
    ("self_attention.linear_qkv.weight", "qkv", tuple(f"{name}.weight" for name in _QKV)),
    ("self_attention.linear_qkv.bias", "qkv", tuple(f"{name}.bias" for name in _QKV)),
    ("self_attention.q_layernorm.weight", "whole", ("self_attn.q_norm.weight",)),
    ("self_attention.k_layernorm.weight", "whole", ("self_attn.k_norm.weight",)),
    ("self_attention.linear_proj.weight", "columns", ("self_attn.o_proj.weight",)),
    ("pre_mlp_layernorm.weight", "whole", ("post_attention_layernorm.weight",)),
    ("mlp.linear_fc1.weight", "gate", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("mlp.linear_fc2.weight", "columns", ("mlp.down_proj.weight",)),
)
# The dimension along which ranks have parts, of a whole tensor as `_join` makes it.
_CUT = {"vocabulary": 0, "qkv": 0, "columns": 1, "gate": 1}


def make_gpt(config: Any, **fields: Any) -> GPTModel:
    """A `GPTModel` of the shape of a Hugging Face configuration; see `build_gpt`.

    Raises:
        ValueError: see `arguments_of`.
    """
    return build_gpt(arguments_of(config), **fields)


def load_hf(model: GPTModel, weights: Mapping[str, Tensor]) -> None:
    """Give this rank's model its part of a whole Hugging Face state dict.

    Raises:
        ValueError: weights that are missing, or that the model has no place for.
    """
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    )  # fmt: skip
    own, used = dict(model.named_parameters()), set()
    for name, kind, names in _names(model):
        if missing := [one for one in names if one not in weights]:
            raise ValueError(f"weights of {name} are missing: {', '.join(missing)}")
        used |= set(names)
        whole = _join(kind, [weights[one] for one in names], model)
        part = whole if kind == "whole" else whole.chunk(tp, _CUT[kind])[rank]
        own[name].data.copy_(part.flatten(0, 1) if kind == "gate" else part)
    if left := set(weights) - used - ({"lm_head.weight"} if model.share_embeddings_and_output_weights else set()):
        raise ValueError(f"the model has no place for {', '.join(sorted(left)[:3])}, {len(left)} weights in all")


def to_hf(model: GPTModel, mesh: ParallelMesh, vocab_size: int) -> dict[str, Tensor]:
    """The whole Hugging Face state dict, on every rank. All tensor ranks call it together.

    Args:
        vocab_size: ids that are tokens.
    """
    tp, own, found = Collectives(mesh.axis("tp")), dict(model.named_parameters()), {}
    for name, kind, names in _names(model):
        part = own[name].detach()
        if kind != "whole":
            part = part.unflatten(0, (2, -1)) if kind == "gate" else part
            part = tp.all_gather(part.contiguous(), _CUT[kind])
        found |= zip(names, _split(kind, part, model, vocab_size), strict=True)
    return found


def _names(model: GPTModel) -> list[tuple[str, str, tuple[str, ...]]]:
    """(Megatron's name, kind, Hugging Face's names) of every parameter."""
    own, found = set(dict(model.named_parameters())), list(_OUTER)
    for layer in range(model.config.num_layers):
        for name, kind, names in _LAYER:
            found.append(
                (f"decoder.layers.{layer}.{name}", kind, tuple(f"model.layers.{layer}.{one}" for one in names))
            )
    if unknown := own - {name for name, _, _ in found}:
        raise ValueError(f"{', '.join(sorted(unknown)[:3])} are not converted: only dense layers of the local spec are")
    return [each for each in found if each[0] in own]


def _join(kind: str, tensors: list[Tensor], model: GPTModel) -> Tensor:
    """The whole tensor as Megatron has it; `gate` [2, F, ...]."""
    if kind == "qkv":  # by KV head: its query heads, its key, its value
        groups, dim = model.config.num_query_groups, model.config.kv_channels
        return torch.cat([tensor.unflatten(0, (groups, -1, dim)) for tensor in tensors], 1).flatten(0, 2)
    if kind == "gate":
        return torch.stack(tensors)
    (tensor,) = tensors
    if kind == "vocabulary":
        tensor = torch.cat([tensor, tensor.new_zeros(model.vocab_size - len(tensor), tensor.shape[1])])
    return tensor


def _split(kind: str, whole: Tensor, model: GPTModel, vocab_size: int) -> list[Tensor]:
    """The inverse of `_join`."""
    if kind == "qkv":
        config = model.config
        groups, dim = config.num_query_groups, config.kv_channels
        by_head = whole.unflatten(0, (groups, -1, dim))
        return [part.flatten(0, 2) for part in by_head.split([config.num_attention_heads // groups, 1, 1], 1)]
    if kind == "gate":
        return list(whole.unbind())
    return [whole[:vocab_size] if kind == "vocabulary" else whole]
