"""Which classes and functions a pickle names, found without running it."""

from __future__ import annotations

import pickletools
from typing import Any

_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
# What names something in another way, or asks the reader for it.
_REFUSED = ("INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID")


def named_in(data: bytes) -> set[tuple[str, str]]:
    """(module, name) of everything that loading the pickle would look up.

    Raises:
        ValueError: it is no pickle, or what it names cannot be known without running it.
    """
    found: set[tuple[str, str]] = set()
    memo: dict[int, Any] = {}
    pushed: list[Any] = [None, None]  # the two newest, as far as they are strings
    for code, argument, _ in pickletools.genops(data):
        if code.name in _REFUSED:
            raise ValueError(f"it has the operation {code.name}")
        if code.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif code.name in _PUTS:
            memo[int(argument)] = pushed[-1]
        elif code.name in _STRINGS:
            pushed = [pushed[-1], argument]
        elif code.name in _GETS:
            pushed = [pushed[-1], memo.get(int(argument))]
        elif code.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            found.add((module, name))
            pushed = [None, None]
        elif code.name == "STACK_GLOBAL":
            # Both were pushed right before it, so they are what lies on top.
            if not all(isinstance(one, str) for one in pushed):
                raise ValueError("it makes up a name")
            found.add((pushed[0], pushed[1]))
            pushed = [None, None]
        elif code.name not in ("PROTO", "FRAME"):
            pushed = [None, None]
    return found
