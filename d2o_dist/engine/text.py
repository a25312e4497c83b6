"""Text from tokens as they come, cut before the first stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What decoding gives for bytes that are not yet, or never, a whole character.
_INCOMPLETE = "\ufffd"
# Halves of surrogate pairs: no text that a tokenizer gives has them.
_MARKS = range(0xD800, 0xE000)


def decode_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens, spaces as they are."""
    return _decode(tokenizer, ids, skip=True)


def _decode(tokenizer: Any, ids: Sequence[int], *, skip: bool) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> string of all special tokens: those with a role, such as end of sequence, and those only added."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


class TextStream:
    """The growing text of one row.

    A stop string is looked for in the text. One that holds special tokens, which are not in the text, is looked for in
    the text with them as well; there a special token is met as a whole or not at all.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens [first, read) were decoded before; they are decoded again with the new ones, because how a token
        # reads can depend on the one in front of it.
        self._first = self._read = 0
        self._text = ""
        self._shown = 0
        self._marked = _MarkedText(tokenizer, self._stop)
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far, held back parts included."""
        return self._text

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain to belong to the result."""
        if self._marked.takes(token):
            # What came before is whole, or never will be.
            piece = self._settle()
            return piece if self.stopped else piece + self._cut(len(self._text), self._marked.add_special(token))
        self._ids.append(token)
        before, after = self._window()
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        return self._settle()

    def finish(self) -> str:
        """No more tokens come: the rest of the text, which was held back."""
        piece = "" if self.stopped else self._settle()
        return piece + self._show(len(self._text))

    def _window(self) -> tuple[str, str]:
        """The text of the tokens [first, read), and of those with all that came after them."""
        before = decode_tokens(self._tokenizer, self._ids[self._first : self._read])
        return before, decode_tokens(self._tokenizer, self._ids[self._first :])

    def _settle(self) -> str:
        """All tokens are read: their text, less what may begin a stop string."""
        if self._read == len(self._ids):
            return ""
        before, after = self._window()
        self._first, self._read = self._read, len(self._ids)
        piece, start = after[len(before) :], len(self._text)
        self._text += piece
        return self._cut(start, self._marked.add(self._ids, piece))

    def _cut(self, start: int, found: int | None) -> str:
        """Look for stop strings in the text from `start` on; `found`: where one that holds special tokens begins."""
        # A stop string may begin in text that was there before, but no further back than its own length.
        places = [self._text.find(string, max(0, start - len(string) + 1)) for string in self._stop]
        places = [place for place in places if place >= 0] + ([] if found is None else [found])
        if places:
            self._text, self.stopped = self._text[: min(places)], True
            return self._show(len(self._text))
        return self._show(min(len(self._text) - _begun(self._text, self._stop), self._marked.certain(len(self._text))))

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


class _MarkedText:
    """The text with a mark, a character of its own, for each special token. Empty unless a stop string holds one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = special_tokens(tokenizer) if stop else {}
        held = sorted({name for name in special.values() if name and any(name in s for s in stop)}, key=len)[::-1]
        self._special = special if held else {}
        taken = set("".join(stop))
        free = (chr(code) for code in _MARKS if chr(code) not in taken)
        # All that no stop string holds have one mark.
        self._other = next(free)
        self._marks = dict(zip(held, free, strict=False))
        names = re.compile("|".join(map(re.escape, held)))
        self._stop = [names.sub(lambda m: self._marks[m[0]], s) for s in stop if names.search(s)] if held else []
        self._text = ""
        self._places: list[int] = []  # of each character: how much of the text without special tokens is before it
        self._length = 0  # of that text
        self._last: tuple[int, int] | None = None  # the last special token, and the number of others before it
        self._count = 0

    def takes(self, token: int) -> bool:
        """Whether a token is special here: it has no text of its own."""
        return token in self._special and not decode_tokens(self._tokenizer, [token])

    def add_special(self, token: int) -> int | None:
        """Add a special token; where the first stop string that it completes begins in the text without them."""
        self._last = token, self._count
        return self._add(self._marks.get(self._special[token], self._other), [self._length])

    def add(self, ids: Sequence[int], piece: str) -> int | None:
        """Add text, `ids` being all tokens so far but special ones; as `add_special`."""
        self._count = len(ids)
        if not self._special:
            return None
        lead = "" if self._length or self._last is None else self._lead(ids, piece)
        places = [self._length] * len(lead) + list(range(self._length, self._length + len(piece)))
        self._length += len(piece)
        return self._add(lead + piece, places)

    def certain(self, length: int) -> int:
        """How much of `length` characters of the text cannot begin a stop string any more."""
        begun = _begun(self._text, self._stop)
        return self._places[-begun] if begun else length

    def _add(self, piece: str, places: list[int]) -> int | None:
        start = len(self._text)
        self._text += piece
        self._places += places
        found = [self._text.find(string, max(0, start - len(string) + 1)) for string in self._stop]
        return min((self._places[at] for at in found if at >= 0), default=None)

    def _lead(self, ids: Sequence[int], piece: str) -> str:
        """The space that some tokenizers drop where a text begins, but not after a special token."""
        special, count = self._last
        text = _decode(self._tokenizer, [special, *ids[count:]], skip=False).removeprefix(self._special[special])
        return text.removesuffix(piece) if text.endswith(piece) else ""


def _begun(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that may turn out to begin a stop string."""
    for count in range(min(max(map(len, stop), default=0) - 1, len(text)), 0, -1):
        if any(string.startswith(text[-count:]) for string in stop):
            return count
    return 0
