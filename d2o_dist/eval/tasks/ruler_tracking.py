"""RULER's variable tracking: which variables got a value through a chain of assignments scattered in noise."""

from __future__ import annotations

import random
import string

from d2o_dist.eval.tasks.ruler_parts import NOISE, Draft, Material, scatter
from d2o_dist.eval.tasks.words import letters, number

HOPS = 4
_MOST = 400_000


def chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """`(value, names, assignments)`: the first variable gets the value, each other one the variable before it."""
    value, names = number(rng, 5), []
    while len(names) < HOPS + 1:
        name = letters(rng, 5, string.ascii_uppercase)
        names += [name] if name not in names else []
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {name} = VAR {before}." for before, name in zip(names[:-1], names[1:], strict=True)]
    return value, names, lines


def draft(material: Material, rng: random.Random) -> Draft:
    """One chain, and before the text a short solved example of another one."""
    shown_value, shown_names, shown_lines = chain(rng)
    value, names, lines = chain(rng)
    seed = rng.getrandbits(64)
    question = (
        f"Which variables were assigned the value {value} in the text above, directly or through another variable?"
    )
    example = (
        f"Example. {' '.join(scatter(NOISE, shown_lines, rng))} The variables assigned the value {shown_value} are: "
        f"{', '.join(shown_names)}"
    )

    def make(count: int) -> tuple[str, str, list[str]]:
        return "\n".join(scatter([" ".join(NOISE)] * count, lines, random.Random(seed))), question, names

    return Draft(
        instruction=f"Follow the assignments of variables that are hidden in a text.\n\n{example}\n\nThe text:",
        make=make,
        most=_MOST,
        prefix=f" The {len(names)} variables assigned the value {value} are:",
    )
