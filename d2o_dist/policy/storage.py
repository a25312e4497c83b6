"""Storage formats: how keys and values of compressed slots lie in memory while decoding.

A format turns a vector into what is stored and back. It may store another dtype, or another number of elements: a scale
can lie beside the numbers that it scales. Statistics and positions are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2o_dist.policy.rule import Rule, registry


@dataclass(frozen=True)
class StorageFormat(Rule):
    """One format; by default everything is stored as it is.

    Attributes:
        is_exact: whether it is: kernels may then write and read vectors where they lie.
    """

    path: ClassVar[str] = "storage"
    is_exact: ClassVar[bool] = False

    def stored(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """How many elements, and of which dtype, a vector of D = `head_dim` elements of `dtype` becomes."""
        return head_dim, dtype

    def encode(self, vectors: Tensor) -> Tensor:
        """[..., D] -> [..., X] as `stored` says."""
        return vectors

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., X] -> [..., D] in the cache's dtype."""
        return stored


@dataclass(frozen=True)
class Exact(StorageFormat):
    """In the model's dtype."""

    name: ClassVar[str] = "exact"
    is_exact: ClassVar[bool] = True


FORMATS = registry(Exact)
