"""Reading prompts: JSONL, a text file, or one string. A bad row is a row with an error, never an exception."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.engine.messages import check_messages
from d2o_dist.fields.checks import check_int, check_string, check_strings, check_utf8
from d2o_dist.fields.io import read_json
from d2o_dist.fields.show import named, shown

LIMITS = ("max_new_tokens", "max_prompt_tokens", "stop")
SUFFIXES = (".jsonl", ".txt")
# A field this near to a limit's name is taken for a misspelling; other fields are the user's own business.
_NEAR = 0.85


@dataclass(frozen=True)
class PromptRow:
    """One row of the input, in its place.

    Attributes:
        index: place in the input, from 0; blank lines are not counted.
        id: the row's own, or its index. Need not be unique.
        prompt, messages: exactly one of them is set, unless there is an error.
        max_new_tokens, max_prompt_tokens, stop: the row's own limits; None where it has none.
        error: why the row cannot be used; None for a good one.
    """

    index: int
    id: str | int
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    error: str | None = None


def read_prompts(prompts: str | None, prompt: str | None) -> list[PromptRow]:
    """The rows of the file `prompts`, or the one row `prompt`.

    Raises:
        ValueError: neither or both are given, or the file is missing, of another kind, empty, or (`.txt`) not UTF-8.
    """
    if (prompts is None) == (prompt is None):
        raise ValueError("exactly one of prompts (a file) and prompt (a string) must be given")
    if prompt is not None:
        check_utf8("prompt", prompt)
        return [PromptRow(0, 0, prompt=prompt)]
    path = Path(prompts)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"prompts file {path} must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"prompts file {path} does not exist")
    if path.suffix == ".txt":
        return [_read_text(path)]
    lines = enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    rows = [parse_row(index, line, number) for index, (number, line) in enumerate(n for n in lines if n[1].strip())]
    if not rows:
        raise ValueError(f"prompts file {path} has no rows")
    return rows


def _read_text(path: Path) -> PromptRow:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"prompts file {path} is empty")
    return PromptRow(0, 0, prompt=text)


def parse_row(index: int, line: bytes, number: int) -> PromptRow:
    """One line of JSONL; `number` is the line's in the file, from 1, for the error message."""
    values: Any = None
    try:
        values = read_json(line.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a row must be a JSON object, not {type(values).__name__}")
        return _make_row(index, values)
    except ValueError as error:
        own = values.get("id") if isinstance(values, dict) else None
        return PromptRow(index, own if _is_id(own) else index, error=f"line {number}: {error}")


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _make_row(index: int, values: dict[str, Any]) -> PromptRow:
    row_id = values.get("id")
    if row_id is not None and not _is_id(row_id):
        raise ValueError(f"id ({shown(row_id)}) must be a string or an integer")
    has = [name for name in ("prompt", "messages") if values.get(name) is not None]
    if len(has) != 1:
        which = "both prompt and messages" if has else f"neither prompt nor messages, only {_names(values)}"
        raise ValueError(f"a row has exactly one of prompt and messages; this one has {which}")
    for name in values:
        if name not in LIMITS and (near := difflib.get_close_matches(named(name), LIMITS, n=1, cutoff=_NEAR)):
            raise ValueError(f'a row has no limit "{named(name)}". Did you mean "{near[0]}"?')
    limits = {name: values[name] for name in LIMITS if values.get(name) is not None}
    for name in ("max_new_tokens", "max_prompt_tokens"):
        if name in limits:
            check_int(name, limits[name], low=1)
    if "stop" in limits:
        limits["stop"] = check_strings("stop", limits["stop"])
    content: dict[str, Any] = {has[0]: values[has[0]]}
    if has[0] == "prompt":
        check_string("prompt", content["prompt"])
        check_utf8("prompt", content["prompt"])
    else:
        content["messages"] = check_messages(content["messages"])
    return PromptRow(index, index if row_id is None else row_id, **content, **limits)


def _names(values: dict[str, Any]) -> str:
    return ", ".join(map(named, list(values)[:8])) or "no fields"


def repeated_ids(rows: Sequence[PromptRow]) -> dict[str | int, int]:
    """Ids that more than one row has, with how many have it. Rows stay told apart by their index."""
    return {row_id: count for row_id, count in Counter(row.id for row in rows).items() if count > 1}
