"""`attn_implementation="d2o"`: attention through a `D2OCache` when there is one, what `sdpa` computes otherwise.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from d2o_dist.attention.dense import dense_attention
from d2o_dist.core.softmax import Softmax
from d2o_dist.models.hf.guards import ATTENTION_NAME, check_arguments, chunks_of
from d2o_dist.models.hf.latent import Expansion
from d2o_dist.models.hf.masks import LazyMask, make_mask
from d2o_dist.models.hf.packed import by_document, document_lengths, lengths_of
from d2o_dist.slots.windows import Window, first_seen, size_of

# `D2OCache.update` hands the keys on with this attribute, through which the attention function finds its cache.
CACHE_TAG = "d2o_cache"
# What sdpa computes with, besides queries, keys, values, mask, dropout and scale.
_OF_SDPA = ("is_causal", "position_bias")
# What changes the softmax: bounds of logits, learned sinks.
_OF_SOFTMAX = ("softcap", "s_aux")
# What sdpa leaves alone, rightly: its mask says it.
_IN_THE_MASK = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


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

    Raises:
        ValueError: arguments that would be dropped. With a cache also: gradients, dropout, and attention that is not
            causal.
    """
    if torch.compiler.is_compiling():
        # Left out of its graphs: what it does depends on what is held. The only break of a layer.
        return _uncompiled(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if kwargs.get("output_attentions"):
        raise ValueError(
            "d2o attention makes no attention weights (output_attentions): load the model with "
            'attn_implementation="eager" to see them'
        )
    cache = cache_of(key, attention_mask)
    if cache is None:
        check_arguments(kwargs, (*_OF_SDPA, *_IN_THE_MASK, *_OF_SOFTMAX), "d2o attention")
        return exact_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs), None
    latents = cache.latents
    cache.check_pending(key if latents is None else latents, module)
    check_arguments(kwargs, ("is_causal", *_OF_SOFTMAX), "a D2OCache")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError("a D2OCache does not carry gradients: run the model under torch.no_grad()")
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) cannot be used with a compressed cache: call model.eval()")
    padding = padding_of(attention_mask, cache.pending_window)
    softmax, blocks = softmax_of(query, scaling, kwargs, cache.ranks.tp.rank), None
    if isinstance(attention_mask, LazyMask) and attention_mask.pattern.blocks is not None:
        blocks = attention_mask.whole.blocks  # such a mask is never left out
    elif query.shape[2] > 1:  # one query sees all keys, either way
        check_causal(module, kwargs, "a D2OCache attends causally")
    if torch.is_autocast_enabled(query.device.type):
        # Positions are added in float32 there, so that queries and keys are no longer what values are.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        latents = None if latents is None else latents.to(dtype)
    expansion = None
    if latents is not None:
        parts = latents.tensor_split([cache.shape.latent], -1)
        expansion = Expansion.of(module, *parts)
        query, key, value = expansion.absorbed(query), latents, parts[0]
    out = cache.attend(module, query, key, value, softmax, padding, kwargs.get("position_ids"), blocks)
    out = out if expansion is None else expansion.expanded(out)
    # Some models take a view of it.
    return out.transpose(1, 2).contiguous(), None


# Beside the function, not around it: so a step that is not compiled does not pay for it.
_uncompiled = torch.compiler.disable(d2o_attention)


def cache_of(key: Tensor, mask: Tensor | None) -> Any:
    """The `D2OCache` that the keys are of; None: there is none.

    Keys carry it. Those that a model has made of latents cannot: the mask of the forward was made for its cache, which
    knows whether latents were announced.
    """
    cache = getattr(key, CACHE_TAG, None)
    if cache is None and isinstance(mask, LazyMask) and getattr(mask.cache, "latents", None) is not None:
        return mask.cache
    return cache


def softmax_of(query: Tensor, scaling: float | None, kwargs: dict[str, Any], rank: int = 0) -> Softmax:
    """The softmax that a model's arguments ask for, of the heads of query [B, Hq, n, D].

    Args:
        rank: of this process among the tensor ranks, for engines that leave sinks whole where they cut heads.
    """
    sinks, heads = kwargs.get("s_aux"), query.shape[1]
    if sinks is not None:
        sinks = sinks.reshape(1, -1)
        sinks = sinks if sinks.shape[1] == heads else sinks.narrow(1, rank * heads, heads)
    return Softmax(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), sinks)


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether queries see the keys before them only, where there is no mask: as `sdpa` decides it."""
    given = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if given is None else given


def check_causal(module: nn.Module, kwargs: dict[str, Any], what: str) -> None:
    """Refuse attention that is not causal, where `what` says that it must be."""
    if not is_causal(module, kwargs):
        raise ValueError(
            f"{what}, but {type(module).__name__} says is_causal=False: which of them holds is not known. A model that "
            "takes token_type_ids is told by these"
        )


def padding_of(mask: Tensor | None, window: Window | None) -> Tensor | None:
    """The 2D padding mask in what a model hands to attention; None: no padding.

    Args:
        window: of the layer, in its cache.

    Raises:
        ValueError: a mask that is not causal, has another window, or is not known.
    """
    if mask is None or mask.dim() == 2:
        return mask
    if not isinstance(mask, LazyMask):
        raise ValueError(f"a D2OCache takes a 2D padding mask [B, T], not one of shape {tuple(mask.shape)}")
    if mask.may_be_changed:
        raise ValueError("a D2OCache attends causally, but the model takes parts of its mask, and may have changed it")
    if mask.pattern is None:
        raise ValueError(
            f"a D2OCache attends causally, but the model's mask is made by {mask.names}: of masks that are not causal "
            "it follows those that transformers' own functions make of images and prefixes"
        )
    if mask.pattern.window != window:
        raise ValueError(
            f"the model's mask has a window of {mask.pattern.window}, but its configuration has {window} for this layer"
        )
    if mask.pattern.documents is not None:
        raise ValueError("a D2OCache cannot hold packed documents: give each a row of its own")
    return mask.padding


def exact_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
    dropout: float, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention without a compressed cache, as `sdpa` computes it: [B, n, Hq, D].

    Packed rows are attended to document by document, without a mask of all pairs. Without a mask (sequence parallel
    engines give none), position ids that restart tell the documents, and `sliding_window` or chunks hold.

    Raises:
        ValueError: a 2D mask, which no mask function of transformers makes for this attention; a causal mask for a
            module that is not.
    """
    softmax = softmax_of(query, scaling, kwargs)
    documents = window = None
    if isinstance(mask, LazyMask):
        is_whole = not mask.may_be_changed and key.shape[2] == query.shape[2]
        if is_whole and mask.pattern is not None and mask.pattern.documents is not None:
            documents, window = lengths_of(mask.pattern.documents), mask.pattern.window
    elif mask is not None and mask.dim() != 4:
        raise ValueError(f"d2o attention takes a mask [B, 1, n, S], not one of shape {tuple(mask.shape)}")
    elif mask is None and is_causal(module, kwargs) and key.shape[2] == query.shape[2]:
        documents = document_lengths(kwargs.get("position_ids"), query.shape[0], query.shape[2])
        window = chunks_of(module) or kwargs.get("sliding_window")
        if documents is None and window is not None and size_of(window) < key.shape[2]:
            documents = [[key.shape[2]]] * query.shape[0]
    if documents is None or kwargs.get("position_bias") is not None:
        if isinstance(mask, LazyMask):
            mask = mask.of("sdpa" if softmax.is_plain else "eager")
            # Some models say so themselves where there is a mask: without one they would not.
            if mask is None and query.shape[2] > 1:
                check_causal(module, kwargs, "the model's mask is causal")
        if not softmax.is_plain:
            if kwargs.get("position_bias") is not None:
                raise ValueError("d2o attention does not support position_bias beside softcap or s_aux")
            if mask is None and query.shape[2] > 1 and is_causal(module, kwargs):
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            return dense_attention(query, key, value, mask, softmax, dropout).transpose(1, 2).contiguous()
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, softmax, dropout, window)

    return by_document(attend, query, key, value, documents).transpose(1, 2).contiguous()


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, dropout: float, window: Window | None
) -> Tensor:
    """Exact causal attention of n queries to their n keys: [B, Hq, n, D].

    Args:
        window: what a query sees, or None.
    """
    length, mask = query.shape[2], None
    if not softmax.is_plain or (window is not None and size_of(window) < length):
        place = torch.arange(length, device=query.device)
        mask = (place <= place[:, None]) & (place >= first_seen(window or length, place)[:, None])
    if not softmax.is_plain:
        return dense_attention(query, key, value, mask, softmax, dropout)
    return scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, scale=softmax.scale, dropout_p=dropout, enable_gqa=True,
    )  # fmt: skip


def register() -> None:
    """Make `attn_implementation="d2o"` known to transformers. Registering twice does no harm."""
    AttentionInterface.register(ATTENTION_NAME, d2o_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
