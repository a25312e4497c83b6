"""Core attention of Megatron's layers over a `ModelCache`. Without one it is Megatron's own, for training too.

Shape legend: B rows, n columns of a forward, Hq query heads and Hkv KV heads of this rank, D head dim.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.models.cache import ModelCache


class CacheForward(NamedTuple):
    """What a running forward attends over: the cache, its mask [B, seen + n] or None, and position ids [B, n]."""

    cache: ModelCache
    mask: Tensor | None
    positions: Tensor


class _OverCache:
    """A core attention that asks the cache of the running forward, if there is one.

    Megatron's inference contexts are not used: its static one keeps whole keys and values of its own before core
    attention is called, and its dynamic engine does not call core attention.

    Attributes:
        running: set by `MegatronModel` while a forward runs.
    """

    running: CacheForward | None = None

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, *args: Any,
        softmax_scale: float | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(config, layer_number, attn_mask_type, *args, softmax_scale=softmax_scale, **kwargs)
        self.layer = layer_number - 1
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self._softmax = Softmax(config.kv_channels**-0.5 if softmax_scale is None else softmax_scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [n, B, Hq, D], key and value [n, B, Hkv, D] -> [n, B, Hq x D]."""
        if self.running is None:
            return super().forward(query, key, value, *args, **kwargs)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        cache, mask, positions = self.running
        return cache.attend_layer(self.layer, q, k, v, self._softmax, mask, positions).permute(2, 0, 1, 3).flatten(2)


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


def with_cache(spec: Any) -> Any:
    """A copy of the spec of a layer (or of a block of layers) whose core attention can serve a `ModelCache`.

    Raises:
        ValueError: a core attention of another kind, such as latent or linear attention.
    """
    spec = copy.deepcopy(spec)
    for layer in [spec] if isinstance(spec, ModuleSpec) else spec.layer_specs:
        inner = getattr(layer.submodules.self_attention, "submodules", None)
        found = getattr(inner, "core_attention", None)
        if found not in _SERVED:
            raise ValueError(f"the spec's core attention is {found}: {', '.join(one.__name__ for one in _SERVED)} is "
                             "what a cache can serve")  # fmt: skip
        inner.core_attention = _SERVED[found]
    return spec
