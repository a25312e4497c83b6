"""What an error repeats of what was given: part of a line, however long, deep or odd it is."""

from __future__ import annotations

import reprlib
from typing import Any


def clip(text: object, most: int = 100) -> str:
    """A text on one line, its middle left out where it is longer than `most` characters."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    return " ".join(text.split())


class _Short(reprlib.Repr):
    """Looks at a few elements and three levels of a value, so that it is quick for any."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 80

    def repr_int(self, number: int, level: int) -> str:
        """Python writes no integer of more than 4300 digits, by itself."""
        return super().repr_int(number, level) if number.bit_length() < 10_000 else "an integer of thousands of digits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """`repr`, clipped."""
    return clip(_SHORT.repr(value))


def named(key: Any) -> str:
    """A name as it is, clipped; what is no text, as `shown`."""
    return clip(key) if isinstance(key, str) else shown(key)


def told_by(error: BaseException) -> str:
    """What an error that a library raised says, on one line: its first one, and what that ends in a colon for. What is
    no sentence, such as a key, is told with the type of the error."""
    text = ""
    for line in filter(None, map(str.strip, str(error).splitlines())):
        text = f"{text} {line}".strip()
        if not line.endswith(":"):
            break
    return clip(text if " " in text else f"{type(error).__name__} {text}".strip(), 300)
