"""Which tokens a layer sees that does not attend to all of them: those of a window that slides, or of a chunk of the
text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Chunked:
    """The text in chunks of `size` tokens, the first of which begins with it. A query sees those of its own chunk, up
    to itself."""

    size: int


# An integer slides: tokens that a query sees, itself included.
Window = int | Chunked


def size_of(window: Window) -> int:
    """Tokens that a query sees at most."""
    return window.size if isinstance(window, Chunked) else window


def kind_of(window: Window) -> str:
    """What a report calls a layer."""
    return "chunked" if isinstance(window, Chunked) else "sliding"


def kept(window: Window, count: int) -> int:
    """How many of `count` tokens, the first of which begins a chunk, the next query sees beside itself."""
    return count % window.size if isinstance(window, Chunked) else min(count, window - 1)


def first_seen(window: Window, query: Tensor) -> Tensor:
    """The first token that a query sees, of queries int64 that are counted from a beginning of a chunk; maybe less than
    0."""
    return query - query % window.size if isinstance(window, Chunked) else query - window + 1


def pieces(window: Window, first: int, stop: int) -> list[tuple[int, int, int]]:
    """What queries [first, stop) are cut into, so that those of a piece see keys of one chunk: (its first key, first
    query, stop). A window that slides cuts nothing."""
    if not isinstance(window, Chunked):
        return [(0, first, stop)]
    starts = range(first - first % window.size, stop, window.size)
    return [(start, max(first, start), min(stop, start + window.size)) for start in starts]
