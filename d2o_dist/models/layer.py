"""What a user reads of one layer of a cache.

Shape legend: B rows, Hkv key/value heads, S slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.slots.windows import kind_of


class LayerView:
    """A view of one layer of a `ModelCache`. Read the slots here; the cache itself does the work.

    Where ranks share the request the tensors are this rank's, and `kv_len` counts the slots of all ranks.

    Attributes:
        keys, values: [B, Hkv, S, D]; positions: [B, Hkv, S] int64, -1 on an unused slot.
        scores, rates, log_mass: [B, Hkv, S] float32 (float64 for a float64 model).
        All are None before the first token.
    """

    def __init__(self, cache: CompressedCache, index: int) -> None:
        self._cache = cache
        self.index = index
        self.is_sliding = cache.windows[index] is not None  # transformers calls chunks so too

    def __repr__(self) -> str:
        kind = kind_of(self._cache.windows[self.index]) if self.is_sliding else "compressed"
        return f"{type(self).__name__}({self.index}, {kind}, held={self.kv_len})"

    def _tensor(self, name: str) -> Tensor | None:
        slots = self._cache.layers[self.index].slots if self._cache.layers else None
        return None if slots is None else getattr(slots, name)

    keys = property(lambda self: self._tensor("keys"))
    values = property(lambda self: self._tensor("values"))
    positions = property(lambda self: self._tensor("positions"))
    scores = property(lambda self: self._tensor("scores"))
    rates = property(lambda self: self._tensor("rates"))
    log_mass = property(lambda self: self._tensor("log_mass"))

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        return self._cache.layers[self.index].dtype if self._cache.layers else None

    @property
    def device(self) -> torch.device | None:
        """Where the slots are; None before the first token."""
        return None if self.keys is None else self.keys.device

    @property
    def shape(self) -> tuple[int, int] | None:
        """(Hkv, D) of what is held here; None before the first token."""
        return self._cache.layers[self.index].shape if self._cache.layers else None

    @property
    def kv_len(self) -> list[int]:
        """Slots held by each row, of its fullest head where heads have budgets of their own."""
        return list(self._cache.layers[self.index].kv_len) if self._cache.layers else []

    @property
    def mean_kv_len(self) -> list[float]:
        """Slots held by each row, mean over the KV heads."""
        return list(self._cache.layers[self.index].mean_kv_len) if self._cache.layers else []

    @property
    def threshold(self) -> Tensor | None:
        """[B] moving similarity threshold, NaN before a row's first eviction; None before any, or if never used.

        Where heads have budgets of their own: the mean over the heads of this rank.
        """
        return None if self.is_sliding or not self._cache.layers else self._cache.layers[self.index].state.threshold

    @property
    def slot_budgets(self) -> list[float] | None:
        """Slots each row is evicted to, mean over the KV heads; None before finalize, and for layers that are never
        evicted."""
        return None if self.is_sliding or not self._cache.layers else self._cache.layers[self.index].slot_budgets
