"""Result records: one JSON object a row, written as soon as its batch is done.

Fields: `id`, `index`, `text`, `num_prompt_tokens`, `num_new_tokens`, `finish_reason`, `time_to_first_token_s` (of the
batch the row ran in), and of the row itself `tokens_per_s`, `achieved_keep_ratio`, `held_bytes`, `full_bytes`; `error`.
A field that a row has no value for is null.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2o_dist.config.io import to_json
from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.loop import Generated

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
        ValueError: the file exists and `overwrite` is false, it is a folder, or its folder cannot be made or written.
    """
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


class RecordWriter:
    """Appends records to a file, or to standard output, and remembers them.

    While the run goes on the file is in the order of completion; `sort` puts it into the order of the input.

    Args:
        output: a path; None or `-`: standard output; ignored when `quiet`.
        quiet: write nothing unless `output` is a file.
    """

    def __init__(self, output: str | None, *, quiet: bool = False) -> None:
        self.records: list[Record] = []
        self._path = None if output in (None, "-") else Path(output)
        if self._path is not None:
            self._file = self._path.open("w", encoding="utf-8")
        else:
            self._file = None if quiet else sys.stdout

    def write(self, records: Iterable[Record]) -> None:
        """Append records and flush, so that they outlive the process."""
        records = list(records)
        self.records += records
        if self._file is not None:
            self._file.writelines(to_line(record) for record in records)
            self._file.flush()

    def sort(self) -> None:
        """Put the file, once complete, into the order of the input; it is replaced as a whole or not at all."""
        self.records.sort(key=lambda record: record["index"])
        if self._path is None:
            return
        # A device or a pipe cannot be replaced.
        if not self._path.is_file():
            return
        scratch = self._path.with_name(self._path.name + ".sorting")
        scratch.write_text("".join(map(to_line, self.records)), encoding="utf-8")
        self._file.close()
        os.replace(scratch, self._path)

    def close(self) -> None:
        """Close the file."""
        if self._path is not None:
            self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()
