"""The shape of a model: its layers, heads and weights, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_dist.config.infer import InferConfig
from d2o_dist.fields.io import load_yaml
from d2o_dist.models.hf.guards import layer_windows, text_config
from d2o_dist.models.hf.loading import load_config
from d2o_dist.models.hf.shape import num_kv_heads
from d2o_dist.models.hf.supported import check_supported

_TABLE = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class ModelSize:
    """One model.

    Attributes:
        config: of its decoder, as transformers has it.
        windows: per layer None (full attention) or its sliding window.
        hidden, mlp, vocab: widths of the hidden states, of the MLP and of the logits.
        num_heads, num_kv_heads, head_dim: of each layer.
        matrices: parameters of all layers' matrices and their biases, without those of keys and values.
        kv_matrices: those of keys and values.
        embeddings: of the embedding and the output head; once where they are one.
        others: norms, which every tensor rank holds.
        max_positions: tokens it has positions for; None: not known.
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
        return self.matrices + self.kv_matrices + self.embeddings + self.others


def known_models() -> dict[str, dict[str, Any]]:
    """Name -> fields of the models that are known without their files."""
    return load_yaml(_TABLE)


def known_config(name: str) -> Any:
    """The transformers configuration of a known model, in bfloat16."""
    fields = {key: value for key, value in known_models()[name].items() if key != "hub"}
    return AutoConfig.for_model(**fields, dtype=torch.bfloat16)


def config_of(config: InferConfig) -> Any:
    """The transformers configuration of the model of a run: a known one, or that of its files."""
    return known_config(config.model) if config.model in known_models() else load_config(config)


def size_of(config: Any) -> ModelSize:
    """The shape of the model that this configuration describes. Its weights are counted, and not made.

    Raises:
        ValueError: a model that a `D2OCache` cannot serve, or one with experts, of which a token uses some.
    """
    check_supported(config)
    config = text_config(config)
    windows = tuple(layer_windows(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = {"matrices": 0, "kv_matrices": 0, "embeddings": 0, "others": 0}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            raise ValueError(f"{config.model_type}: models with experts cannot be planned: a token uses some of them")
        if ".layers." not in name:
            kind = "embeddings" if parameter.dim() > 1 else "others"
        elif ".k_proj." in name or ".v_proj." in name:
            kind = "kv_matrices"
        else:
            kind = "others" if "norm" in name else "matrices"
        count[kind] += parameter.numel()
    return ModelSize(
        config=config,
        windows=windows,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_positions=getattr(config, "max_position_embeddings", None),
        **count,
    )
