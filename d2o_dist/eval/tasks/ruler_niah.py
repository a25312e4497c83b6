"""RULER's eight needle tasks: keys and values in sentences, hidden in noise, in real text, or among their like."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from d2o_dist.eval.tasks.ruler_parts import NOISE, Draft, Material, scatter
from d2o_dist.eval.tasks.words import number, uuid, word_pairs

# As many repetitions or distractors as 4M tokens could take.
_MOST = 400_000


@dataclass(frozen=True)
class Kind:
    """A needle task.

    Attributes:
        haystack: `noise`, `text` or `needles` (distractors of the needle's own form).
        key, value: `words`, `numbers` or `uuids`.
        keys: needles with keys of their own; values: of each key that is asked; queries: keys that are asked.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("text"),
    "niah_single_3": Kind("text", value="uuids"),
    "niah_multikey_1": Kind("text", keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", key="uuids", value="uuids"),
    "niah_multivalue": Kind("text", values=4),
    "niah_multiquery": Kind("text", keys=4, queries=4),
}


def drafter(kind: Kind) -> Callable[[Material, random.Random], Draft]:
    """What drafts the rows of a kind."""
    return lambda material, rng: _draft(kind, material, rng)


def _draft(kind: Kind, material: Material, rng: random.Random) -> Draft:
    noun = {"numbers": "number", "uuids": "uuid"}[kind.value]
    seed = rng.getrandbits(64)

    def keys(count: int, source: random.Random) -> list[str]:
        return word_pairs(count, source) if kind.key == "words" else [uuid(source) for _ in range(count)]

    def value(source: random.Random) -> str:
        return number(source) if kind.value == "numbers" else uuid(source)

    def needle(key: str, val: str) -> str:
        return f"One of the special magic {noun}s for {key} is: {val}."

    names = keys(kind.keys, rng)
    asked = names[: kind.queries]
    told = {name: [value(rng) for _ in range(kind.values if name in asked else 1)] for name in names}
    needles = [needle(name, val) for name in names for val in told[name]]
    rng.shuffle(needles)
    answers = [val for name in asked for val in told[name]]
    start = rng.randrange(len(material.text)) if kind.haystack == "text" else 0

    def make(count: int) -> tuple[str, str, list[str]]:
        own = random.Random(seed)
        if kind.haystack == "text":
            pieces = [material.text[(start + i) % len(material.text)] for i in range(count)]
        elif kind.haystack == "noise":
            pieces = [" ".join(NOISE)] * count
        else:
            # Word keys may repeat those asked by chance: leave such a distractor out.
            others = (uuid(own) if kind.key == "uuids" else "-".join(word_pairs(1, own)) for _ in range(count))
            pieces = [needle(other, value(own)) for other in others if other not in told]
        body = ("\n" if kind.haystack != "text" else " ").join(scatter(pieces, needles, random.Random(seed + 1)))
        return body, question, answers

    many = len(answers) > 1
    which = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f" and {asked[-1]}"
    question = (
        f"Which special magic {noun}s for {which} does the text above mention? List all of them."
        if many
        else f"Which special magic {noun} for {which} does the text above mention?"
    )
    return Draft(
        instruction=f"The text below hides one or more special magic {noun}s. Remember them: you will be asked.",
        make=make,
        most=len(material.text) if kind.haystack == "text" else _MOST,
        prefix=f" The special magic {noun}{'s' if many else ''} for {which} mentioned in the text "
        f"{'are' if many else 'is'}",
    )
