"""Checks of single values, for config dataclasses and for the rows of a prompt file: each names value and limit."""

from __future__ import annotations

import math
import os
from typing import Any

from d2o_dist.fields.show import shown

# What a tensor holds, and all programs that read JSON.
MAX_INTEGER = 2**63 - 1
_LONGEST_S = 10**6


def is_integer(value: Any) -> bool:
    """Whether it is one, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float that is finite as a float."""
    try:
        return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def check_int(name: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Raise `ValueError` unless `value` is an integer in `[low, high]`; without `high` up to `MAX_INTEGER`."""
    if not is_integer(value):
        raise ValueError(f"{name} ({shown(value)}) must be an integer")
    if high is not None and not low <= value <= high:
        raise ValueError(f"{name} ({shown(value)}) must be in [{low}, {high}]")
    if value < low:
        raise ValueError(f"{name} ({shown(value)}) must be at least {low}")
    if value > MAX_INTEGER:
        raise ValueError(f"{name} ({shown(value)}) must be at most {MAX_INTEGER}")


def check_number(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    if not is_number(value):
        raise ValueError(f"{name} ({shown(value)}) must be a finite number")


def check_bool(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} ({shown(value)}) must be true or false")


def check_string(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise `ValueError` unless `value` is a string with something in it, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} ({shown(value)}) must be a non-empty string{' or null' if optional else ''}")
    check_utf8(name, value)


def check_timeout(value: Any) -> None:
    """Seconds that a rank waits for another."""
    check_number("timeout", value)
    if not 1 <= value <= _LONGEST_S:
        raise ValueError(f"timeout ({value}) must be in [1, {_LONGEST_S}] seconds")


def check_path(name: str, value: Any, *, optional: bool = False) -> None:
    """As `check_string`, of the name of a file or folder, or of what may be one."""
    check_string(name, value, optional=optional)
    if value is not None and "\0" in value:
        raise ValueError(f"{name} ({shown(value)}) has a null character, which no file's name has")


def take_path(config: Any, name: str, *, called: str | None = None, optional: bool = False) -> None:
    """`check_path` of a field of a frozen dataclass, in which a leading `~` becomes the user's folder.

    A shell leaves it as it is in `output=~/runs`. called: the field in messages, if not by its name.
    """
    value = getattr(config, name)
    check_path(called or name, value, optional=optional)
    if value is not None and value.startswith("~"):
        object.__setattr__(config, name, os.path.expanduser(value))


def check_utf8(name: str, text: str) -> None:
    """Raise `ValueError` for half a surrogate pair: Python and JSON can hold one, no file and no tokenizer can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a surrogate pair ({text[error.start]!a}) as its character {error.start + 1}: it must be "
            "valid Unicode, surrogates not allowed"
        ) from error


def check_strings(name: str, value: Any) -> tuple[str, ...]:
    """The tuple of non-empty strings that `value` (one string, or a list of them) means; else `ValueError`."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)):
        raise ValueError(f"{name} ({shown(value)}) must be a string or a list of strings")
    for string in strings:
        check_string(name, string)
        check_utf8(name, string)
    return tuple(strings)
