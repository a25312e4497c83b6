"""How keys and values lie in an arena: a storage format, for vectors of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o_dist.slots.slots import Slots, join_values, part_values


@dataclass(frozen=True)
class Codec:
    """A format for keys and values of `dtype`.

    Attributes:
        format: a `policy.storage.StorageFormat`.
        head_dims: elements of a key, and of a value.
        latent: elements of a key, the first ones, that are its value too, which is then not stored; None: none are.
    """

    format: Any
    head_dims: tuple[int, int]
    dtype: torch.dtype
    latent: int | None = None

    def encode(self, vectors: Tensor) -> Tensor:
        """[..., D] -> [..., X]."""
        return self.format.encode(vectors)

    def decode(self, stored: Tensor) -> Tensor:
        """[..., X] -> [..., D]."""
        return self.format.decode(stored, self.dtype)

    def encode_slots(self, slots: Slots) -> Slots:
        """Slots with keys and values as they are stored."""
        slots = join_values(slots, self.latent)
        values = slots.values if self.latent is not None else self.encode(slots.values)
        return slots.replace(keys=self.encode(slots.keys), values=values)

    def decode_slots(self, slots: Slots) -> Slots:
        """The inverse of `encode_slots`."""
        decoded = slots.replace(keys=self.decode(slots.keys))
        if self.latent is not None:
            return part_values(decoded, self.latent)
        return decoded.replace(values=self.decode(slots.values))

    @property
    def token_size(self) -> int:
        """Elements of the key and the value of one token, before they are encoded."""
        return self.head_dims[0] + (0 if self.latent is not None else self.head_dims[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the key and the value of one slot, as they are stored."""
        return sum(size * dtype.itemsize for size, dtype in self.stored)

    @property
    def stored(self) -> list[tuple[int, torch.dtype]]:
        """How many elements, and of which dtype, a key and a value become."""
        key, value = (self.format.stored(dim, self.dtype) for dim in self.head_dims)
        return [key, value if self.latent is None else (0, self.dtype)]
