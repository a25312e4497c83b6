"""What the parts of RULER share: the material of a row, its draft, and noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What a row may be made of: sentences of a real text, questions of a file, its length in tokens, its number."""

    text: Sequence[str]
    questions: Sequence[Any]
    length: int
    sample: int


@dataclass(frozen=True)
class Draft:
    """A row before its length is known.

    Attributes:
        instruction: what stands before the body.
        make: pieces -> (body, question, answers). The same pieces give the same row.
        most: pieces there are; least: fewest that the task makes sense with.
        prefix: begins the answer.
    """

    instruction: str
    make: Callable[[int], tuple[str, str, Sequence[str]]]
    most: int
    least: int = 0
    prefix: str = ""


def scatter(pieces: Sequence[str], extra: Sequence[str], rng: random.Random) -> list[str]:
    """`pieces` in order with every one of `extra`, in order, at a random place among them."""
    places = sorted(rng.randrange(len(pieces) + 1) for _ in extra)
    out: list[str] = []
    at = 0
    for place, piece in zip(places, extra, strict=True):
        out += [*pieces[at:place], piece]
        at = place
    return out + list(pieces[at:])
