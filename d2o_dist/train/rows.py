"""Rows of equal length from documents of any length: packed one after the other, or cut as windows of one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from d2o_dist.train.losses import IGNORED


@dataclass(frozen=True)
class Row:
    """One row of T tokens.

    Attributes:
        input_ids, position_ids: [T] int64; positions begin at 0 in every document.
        targets: [T] int64, the next token of the same document; IGNORED where there is none or it is not counted.
        documents: lengths of the documents in it; they add up to T.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    documents: tuple[int, ...]


class Source(Protocol):
    """Documents by number; see `documents.Documents`.

    Attributes:
        lengths: [N] int64 tokens of each; all_counted: whether every token is a target.
    """

    lengths: np.ndarray
    all_counted: bool

    def piece(self, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """`(token ids, counted)` of a part of a document."""


def make_row(pieces: list[tuple[np.ndarray, np.ndarray]]) -> Row:
    """A row of pieces of different documents, each `(token ids, counted)`."""
    targets = []
    for ids, counted in pieces:
        following = np.full(len(ids), IGNORED, dtype=np.int64)
        following[:-1] = np.where(counted[1:], ids[1:], IGNORED)
        targets.append(following)
    return Row(
        np.concatenate([ids for ids, _ in pieces]),
        np.concatenate([np.arange(len(ids), dtype=np.int64) for ids, _ in pieces]),
        np.concatenate(targets),
        tuple(len(ids) for ids, _ in pieces),
    )


class PackedRows:
    """Documents in an order drawn from the seed, one after the other, cut into rows of `length` tokens.

    A document that a row's end cuts goes on in the next row as a document of its own. What is left after the last full
    row is not used.
    """

    def __init__(self, source: Source, length: int, seed: int) -> None:
        self.source, self.length = source, length
        order = np.random.default_rng([seed, 0]).permutation(len(source.lengths))
        self._order = order[source.lengths[order] > 0]
        self._ends = source.lengths[self._order].cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1]) // self.length if len(self._ends) else 0

    def __getitem__(self, number: int) -> Row:
        start, stop = number * self.length, (number + 1) * self.length
        pieces = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[place])
            document = self._order[place]
            begin = end - int(self.source.lengths[document])
            pieces.append(self.source.piece(document, start - begin, min(stop, end) - begin))
            start, place = min(stop, end), place + 1
        return make_row(pieces)


class WindowRows:
    """Every whole window of `length` tokens of every document; shorter rests and documents are not used.

    Args:
        first_target: windows in which no token from this place on has a target are not used.
    """

    def __init__(self, source: Source, length: int, first_target: int) -> None:
        self.source, self.length = source, length
        windows = [(doc, start * length) for doc, n in enumerate(source.lengths) for start in range(int(n) // length)]
        if not source.all_counted:
            windows = [window for window in windows if self._has_target(window, first_target)]
        self._windows = windows

    def _has_target(self, window: tuple[int, int], first_target: int) -> bool:
        document, start = window
        counted = self.source.piece(document, start + first_target, start + self.length)[1]
        return bool(counted[1:].any())

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> Row:
        document, start = self._windows[number]
        return make_row([self.source.piece(document, start, start + self.length)])
