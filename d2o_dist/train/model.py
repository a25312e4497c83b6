"""The model of a training run: loaded, given LoRA if wanted, and wrapped with its losses."""

from __future__ import annotations

from typing import Any

import torch

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.config.train_parts import LoraOptions
from d2o_dist.fields.show import shown, told_by
from d2o_dist.models.hf.guards import text_config
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.supported import unsupported
from d2o_dist.models.loading import load_model
from d2o_dist.models.shape import BORDER, check_side
from d2o_dist.slots.windows import Chunked
from d2o_dist.train.attention import TRAINING_ATTENTION, register
from d2o_dist.train.objective import Objective
from d2o_dist.train.ulysses import GradientExchange, check_heads

# What is applied to logits after the output layer: a tiled loss goes from hidden states to logits by that layer alone.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_trainable(model_config: Any, config: TrainConfig) -> None:
    """Refuse a model that this trainer would train wrongly, from its configuration alone.

    Raises:
        ValueError: names what is not supported, or which sizes do not fit.
    """
    text = text_config(model_config)
    if cause := unsupported(model_config):
        raise ValueError(f"{cause}, which is not supported in training")
    shape = shape_of(model_config)
    if shape.has_states:
        raise ValueError(
            f"{text.model_type} has layers that keep a state (linear attention, Mamba, convolutions), which is not "
            "supported in training"
        )
    if shape.latent is not None:
        raise ValueError(f"{text.model_type} has latent attention, which is not supported in training")
    if any(isinstance(window, Chunked) for window in shape.windows):
        raise ValueError(f"{text.model_type} has chunked attention, which is not supported in training")
    if shape.looks:
        raise ValueError(f"{text.model_type} has layers that share keys and values, which is not supported in training")
    for name in _AFTER_HEAD:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{text.model_type}: {name} ({getattr(text, name)}) is not supported in training")
    if getattr(text, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout ({text.attention_dropout}) is not supported in training: set it to 0")
    if shape.max_positions is not None and config.sequence_length > shape.max_positions:
        raise ValueError(
            f"sequence_length ({config.sequence_length}) must be at most the model's max_position_embeddings "
            f"({shape.max_positions})"
        )
    border = shape.border
    if config.objective != "lm":
        # The context and what follows it are read one after the other.
        check_side(border, config.context_length, config.sequence_length)
    if border is not None and config.sp > 1 and config.sequence_length > border:
        raise ValueError(
            f"sp ({config.sp}) cannot train on rows of {config.sequence_length} tokens, beyond {BORDER} ({border}): a "
            "rank with early tokens alone would turn them as in a shorter text"
        )
    check_heads(shape.num_heads, shape.num_kv_heads, config.sp, compressed=config.objective != "lm")
    if config.objective != "lm":
        config.d2o.budget.protected(len(shape.windows))


def load_trainable(config: TrainConfig, device: torch.device) -> Any:
    """The model in training mode with float32 weights, attending through `d2o_train`.

    Raises:
        ValueError: the weights are missing or do not fit the configuration.
    """
    register()
    model = load_model(
        InferConfig(
            # Without a number, which is the local rank's to give.
            model=config.model, tokenizer=config.tokenizer, dtype="float32", device=device.type,
            trust_remote_code=config.trust_remote_code, trust_pickled_weights=config.trust_pickled_weights,
            revision=config.revision,
        )
    ).model  # fmt: skip
    model.set_attn_implementation(TRAINING_ATTENTION)
    model.config.use_cache = False
    model.requires_grad_(True)
    if config.lora is not None:
        model = add_lora(model, config.lora)
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model.train()


def enable_activation_checkpointing(model: Any) -> None:
    """Keep the input of every layer, and compute the rest again in the backward pass.

    Of transformers' two kinds it must be the non-reentrant one: what a pass remembers of a layer has gradients.
    Its check of what was computed again is off, because it would compare weights that ZeRO-3 has let go of by then.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "determinism_check": "none"})


def add_lora(model: Any, options: LoraOptions) -> Any:
    """The model wrapped by peft, with nothing but the low-rank additions to train.

    Raises:
        ValueError: `peft` is not installed, or the model has no layer of those names.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora needs the package peft: pip install peft, or set lora to null") from error
    lora = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(f"lora.targets ({shown(list(options.targets))}): {told_by(error)}") from error


def make_objective(model: Any, config: TrainConfig, mesh: ParallelMesh) -> Objective:
    """The model with the losses of a run."""
    return Objective(model, GradientExchange(Collectives(mesh.axis("sp"))), config.distill, config.loss_tile)
