"""The shape of a model: its layers, heads and weights, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_dist.config.infer import InferConfig
from d2o_dist.fields.io import load_yaml
from d2o_dist.fields.show import told_by
from d2o_dist.models.hf.guards import layer_windows, text_config
from d2o_dist.models.hf.loading import load_config
from d2o_dist.models.hf.shape import num_kv_heads
from d2o_dist.models.hf.supported import check_supported
from d2o_dist.models.loading import megatron_library

_TABLE = Path(__file__).with_name("models.yaml")
# In the names of parameters of layers that no engine cuts: norms, and what chooses the experts.
_WHOLE = ("norm", ".mlp.gate.", ".shared_expert_gate.")


@dataclass(frozen=True)
class ModelSize:
    """One model.

    Attributes:
        config: of its decoder, as transformers has it.
        windows: per layer None (full attention) or its sliding window.
        hidden, mlp, vocab: widths of the hidden states, of the MLP that all tokens go through (0: there is none) and of
            the logits.
        num_heads, num_kv_heads, head_dim: of each layer.
        matrices: parameters of all layers' matrices and their biases, without those of keys and values.
        kv_matrices: those of keys and values.
        embeddings: of the embedding and the output head; once where they are one.
        others: norms and routers, which every tensor rank holds.
        max_positions: tokens it has positions for; None: not known.
        experts: parameters of all experts of all layers; num_experts: of a layer that has some; experts_per_token: how
            many of them a token goes through; expert_mlp: width of each. 0: there are none.
    """

    config: Any
    windows: tuple[int | None, ...]
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
    experts: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0

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
        return self.matrices + self.kv_matrices + self.embeddings + self.others + self.experts

    def experts_of(self, tokens: int) -> float:
        """Parameters of the experts that so many tokens go through, if they choose evenly and each for itself."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.num_experts) ** tokens)


def known_models() -> dict[str, dict[str, Any]]:
    """Name -> fields of the models that are known without their files."""
    return load_yaml(_TABLE)


def known_config(name: str) -> Any:
    """The transformers configuration of a known model, in bfloat16."""
    fields = {key: value for key, value in known_models()[name].items() if key != "hub"}
    return AutoConfig.for_model(**fields, dtype=torch.bfloat16)


def config_of(config: InferConfig) -> Any:
    """The transformers configuration of the model of a run: a known one, or that of its files."""
    if config.model_kind == "megatron":
        return megatron_library().config_of_model(config)
    return known_config(config.model) if config.model in known_models() else load_config(config)


def size_of(config: Any) -> ModelSize:
    """The shape of the model that this configuration describes. Its weights are counted, and not made.

    Raises:
        ValueError: a model that a `D2OCache` cannot serve or transformers cannot make, or one whose configuration does
            not say how many experts a token goes through.
    """
    check_supported(config)
    config = text_config(config)
    windows = tuple(layer_windows(config))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a number in it leads to
        raise ValueError(f"no model can be made as its config.json says: {told_by(error)}") from error
    parameters = dict(model.named_parameters())
    count = {"matrices": 0, "kv_matrices": 0, "embeddings": 0, "others": 0, "experts": 0}
    for name, parameter in parameters.items():
        if ".layers." not in name:
            kind = "embeddings" if parameter.dim() > 1 else "others"
        elif ".experts." in name:
            kind = "experts"
        elif ".k_proj." in name or ".v_proj." in name:
            kind = "kv_matrices"
        else:
            kind = "others" if any(part in name for part in _WHOLE) else "matrices"
        count[kind] += parameter.numel()
    experts = {}
    if count["experts"]:
        fields = {
            "num_experts": getattr(config, "num_experts", None),
            "experts_per_token": getattr(config, "num_experts_per_tok", None),
        }
        if None in fields.values():
            raise ValueError(
                f"{config.model_type}: a model with experts must say num_experts and num_experts_per_tok "
                f"({list(fields.values())})"
            )
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        experts = {**fields, "expert_mlp": width}
    return ModelSize(
        config=config,
        windows=windows,
        hidden=config.hidden_size,
        mlp=_dense_width(config, list(parameters)) if experts else config.intermediate_size,
        vocab=config.vocab_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_positions=getattr(config, "max_position_embeddings", None),
        **count,
        **experts,
    )


def _dense_width(config: Any, names: list[str]) -> int:
    """Of the MLP in layers without experts, or beside them, where a model with experts has one."""
    if any(".mlp.down_proj." in name for name in names):
        return config.intermediate_size
    has_shared = any(".shared_expert" in name for name in names)
    return getattr(config, "shared_expert_intermediate_size", 0) if has_shared else 0
