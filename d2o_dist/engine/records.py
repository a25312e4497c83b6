"""Result records: one JSON object a row, written as soon as its row ends.

Fields: `id`, `index`, `text`, `num_prompt_tokens`, `num_new_tokens`, `finish_reason`, `time_to_first_token_s` (of the
prompts that were read with it), and of the row itself `tokens_per_s`, `achieved_keep_ratio`, `held_bytes`,
`full_bytes`; `error`.
A field that a row has no value for is null.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.kept import KeptFile
from d2o_dist.engine.loop import Generated
from d2o_dist.engine.parts import spare_parts
from d2o_dist.fields.io import to_json

FIELDS = (
    "id", "index", "text", "num_prompt_tokens", "num_new_tokens", "finish_reason", "time_to_first_token_s",
    "tokens_per_s", "achieved_keep_ratio", "held_bytes", "full_bytes", "error",
)  # fmt: skip

Record = dict[str, Any]


def make_record(request: Request, result: Generated) -> Record:
    """The record of a row that ran."""
    return {
        "id": request.id,
        "index": request.index,
        "text": result.text,
        "num_prompt_tokens": len(request.input_ids),
        "num_new_tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
        "time_to_first_token_s": result.time_to_first_token_s,
        "tokens_per_s": result.tokens_per_s,
        "achieved_keep_ratio": result.usage.achieved_keep_ratio,
        "held_bytes": result.usage.held_bytes,
        "full_bytes": result.usage.full_bytes,
        "error": None,
    }


def error_record(row: Request | BadRow, error: str | None = None) -> Record:
    """The record of a row that could not be run, or failed with `error`."""
    bad = isinstance(row, BadRow)
    known = {
        "id": row.id,
        "index": row.index,
        "num_prompt_tokens": row.num_prompt_tokens if bad else len(row.input_ids),
        "error": row.error if bad and error is None else error,
    }
    return {name: known.get(name) for name in FIELDS}


def to_line(record: Record) -> str:
    """One line of JSON; text that is not valid Unicode (half a surrogate pair in an id) is escaped."""
    line = to_json(record, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = to_json(record)
    return line + "\n"


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse a path that could not be written or that would replace earlier results; its folder is made.

    Raises:
        ValueError: the file exists and `overwrite` is false, it is a folder or a symbolic link to a file, or its folder
            cannot be made or written.
    """
    if path.is_symlink() and (path.is_file() or not path.exists()):
        # Written through, the file behind it would be replaced; else the link would.
        raise ValueError(f"output {path} is a symbolic link to {os.path.realpath(path)}: name that file itself")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file in it")
    if path.exists() and path.stat().st_size and not overwrite:
        raise ValueError(f"output {path} exists: delete it, name another, or set overwrite=true")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of output {path} cannot be made: {error}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"output {path} is not writable")


def is_special(path: Path) -> bool:
    """Whether a path is a device or a pipe."""
    return path.exists() and not path.is_file()


class RecordWriter:
    """Appends records to a file, or to standard output, and remembers them.

    While the run goes on the file is in the order of completion; `sort` puts it into the order of the input. If it is
    taken away meanwhile, the records go on in another (see `engine.kept`).

    Args:
        output: a path; None or `-`: standard output; ignored when `quiet`.
        quiet: write nothing unless `output` is a file.
        spare: number -> where to go on.

    Attributes:
        path: the file that holds the records now; None for standard output, or where no place was left.
    """

    def __init__(
        self, output: str | None, *, quiet: bool = False, spare: Callable[[int], Path] | None = None
    ) -> None:
        self.records: list[Record] = []
        self._kept: KeptFile | None = None
        self._file: TextIO | None = None
        self._special: TextIO | None = None
        path = None if output in (None, "-") else Path(output)
        if path is None:
            self._file = None if quiet else sys.stdout
        elif is_special(path):  # a device or a pipe: nobody can take it away, or replace it
            self._file = self._special = path.open("w", encoding="utf-8")
        else:
            self._kept = KeptFile(_fresh(path), "w", spare or spare_parts(path, 0))

    @property
    def path(self) -> Path | None:
        """See the class."""
        return None if self._kept is None else self._kept.path

    @property
    def lost(self) -> str | None:
        """What happened to the file while it was written, and where the records are; None: nothing."""
        return None if self._kept is None or self._kept.lost is None else str(self._kept)

    def write(self, records: Iterable[Record]) -> None:
        """Append records and flush, so that they outlive the process."""
        records = list(records)
        self.records += records
        if self._kept is not None:
            self._kept.write(map(to_line, records))
        elif self._file is not None:
            self._file.writelines(to_line(record) for record in records)
            self._file.flush()

    def check(self) -> None:
        """Notice what happened to the file since the last writing."""
        if self._kept is not None:
            self._kept.check()

    def sort(self) -> None:
        """Put the file, once complete, into the order of the input; it is replaced as a whole or not at all."""
        self.records.sort(key=lambda record: record["index"])
        if self._kept is not None:
            self._kept.rewrite(map(to_line, self.records))

    def close(self) -> None:
        """Close the file."""
        if self._kept is not None:
            self._kept.close()
        elif self._special is not None:
            self._special.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()


def _fresh(path: Path) -> Path:
    """The path, where emptying the file would not empty another of its names (hard links)."""
    if path.exists() and path.stat().st_nlink > 1:
        path.unlink()
    return path
