"""Fields of frozen dataclasses, each with its limit: `ratio: float = real(0.2, above=0, high=1)`."""

from __future__ import annotations

import dataclasses
from typing import Any

from d2o_dist.fields.checks import MAX_INTEGER, is_integer, is_number
from d2o_dist.fields.io import did_you_mean


def real(
    default: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> Any:
    """A field for a finite number within limits, or None where that is `optional`."""

    def limit(value: Any) -> str | None:
        if value is None and optional:
            return None
        if not is_number(value):
            return "a finite number"
        inside = (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )
        return None if inside else _interval(low, high, above, below) + (", or null" if optional else "")

    return dataclasses.field(default=default, metadata={"limit": limit})


def integer(default: int | None, *, low: int, odd: bool = False, optional: bool = False) -> Any:
    """A field for an integer, or None where that is `optional`."""

    def limit(value: Any) -> str | None:
        if value is None and optional:
            return None
        if not is_integer(value):
            return "an integer"
        if value > MAX_INTEGER:
            return f"at most {MAX_INTEGER}"
        if value >= low and (not odd or value % 2):
            return None
        return ("odd and " if odd else "") + f"at least {low}" + (", or null" if optional else "")

    return dataclasses.field(default=default, metadata={"limit": limit})


def choice(default: Any, *choices: Any) -> Any:
    """A field for one of a few values."""

    def limit(value: Any) -> str | None:
        # The type first: an array is equal to nothing, or to many things.
        if any(type(value) is type(one) and value == one for one in choices):
            return None
        names = [str(one) for one in choices]
        return f"one of {', '.join(names)}" + did_you_mean(value, names).rstrip()

    return dataclasses.field(default=default, metadata={"limit": limit})


def flag(default: bool) -> Any:
    """A field that is true or false."""
    return dataclasses.field(
        default=default, metadata={"limit": lambda value: None if isinstance(value, bool) else "true or false"}
    )


def _interval(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    start, end = low if low is not None else above, high if high is not None else below
    if start is None or end is None:
        words = ((low, "at least"), (above, "above"), (high, "at most"), (below, "below"))
        return " and ".join(f"{word} {limit}" for limit, word in words if limit is not None)
    return f"in {'[' if low is not None else '('}{start}, {end}{']' if high is not None else ')'}"
