"""Packed rows: several documents one after the other in a row, told apart by position ids that restart.

Shape legend: B rows, Hq query heads, Hkv key/value heads, T tokens of a row, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# q, k, v of some rows -> output [B, Hq, T, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def document_lengths(position_ids: Tensor | None, batch: int, length: int) -> list[list[int]] | None:
    """Per row the lengths of its documents; None where no row holds more than one.

    A document begins where a position id does not exceed the one before it.

    Args:
        position_ids: [B or 1, T] int64, or None; ids of another shape say nothing about documents.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(starts.any()):
        return None
    lengths = _lengths(starts)
    return lengths * batch if len(lengths) == 1 and batch > 1 else lengths


def lengths_of(documents: Tensor) -> list[list[int]]:
    """Per row the lengths of its documents; documents: [B, T] int64, the number of the one each token belongs to."""
    return _lengths(documents[:, 1:] != documents[:, :-1])


def _lengths(starts: Tensor) -> list[list[int]]:
    """Per row the lengths of its documents; starts: [B, T - 1] bool, whether one begins at each token but the first."""
    lengths = []
    for row in starts.cpu():
        edges = [0, *(row.nonzero().flatten() + 1).tolist(), len(row) + 1]
        lengths.append([end - start for start, end in zip(edges, edges[1:], strict=False)])
    return lengths


def by_document(attend: Attend, q: Tensor, k: Tensor, v: Tensor, documents: Sequence[Sequence[int]]) -> Tensor:
    """`attend` on each document alone: q [B, Hq, T, D], k and v [B, Hkv, T, D] -> [B, Hq, T, D].

    Args:
        documents: per row the lengths of its documents; they add up to T.
    """
    if all(list(row) == list(documents[0]) for row in documents):
        return torch.cat([attend(*part) for part in zip(*_cut(documents[0], q, k, v), strict=True)], 2)
    rows = []
    for row, lengths in enumerate(documents):
        alone = (tensor[row : row + 1] for tensor in (q, k, v))
        rows.append(torch.cat([attend(*part) for part in zip(*_cut(lengths, *alone), strict=True)], 2))
    return torch.cat(rows)


def _cut(lengths: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(list(lengths), 2) for tensor in tensors]
