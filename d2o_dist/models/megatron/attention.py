"""Core attention of Megatron's layers over a `ModelCache`. Without one it is Megatron's own, for training too.

Shape legend: B rows, n columns of a forward, Hq query heads and Hkv KV heads of this rank, D head dim.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.models.cache import ModelCache


class Forward(Protocol):
    """How the layers of a running forward attend."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [B, Hq, n, D], k and v [B, Hkv, n, D], after RoPE -> [B, Hq, n, D]."""


class CacheForward(NamedTuple):
    """A forward over a cache: its mask [B, seen + n] or None, and position ids [B, n]."""

    cache: ModelCache
    mask: Tensor | None
    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `Forward`; the cache knows the windows."""
        return self.cache.attend_layer(layer, q, k, v, Softmax(scale), self.mask, self.positions)


class _OverCache:
    """A core attention that asks the running forward, if there is one.

    Megatron's inference contexts are not used: its static one keeps whole keys and values of its own before core
    attention is called, and its dynamic engine does not call core attention.

    Attributes:
        running: set while a forward of ours runs; window: keys that a query sees, itself included; None: all.
    """

    running: Forward | None = None

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, *args: Any,
        softmax_scale: float | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(config, layer_number, attn_mask_type, *args, softmax_scale=softmax_scale, **kwargs)
        self.layer = layer_number - 1
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.window = _window(config, layer_number)
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [n, B, Hq, D], key and value [n, B, Hkv, D] -> [n, B, Hq x D]."""
        if self.running is None:
            return super().forward(query, key, value, *args, **kwargs)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = self.running.attend(self.layer, q, k, v, self._scale, self.window)
        return out.permute(2, 0, 1, 3).flatten(2)


class LocalCoreAttention(_OverCache, DotProductAttention):
    """Of `get_gpt_layer_local_spec`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._context_ranks = config.context_parallel_size
        if self._context_ranks > 1:  # which Megatron's own refuses; a cache serves it
            config = copy.copy(config)
            config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `_OverCache`.

        Raises:
            ValueError: context ranks and no cache.
        """
        if self.running is None and self._context_ranks > 1:
            raise ValueError(
                f"without a cache, attention over context_parallel_size ({self._context_ranks}) ranks needs the "
                "layer spec of Transformer Engine"
            )
        return super().forward(query, key, value, *args, **kwargs)


_SERVED = {DotProductAttention: LocalCoreAttention}
if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(_OverCache, TEDotProductAttention):
        """Of `get_gpt_layer_with_transformer_engine_spec`."""

    _SERVED[TEDotProductAttention] = TECoreAttention


def _window(config: Any, layer_number: int) -> int | None:
    skip = getattr(config, "window_attn_skip_freq", None)
    if not is_layer_window_attention(config.window_size, skip, layer_number) or config.window_size[0] < 0:
        return None
    return config.window_size[0] + 1


def with_cache(spec: Any) -> Any:
    """A copy of the spec of a layer (or of a block of layers) whose core attention can serve a `ModelCache`.

    Raises:
        ValueError: a core attention of another kind, such as latent or linear attention.
    """
    spec = copy.deepcopy(spec)
    layers = [spec] if isinstance(spec, ModuleSpec) else spec.layer_specs
    for layer in {id(layer): layer for layer in layers}.values():  # layers that are alike may be one object
        inner = getattr(layer.submodules.self_attention, "submodules", None)
        found = getattr(inner, "core_attention", None)
        if found not in _SERVED:
            raise ValueError(f"the spec's core attention is {found}: {', '.join(one.__name__ for one in _SERVED)} is "
                             "what a cache can serve")  # fmt: skip
        inner.core_attention = _SERVED[found]
    return spec
