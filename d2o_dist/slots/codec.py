"""How keys and values lie in an arena: a storage format, for vectors of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o_dist.slots.slots import Slots


@dataclass(frozen=True)
class Codec:
    """A format for keys and values of `dtype`.

    Attributes:
        format: a `policy.storage.StorageFormat`.
        head_dims: elements of a key, and of a value.
    """

    format: Any
    head_dims: tuple[int, int]
    dtype: torch.dtype

    def encode(self, vectors: Tensor) -> Tensor:
        """[..., D] -> [..., X]."""
        return self.format.encode(vectors)

    def decode(self, stored: Tensor) -> Tensor:
        """[..., X] -> [..., D]."""
        return self.format.decode(stored, self.dtype)

    def encode_slots(self, slots: Slots) -> Slots:
        """Slots with keys and values as they are stored."""
        return slots.replace(keys=self.encode(slots.keys), values=self.encode(slots.values))

    def decode_slots(self, slots: Slots) -> Slots:
        """The inverse of `encode_slots`."""
        return slots.replace(keys=self.decode(slots.keys), values=self.decode(slots.values))

    @property
    def num_bytes(self) -> int:
        """Bytes of the key and the value of one slot, as they are stored."""
        return sum(size * dtype.itemsize for size, dtype in self.stored)

    @property
    def stored(self) -> list[tuple[int, torch.dtype]]:
        """How many elements, and of which dtype, a key and a value become."""
        return [self.format.stored(dim, self.dtype) for dim in self.head_dims]
