"""Which tokens of a padded chunk belong to each row. Padding is never stored, attended, scored or counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The real tokens of a chunk of `length` columns.

    Attributes:
        counts: tokens of each row.
        length: columns of the chunk, padding included.
        index: per row the columns of its tokens, ascending (int64, on the host); None when no row has padding.
    """

    counts: list[int]
    length: int
    index: list[Tensor] | None = None

    @classmethod
    def of(cls, batch: int, length: int, mask: Tensor | None) -> Rows:
        """From a 2D attention mask [B, >= length] whose last `length` columns are this chunk's; None: no padding."""
        if mask is None:
            return cls([length] * batch, length)
        chunk = mask[:, -length:].bool().cpu()
        if bool(chunk.all()):
            return cls([length] * batch, length)
        index = [row.nonzero().flatten() for row in chunk]
        return cls([len(columns) for columns in index], length, index)

    @classmethod
    def first(cls, counts: list[int]) -> Rows:
        """Rows whose tokens are the first of as many columns as the longest has."""
        length = max(counts)
        index = None if min(counts) == length else [torch.arange(count) for count in counts]
        return cls(list(counts), length, index)

    @classmethod
    def of_step(cls, counts: Sequence[int]) -> Rows:
        """One column, in which rows have a token or none."""
        index = None if all(counts) else [torch.arange(count) for count in counts]
        return cls(list(counts), 1, index)

    def without(self, left_out: Collection[int]) -> Rows:
        """With nothing but padding in some rows."""
        if not left_out:
            return self
        index = self.index or [torch.arange(self.length)] * self.batch
        index = [one[:0] if row in left_out else one for row, one in enumerate(index)]
        return Rows([len(columns) for columns in index], self.length, index)

    def last(self, width: int) -> Rows:
        """Those in the last `width` columns."""
        first = self.length - width
        if not first or self.index is None:
            return Rows([width] * self.batch, width) if first else self
        index = [one[one >= first] - first for one in self.index]
        return Rows([len(columns) for columns in index], width, index)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.counts)

    def pick(self, tensor: Tensor, row: int) -> Tensor:
        """The real tokens of one row of [B, H, length, ...]: [1, H, counts[row], ...]."""
        columns = self._columns(row)
        if isinstance(columns, slice):
            return tensor[row : row + 1, :, columns]
        return tensor[row : row + 1].index_select(2, columns.to(tensor.device))

    def put(self, out: Tensor, row: int, values: Tensor) -> None:
        """Write [1, H, counts[row], ...] into the real columns of one row of `out`."""
        columns = self._columns(row)
        out[row, :, columns if isinstance(columns, slice) else columns.to(out.device)] = values[0]

    def _columns(self, row: int) -> slice | Tensor:
        """The columns of a row's tokens: a slice if they lie side by side, for which no device waits."""
        if self.index is None:
            return slice(0, self.length)
        columns = self.index[row]
        first, count = int(columns[0]) if len(columns) else 0, len(columns)
        beside = not count or int(columns[-1]) - first + 1 == count
        return slice(first, first + count) if beside else columns


def added(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Counts of rows, row by row."""
    return [one + other for one, other in zip(old, new, strict=True)]


def is_uniform(counts: list[int]) -> bool:
    """Whether all rows have the same number."""
    return all(count == counts[0] for count in counts)
