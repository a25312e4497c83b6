"""Checks of single values, for config dataclasses and for the rows of a prompt file: each names value and limit."""

from __future__ import annotations

import math
from typing import Any


def check_int(name: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Raise `ValueError` unless `value` is an integer in `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} ({value!r}) must be an integer")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} ({value}) must be {limit}")


def check_number(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a finite number")


def check_bool(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} ({value!r}) must be true or false")


def check_string(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise `ValueError` unless `value` is a string with something in it, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} ({value!r}) must be a non-empty string{' or null' if optional else ''}")


def check_unicode(name: str, text: str) -> None:
    """Raise `ValueError` where half of a surrogate pair stands alone: JSON and command lines can hold it, a tokenizer
    and a file cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate ({text[error.start]!r} at place {error.start}), which is no character: "
            "replace it"
        ) from None


def check_strings(name: str, value: Any) -> tuple[str, ...]:
    """The tuple of non-empty strings that `value` (one string, or a list of them) means; else `ValueError`."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)):
        raise ValueError(f"{name} ({value!r}) must be a string or a list of strings")
    for string in strings:
        check_string(name, string)
        check_unicode(name, string)
    return tuple(strings)
