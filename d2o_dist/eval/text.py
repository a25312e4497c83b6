"""Long texts by name, from a file or from a folder, and the pieces of them that prompts are made of."""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Mapping
from pathlib import Path

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def text_loader(named: Mapping[str, Callable[[], str]]) -> Callable[[str], str]:
    """A function from a name in `named`, a `.txt` file (also `.txt.xz`) or a folder of them to its text, read once."""
    known: dict[str, str] = {}

    def load(name: str) -> str:
        if name not in known:
            known[name] = named[name]() if name in named else read_text(Path(name))
        return known[name]

    return load


def read_text(path: Path) -> str:
    """The text of a file, or of all text files under a folder in the order of their names.

    Raises:
        ValueError: it is not there, holds no text file, or is not UTF-8.
    """
    path = path.expanduser()
    if path.is_dir():
        files = sorted(file for suffix in ("*.txt", "*.txt.xz") for file in path.rglob(suffix))
        if not files:
            raise ValueError(f"text folder {path} has no .txt file")
        return "\n\n".join(read_text(file) for file in files)
    if not path.is_file():
        raise ValueError(f"text {path} does not exist")
    data = path.read_bytes()
    try:
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"text {path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"text {path} is empty")
    return text


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its runs of white space made one space."""
    return [" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text) if sentence.strip()]
