"""What a model is to the rest of the library: a shape, a cache made for it, and one way to run it.

Shape legend: B rows, n columns of a forward, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.cache import ModelCache
from d2o_dist.models.shape import ModelShape
from d2o_dist.policy.config import D2OConfig


class ModelAdapter(ABC):
    """A loaded model of some library, sharded over the tensor ranks if there are any.

    Attributes:
        model: the library's own object.
        shape: what it is made of.
    """

    model: Any
    shape: ModelShape

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it takes its input."""

    @property
    def tile_refusal(self) -> str | None:
        """Why `forward` takes no `tiles`; None: it does."""
        return f"{type(self).__name__} does not take tiles"

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that it ends texts with, as far as it knows itself."""
        return frozenset()

    @abstractmethod
    def make_cache(
        self,
        d2o: D2OConfig,
        mesh: ParallelMesh | None = None,
        parallel: ParallelConfig | None = None,
        counter: TrafficCounter | None = None,
    ) -> ModelCache:
        """An empty cache of the kind that `forward` takes; arguments and errors are those of `ModelCache`."""

    @abstractmethod
    def forward(
        self, ids: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None, *,
        all_logits: bool = False, tiles: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the model over tokens that follow what the cache has seen.

        Args:
            ids: [B, n] int64; positions: [B, n] int64, position ids; None: the library counts them itself.
            cache: of `make_cache`.
            mask: [B, seen + n], 0 marks padding; None: no padding in this forward, or a chunk that was dealt.
            tiles: columns of each of the tiles in which they go through each layer, of which the cache was told; None:
                all at once.

        Returns:
            logits of the last column [B, V], or with `all_logits` of all columns [B, n, V].
        """
