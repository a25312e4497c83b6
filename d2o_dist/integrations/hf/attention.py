"""`attn_implementation="d2o"`: attention through a `D2OCache` when there is one, plain attention otherwise.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from d2o_dist.core.autocast import without_autocast
from d2o_dist.integrations.hf.guards import ATTENTION_NAME, check_plain_softmax
from d2o_dist.integrations.hf.packed import by_document, document_lengths

# `D2OCache.update` hands the keys on with this attribute, through which the attention function finds its cache.
CACHE_TAG = "d2o_cache"


def d2o_attention(
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

    Without a cache, position ids that restart in an unpadded row begin another document, which attends to itself only.

    Raises:
        ValueError: a 4D mask, soft-capped logits, learned sinks; training with a compressed cache.
    """
    check_plain_softmax(kwargs)
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"d2o attention takes a 2D padding mask [B, T], not one of shape {shape}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache = getattr(key, CACHE_TAG, None)
    if torch.is_autocast_enabled(query.device.type):
        # Positions are added in float32 there, so that queries and keys are no longer what values are.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if cache is None:
        window = kwargs.get("sliding_window")
        documents = None
        if key.shape[2] == query.shape[2] and (attention_mask is None or bool(attention_mask.all())):
            documents = document_lengths(kwargs.get("position_ids"), query.shape[0], query.shape[2])
        if documents is None:
            out = plain_attention(query, key, value, attention_mask, scale, dropout, window)
        else:

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return plain_attention(q, k, v, None, scale, dropout, window)

            out = by_document(attend, query, key, value, documents)
    else:
        if module.training and torch.is_grad_enabled():
            raise ValueError("a D2OCache does not carry gradients: call model.eval(), or run under torch.no_grad()")
        if dropout:
            raise ValueError(f"attention dropout ({dropout}) cannot be used with a compressed cache: call model.eval()")
        with torch.no_grad(), without_autocast():
            positions = kwargs.get("position_ids")
            out = cache.attend(module, query, key, value, scale, attention_mask, positions)
    return out.transpose(1, 2), None


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float, window: int | None
) -> Tensor:
    """Exact causal attention without a compressed cache; the last query sees the last key.

    Args:
        mask: 2D [B, >= S] padding mask or None; window: keys a query sees, itself included, or None.
    """
    length, held = query.shape[2], key.shape[2]
    padded = mask is not None and not bool(mask.all())
    if not padded and held == length and (window is None or window >= held):
        return scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=scale, dropout_p=dropout, enable_gqa=True
        )
    queries = torch.arange(held - length, held, device=query.device)[:, None]
    keys = torch.arange(held, device=query.device)
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    allowed = allowed[None, None]
    if padded:
        # A padding query sees itself, so that its softmax is defined; nobody reads its output.
        allowed = (allowed & mask[:, None, None, -held:].bool()) | (keys == queries)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=scale, dropout_p=dropout, enable_gqa=True
    )


def hand_on_padding_mask(
    *args: Any,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls: the 2D padding mask as it is; causality needs no tensor.

    Raises:
        ValueError: a cache of static size, whose keys end in slots that are not filled yet.
    """
    if q_length is not None and kv_length + kv_offset > int(q_offset) + q_length:
        raise ValueError(
            f"the cache hands out {kv_length} keys, but only {int(q_offset) + q_length} tokens were seen: caches of "
            "static size are not supported by d2o attention; use D2OCache or DynamicCache"
        )
    return attention_mask


def register() -> None:
    """Make `attn_implementation="d2o"` known to transformers. Registering twice does no harm."""
    AttentionInterface.register(ATTENTION_NAME, d2o_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, hand_on_padding_mask)
