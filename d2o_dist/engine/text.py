"""Text from tokens as they come, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What decoding gives for bytes that are not yet, or never, a whole character.
_INCOMPLETE = "\ufffd"


def decode_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens, spaces as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """The growing text of one row.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(string) for string in self._stop), default=0)
        self._ids: list[int] = []
        # Tokens [first, read) were decoded before; they are decoded again with the new ones, because how a token
        # reads can depend on the one in front of it.
        self._first = self._read = 0
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far, held back parts included."""
        return self._text

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain to belong to the result."""
        self._ids.append(token)
        before = decode_tokens(self._tokenizer, self._ids[self._first : self._read])
        after = decode_tokens(self._tokenizer, self._ids[self._first :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return self._add(after[len(before) :])

    def finish(self) -> str:
        """No more tokens come: the rest of the text, which was held back."""
        piece = ""
        if not self.stopped:
            before = decode_tokens(self._tokenizer, self._ids[self._first : self._read])
            after = decode_tokens(self._tokenizer, self._ids[self._first :])
            self._first = self._read = len(self._ids)
            piece = self._add(after[len(before) :])
        return piece + self._show(len(self._text))

    def _add(self, piece: str) -> str:
        # A stop string may begin in text that was there before, but no further back than its own length.
        start = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        found = [at for string in self._stop if (at := self._text.find(string, start)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
            return self._show(len(self._text))
        return self._show(len(self._text) - self._held_back())

    def _held_back(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        for count in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(string.startswith(self._text[-count:]) for string in self._stop):
                return count
        return 0

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
