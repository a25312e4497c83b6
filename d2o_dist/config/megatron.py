"""`MegatronArguments`: what a Megatron `GPTModel` is made of, as the YAML file beside its weights says it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.fields.checks import check_int, is_integer
from d2o_dist.fields.declare import choice, flag, integer, real
from d2o_dist.fields.io import build, load_yaml, refuse_unknown
from d2o_dist.fields.show import shown
from d2o_dist.policy.rule import check_fields

# The file that makes a folder one of a Megatron model.
ARGUMENTS = "megatron.yaml"
# Sizes of a mesh, which a run says, and what else Megatron's command line has that is not of the model.
_OF_THE_RUN = {"tensor_model_parallel_size": "parallel.tp", "context_parallel_size": "parallel.sp"}
_STAGES = "pipeline_model_parallel_size"
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length")


@dataclass(frozen=True)
class MegatronArguments:
    """Fields of `TransformerConfig` and `GPTModel` under their own names and with their own defaults.

    Attributes:
        vocab_size: ids that are tokens; the weights may have more rows.
        max_sequence_length: tokens that the model has positions for.
        window_size: (keys before a query that it sees, 0); window_attn_skip_freq: every so many layers one sees all
            keys, or per layer 1 (the window) or 0.
        moe_layer_freq: every so many layers one has experts, or per layer 1 or 0.
        eos_token_ids: ids that end a text, beside the tokenizer's. Ours: Megatron has no such field.
    """

    num_layers: int = integer(0, low=1)
    hidden_size: int = integer(0, low=1)
    num_attention_heads: int = integer(0, low=1)
    vocab_size: int = integer(0, low=1)
    max_sequence_length: int = integer(0, low=1)
    num_query_groups: int | None = integer(None, low=1, optional=True)
    kv_channels: int | None = integer(None, low=1, optional=True)
    ffn_hidden_size: int | None = integer(None, low=1, optional=True)
    normalization: str = choice("LayerNorm", "LayerNorm", "RMSNorm")
    layernorm_epsilon: float = real(1e-5, above=0)
    layernorm_zero_centered_gamma: bool = flag(False)
    qk_layernorm: bool = flag(False)
    activation_func: str = choice("gelu", "gelu", "silu", "relu", "squared_relu", "quick_gelu")
    gated_linear_unit: bool = flag(False)
    add_bias_linear: bool = flag(True)
    add_qkv_bias: bool = flag(False)
    softmax_scale: float | None = real(None, above=0, optional=True)
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | tuple[int, ...] | None = None
    position_embedding_type: str = choice("learned_absolute", "learned_absolute", "rope", "none")
    rotary_base: float = real(10000, above=0)
    rotary_percent: float = real(1.0, above=0, high=1)
    rotary_interleaved: bool = flag(False)
    rope_scaling: bool = flag(False)
    rope_scaling_factor: float = real(8.0, above=0)
    seq_len_interpolation_factor: float | None = real(None, above=0, optional=True)
    share_embeddings_and_output_weights: bool = flag(False)
    num_moe_experts: int | None = integer(None, low=1, optional=True)
    moe_ffn_hidden_size: int | None = integer(None, low=1, optional=True)
    moe_layer_freq: int | tuple[int, ...] = 1
    moe_shared_expert_intermediate_size: int | None = integer(None, low=1, optional=True)
    moe_router_topk: int = integer(2, low=1)
    moe_router_pre_softmax: bool = flag(False)
    moe_router_score_function: str = choice("softmax", "softmax", "sigmoid")
    moe_router_topk_scaling_factor: float | None = real(None, above=0, optional=True)
    moe_router_num_groups: int | None = integer(None, low=1, optional=True)
    moe_router_group_topk: int | None = integer(None, low=1, optional=True)
    moe_router_dtype: str | None = choice(None, None, "fp32", "fp64")
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("window_size", "window_attn_skip_freq", "moe_layer_freq", "eos_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check_fields(self, "")
        self._check_lists()
        heads, groups, experts = self.num_attention_heads, self.query_groups, self.num_moe_experts
        if heads % groups:
            raise ValueError(f"num_attention_heads ({heads}) must be divisible by num_query_groups ({groups})")
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({heads}), "
                             "unless there are kv_channels")  # fmt: skip
        if experts is not None and self.moe_router_topk > experts:
            raise ValueError(f"moe_router_topk ({self.moe_router_topk}) must be at most num_moe_experts ({experts})")

    def _check_lists(self) -> None:
        window, skip, often = self.window_size, self.window_attn_skip_freq, self.moe_layer_freq
        if window is not None and not (
            isinstance(window, tuple) and len(window) == 2 and all(map(is_integer, window)) and window[0] >= 0
            and window[1] == 0
        ):  # fmt: skip
            raise ValueError(f"window_size ({shown(window)}) must be null or two integers, the second of them 0")
        for name, value in (("window_attn_skip_freq", skip), ("moe_layer_freq", often)):
            if isinstance(value, tuple):
                if len(value) != self.num_layers or not all(is_integer(one) and one in (0, 1) for one in value):
                    raise ValueError(f"{name} ({shown(value)}) must be an integer, or 0 or 1 for each of the "
                                     f"num_layers ({self.num_layers})")  # fmt: skip
            elif value is not None:
                check_int(name, value, low=1)
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids ({shown(self.eos_token_ids)}) must be a list of integers")
        for one in self.eos_token_ids:
            check_int("eos_token_ids", one, low=0)

    @property
    def query_groups(self) -> int:
        """KV heads of a layer."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer None, or keys that a query of it sees, itself included."""
        if self.window_size is None:
            return (None,) * self.num_layers
        skip = self.window_attn_skip_freq
        if skip is None:
            has_window = [True] * self.num_layers
        elif isinstance(skip, tuple):
            has_window = [bool(one) for one in skip]
        else:
            has_window = [(layer + 1) % skip != 0 for layer in range(self.num_layers)]
        return tuple(self.window_size[0] + 1 if one else None for one in has_window)

    @classmethod
    def load(cls, folder: Path) -> MegatronArguments:
        """From the file in the folder of a model.

        Raises:
            ValueError: there is no such file; an unknown argument, with the nearest known one; a value outside its
                limits, a missing one, or one that a mesh says.
        """
        path = folder / ARGUMENTS
        if not path.is_file():
            raise ValueError(f"{folder} has no {ARGUMENTS}: the arguments of a Megatron model, by their names")
        values = load_yaml(path)
        try:
            for name, field in _OF_THE_RUN.items():
                if name in values:
                    raise ValueError(f"{name} ({shown(values[name])}) is no part of the model: say {field} of the run")
            if values.get(_STAGES, 1) != 1:
                raise ValueError(
                    f"{_STAGES} ({shown(values[_STAGES])}) must be 1: a request is spread over heads (parallel.tp) and "
                    f"tokens (parallel.sp), not over stages of the {shown(values.get('num_layers'))} layers. Weights "
                    "that were saved over stages are read on any mesh: leave it out"
                )
            values = {name: value for name, value in values.items() if name != _STAGES}
            refuse_unknown(values, [field.name for field in dataclasses.fields(cls)], "a Megatron model")
            for name in _REQUIRED:
                if name not in values:
                    raise ValueError(f"{name} is missing")
            return build(cls, values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their default, as plain Python values; `build` is its inverse."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if value != default
        }
