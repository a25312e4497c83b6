"""The shape of a model: its layers, heads and weights, from its configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from d2o_dist.config.infer import InferConfig
from d2o_dist.fields.io import load_yaml
from d2o_dist.fields.show import told_by
from d2o_dist.models.hf.guards import state_counts, text_config
from d2o_dist.models.hf.loading import load_config
from d2o_dist.models.hf.per_layer import of_layers
from d2o_dist.models.hf.quantised import quant_method
from d2o_dist.models.hf.shape import HEADS, shape_of
from d2o_dist.models.hf.supported import check_supported
from d2o_dist.models.hf.tiles import tile_refusal
from d2o_dist.models.loading import check_kind, megatron_library
from d2o_dist.slots.windows import Window

_TABLE = Path(__file__).with_name("models.yaml")
# In the names of parameters of layers that no engine cuts: norms, what chooses the experts, what makes latents.
_WHOLE = ("norm", ".mlp.gate.", ".shared_expert_gate.", ".router.", ".q_a_proj.", ".kv_a_proj_with_mqa.")
# In the names of modules that read images or sounds.
_TOWER = re.compile("vision|visual|image|img|audio|speech|tower")
_KEYS = re.compile(r"(?<!linear)[._](attn|attention)\.[kv]_proj\.weight$")
# How configurations call them.
_EXPERTS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_k"),
}


@dataclass(frozen=True)
class ModelSize:
    """One model.

    Attributes:
        config: of its decoder, as transformers has it.
        windows: per layer None (full attention) or its window.
        hidden, mlp, vocab: widths of the hidden states, of the MLP that all tokens go through (0: there is none) and of
            the logits.
        num_heads, num_kv_heads, head_dim: of each layer; head_dim: of keys, and of values but with latent attention.
        latent: elements of a key that are its value too (latent attention); None: values are as keys, and apart.
        matrices: parameters of all layers' matrices and their biases, without those of keys and values.
        kv_matrices: those of keys and values; whole_matrices: those that no engine cuts, beside attention.
        embeddings: of the embedding and the output head; once where they are one.
        others: what every tensor rank holds: norms, routers, parts that read images.
        max_positions: tokens it has positions for; None: not known.
        looks: of each layer that attends in prompts to keys of another, which one that is.
        experts: parameters of all experts of all layers; num_experts: of a layer that has some; experts_per_token: how
            many of them a token goes through; expert_mlp: width of each. 0: there are none.
        states, exact_states: numbers that layers of linear attention, Mamba or convolution keep of a row, whatever its
            length: in the dtype of the weights, and in float32.
        tile_refusal: why a prompt cannot go through its layers in tiles; None: it can.
    """

    config: Any
    windows: tuple[Window | None, ...]
    hidden: int
    mlp: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    matrices: int
    kv_matrices: int
    embeddings: int
    others: int
    max_positions: int | None
    latent: int | None = None
    looks: tuple[int, ...] = ()
    experts: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0
    states: int = 0
    exact_states: int = 0
    whole_matrices: int = 0
    tile_refusal: str | None = None

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return self.head_dim if self.latent is None else self.latent

    @property
    def pair(self) -> int:
        """Elements of a key and its value, as a slot holds them and as they travel."""
        return self.head_dim + (self.head_dim if self.latent is None else 0)

    @property
    def num_layers(self) -> int:
        """All of them."""
        return len(self.windows)

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to everything, and are compressed."""
        return sum(window is None for window in self.windows)

    @property
    def num_parameters(self) -> int:
        """All of them."""
        matrices = self.matrices + self.kv_matrices + self.whole_matrices
        return matrices + self.embeddings + self.others + self.experts

    def experts_of(self, tokens: int) -> float:
        """Parameters of the experts that so many tokens go through, if they choose evenly and each for itself."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.num_experts) ** tokens)


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Name -> fields of the models that are known without their files."""
    return load_yaml(_TABLE)


def known_config(name: str) -> Any:
    """The transformers configuration of a known model, in bfloat16."""
    fields = {key: value for key, value in known_models()[name].items() if key != "hub"}
    return AutoConfig.for_model(**fields, dtype=torch.bfloat16)


def config_of(config: InferConfig) -> Any:
    """The transformers configuration of the model of a run: a known one, or that of its files.

    Raises:
        ValueError: there is no such model, or it is of another library.
    """
    check_kind(config)
    if config.model_kind == "megatron":
        return megatron_library().config_of_model(config)
    return known_config(config.model) if config.model in known_models() else load_config(config)


def size_of(config: Any) -> ModelSize:
    """The shape of the model that this configuration describes. Its weights are counted, and not made.

    Raises:
        ValueError: a model that a `D2OCache` cannot serve, or that transformers cannot make; quantised weights; heads
            that differ between layers, or between keys and values; a width, or experts, that it does not say.
    """
    check_supported(config)
    method, whole, config = quant_method(config), config, text_config(config)
    if method is not None:
        raise ValueError(f"quantised weights (quant_method {method}) are not planned: plan the model that they were "
                         "made from, which needs more")  # fmt: skip
    for name in HEADS:
        if len(values := of_layers(config, name)) > 1:
            raise ValueError(f"{config.model_type}: layers that differ in {name} are not planned ({values})")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole)
    except Exception as error:  # whatever a model raises that is made of fields that do not fit
        raise ValueError(f"{config.model_type}: transformers makes no such model: {told_by(error)}") from error
    shape, layers = shape_of(config), _layers_of(model, config)
    _check_heads(config, layers, shape.num_kv_heads * shape.head_dim)
    count = dict.fromkeys(("matrices", "kv_matrices", "whole_matrices", "embeddings", "others", "experts"), 0)
    cut = None if not any(state_counts(config)) else set(config.base_model_tp_plan or ())
    for name, parameter in layers.items():
        count[_kind(name, parameter, cut)] += parameter.numel()
    tables = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    count["embeddings"] = sum(one.numel() for one in {table.weight for table in tables})
    count["others"] += sum(parameter.numel() for parameter in model.parameters()) - sum(count.values())
    states, exact = _states_of(model, whole) if any(state_counts(config)) else (0, 0)
    return ModelSize(
        config=config,
        windows=shape.windows,
        looks=() if shape.cuts_prompts else shape.looks,
        hidden=config.hidden_size,
        mlp=_dense_width(config, layers),
        vocab=config.vocab_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        latent=shape.latent,
        max_positions=shape.max_positions,
        states=states,
        exact_states=exact,
        tile_refusal=tile_refusal(model),
        **count,
        **_experts_of(config, layers),
    )


def _check_heads(config: Any, parameters: dict[str, Tensor], wide: int) -> None:
    """Whether the keys and values of all layers are `wide` numbers a token."""
    for name, parameter in parameters.items():
        if _KEYS.search(name) and parameter.shape[0] != wide:
            raise ValueError(f"{config.model_type}: {name} gives {parameter.shape[0]} numbers a token, not "
                             f"num_key_value_heads x head_dim ({wide}): heads that differ are not planned")  # fmt: skip


def _layers_of(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Name, from the number of its layer on, -> parameter of the decoder's layers."""
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
        if is_list and not _TOWER.search(name):
            return dict(module.named_parameters())
    raise ValueError(f"{config.model_type}: no list of num_hidden_layers ({config.num_hidden_layers}) layers was found")


def _kind(name: str, parameter: Tensor, cut: set[str] | None) -> str:
    """The field of `ModelSize` that counts a parameter of a layer.

    Args:
        cut: of models that only transformers' plan cuts, the modules that it names; None: all matrices of layers are.
    """
    if ".experts." in name:
        return "experts"
    if any(part in name for part in _WHOLE):
        return "others"
    module = name.split(".", 1)[1].rpartition(".")[0]
    if cut is not None and f"layers.*.{module}" not in cut:
        return "whole_matrices"
    return "kv_matrices" if ".k_proj." in name or ".v_proj." in name else "matrices"


def _experts_of(config: Any, parameters: dict[str, Tensor]) -> dict[str, int]:
    """The fields of `ModelSize` that are of one expert and of their number; none without experts."""
    experts = {name: parameter for name, parameter in parameters.items() if ".experts." in name}
    if not experts:
        return {}
    found = {name: next((getattr(config, one) for one in names if getattr(config, one, None)), None)
             for name, names in _EXPERTS.items()}  # fmt: skip
    if None in found.values():
        raise ValueError(
            f"{config.model_type}: a model with experts must say num_experts and num_experts_per_tok "
            f"({list(found.values())})"
        )
    return {**found, "expert_mlp": getattr(config, "moe_intermediate_size", None) or _width(config)}


def _dense_width(config: Any, parameters: dict[str, Tensor]) -> int:
    """Of the MLP that all tokens go through, the widest of its layers, or beside their experts; 0: there is none."""
    dense = {name: one for name, one in parameters.items() if ".experts." not in name}
    inner = [one.shape[-1] for name, one in dense.items() if "down_proj.weight" in name]
    return max(inner, default=0) if inner or len(dense) < len(parameters) else _width(config)


def _width(config: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    if hasattr(config, "n_inner"):  # GPT-2's
        return 4 * config.hidden_size
    raise ValueError(f"{config.model_type}: its configuration does not say intermediate_size")


@torch.no_grad()
def _states_of(model: Any, config: Any) -> tuple[int, int]:
    """Of a row: numbers of the states in the dtype of the weights, and of those that are float32 whatever that is.

    A forward of a model without weights tells: transformers' own cache gets states of the shape that they have.
    """
    past = DynamicCache(config=config)
    for name, module in model.named_modules():
        if name.endswith(".experts"):  # which tokens each of them gets, only numbers tell
            module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    model.eval().to(torch.bfloat16)(torch.zeros(1, 4, dtype=torch.long, device="meta"), past_key_values=past)
    held = [state for layer in past.layers for name in ("conv_states", "recurrent_states")
            for state in (getattr(layer, name, None) or {}).values() if state is not None]  # fmt: skip
    counts = {kind: sum(state.numel() for state in held if (state.dtype == torch.float32) == kind) for kind in (0, 1)}
    return counts[0], counts[1]
