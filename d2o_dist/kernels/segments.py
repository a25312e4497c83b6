"""KV heads that hold different numbers of slots, side by side in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the slots of each row and KV head lie among N of all of them: what has no [B, Hkv, S] of its own.

    Attributes:
        start, length: [B, Hkv] int64, on the device of the slots.
        most: the longest length.
        heads: the same for the host: of each KV head in turn where its rows begin, and the length of all of them. The
            rows of a head lie side by side.
    """

    start: Tensor
    length: Tensor
    most: int
    heads: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], batch: int, device: torch.device) -> Segments:
        """lengths: of the segments of each KV head, one after the other, `batch` rows each."""
        heads, end = [], 0
        for length in lengths:
            heads.append((end, length))
            end += batch * length
        rows = range(batch)
        start = torch.tensor([[first + row * length for first, length in heads] for row in rows], device=device)
        return cls(start, torch.tensor([list(lengths)] * batch, device=device), max(lengths), tuple(heads))

    def of_head(self, number: int, tensor: Tensor) -> Tensor:
        """[N, ...] of all slots -> [B, 1, S, ...], the view of one KV head."""
        first, length = self.heads[number]
        batch = len(self.start)
        return tensor[first : first + batch * length].unflatten(0, (batch, 1, length))
