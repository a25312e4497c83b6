"""`attn_implementation="d2o_train"`: attention that asks the pass its forward was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from d2o_dist.models.hf.attention import check_causal
from d2o_dist.models.hf.guards import check_arguments
from d2o_dist.models.hf.masks import names_of, read_pattern
from d2o_dist.slots.windows import Chunked
from d2o_dist.train.passes import Pass

TRAINING_ATTENTION = "d2o_train"
# The keyword of a model's forward that carries the pass.
PASS_KEYWORD = "d2o_pass"


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query [B, Hq, n, D] -> (output [B, n, Hq, D], None).

    Raises:
        ValueError: no pass, a mask, attention dropout, or attention that is not a plain causal softmax.
    """
    check_arguments(kwargs, (PASS_KEYWORD, "is_causal"), "training")
    check_causal(module, kwargs, "training attends causally")
    step: Pass | None = kwargs.get(PASS_KEYWORD)
    if step is None:
        raise ValueError(f'attention "{TRAINING_ATTENTION}" needs {PASS_KEYWORD}=... in every call of the model')
    if attention_mask is not None:
        raise ValueError("training rows are packed, not padded: attention_mask must be None")
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not supported in training: set attention_dropout to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = step.attend(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window"))
    return out.transpose(1, 2), None


def no_mask(
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask function that transformers calls: passes need none, so one that is given is handed on and refused.

    Raises:
        ValueError: the model's mask is more than causality, a window and packed documents.
    """
    pattern = read_pattern(mask_function)
    if pattern is None or isinstance(pattern.window, Chunked):
        names = ", ".join(names_of(mask_function))
        raise ValueError(f"training attends causally, but the model's mask is made by {names}")
    return attention_mask


def register() -> None:
    """Make `attn_implementation="d2o_train"` known to transformers. Registering twice does no harm."""
    AttentionInterface.register(TRAINING_ATTENTION, training_attention)
    AttentionMaskInterface.register(TRAINING_ATTENTION, no_mask)
