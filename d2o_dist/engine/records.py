"""Result records: one JSON object a row, written as soon as its row ends.

A field that a row has no value for is null. Times are not among the fields: the same job gives the same records, in one
go or in many. They are in the summary and, row by row, in a trace.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from d2o_dist.engine.encode import BadRow, Request
from d2o_dist.engine.kept import KeptFile
from d2o_dist.engine.loop import Generated
from d2o_dist.engine.parts import spare_parts
from d2o_dist.fields.io import to_json
from d2o_dist.files.whole import reason

FIELDS = (
    "id", "index", "text", "num_prompt_tokens", "num_new_tokens", "finish_reason", "achieved_keep_ratio", "held_bytes",
    "full_bytes", "error",
)  # fmt: skip

Record = dict[str, Any]
_AGAIN = " again"
_CUT_OFF = re.compile(r", while rows \d+(, \d+)* ran$")


def make_record(request: Request, result: Generated) -> Record:
    """The record of a row that ran."""
    return {
        "id": request.id,
        "index": request.index,
        "text": result.text,
        "num_prompt_tokens": len(request.input_ids),
        "num_new_tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
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


def cut_off_record(request: Request, why: str, batch: Iterable[Request], again: bool) -> Record:
    """The record of a row whose batch ended with the job, for one of the ranks that share it failed.

    Which row is to blame is not known: the next run tries each of them once more, alone. What ends it then is final.
    """
    rows = ", ".join(str(one.index) for one in batch)
    return error_record(request, f"{why}, while rows {rows} ran{_AGAIN if again else ''}")


def is_cut_off(record: Record) -> bool:
    """Whether a row is to be tried once more: see `cut_off_record`."""
    error = record["error"]
    return isinstance(error, str) and _CUT_OFF.search(error) is not None


def to_line(record: Record) -> str:
    """One line of JSON; text that is not valid Unicode (half a surrogate pair in an id) is escaped."""
    line = to_json(record, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = to_json(record)
    return line + "\n"


def read_records(paths: Iterable[Path]) -> dict[int, Record]:
    """Records by index. Of two of one row the good one counts, else the later. What is cut off is left out."""
    found: dict[int, Record] = {}
    for path in paths:
        # Not splitlines(): texts may hold line separators of Unicode. A cut may be inside a character.
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and tuple(record) == FIELDS and type(record["index"]) is int:
                    old = found.get(record["index"])
                    if old is None or old["error"] is not None:
                        found[record["index"]] = record
    return found


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
        raise ValueError(f"the folder of output {path} cannot be made: {reason(error)}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"output {path} is not writable")


def is_special(path: Path) -> bool:
    """Whether a path is a device or a pipe."""
    return path.exists() and not path.is_file()


class RecordWriter:
    """Appends records to a file, or to standard output, and remembers them.

    The file is in the order of completion. If it is taken away meanwhile, the records go on in another (see
    `engine.kept`).

    Args:
        output: a path; None or `-`: standard output; ignored when `quiet`.
        quiet: write nothing unless `output` is a file.
        spare: number -> where to go on.
        earlier: records that the file holds already, from another run.

    Attributes:
        path: the file that holds the records now; None for standard output, or where no place was left.
        records: those of this run.
    """

    def __init__(
        self,
        output: str | None,
        *,
        quiet: bool = False,
        spare: Callable[[int], Path] | None = None,
        earlier: Iterable[Record] = (),
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
            self._kept = KeptFile(path, spare or spare_parts(path, 0), map(to_line, earlier))

    @property
    def path(self) -> Path | None:
        """See the class."""
        return None if self._kept is None else self._kept.path

    @property
    def lost(self) -> str | None:
        """What happened to the file while it was written, and where the records are; None: nothing."""
        return None if self._kept is None or self._kept.lost is None else str(self._kept)

    def write(self, records: Iterable[Record]) -> None:
        """Append records, so that they outlive the process.

        Raises:
            OSError: they could not be written; those of earlier calls stay.
        """
        records = list(records)
        if self._kept is not None:
            self._kept.write(map(to_line, records))
        elif self._file is not None:
            self._file.writelines(to_line(record) for record in records)
            self._file.flush()
        self.records += records

    def check(self) -> None:
        """Notice what happened to the file since the last writing."""
        if self._kept is not None:
            self._kept.check()

    def close(self) -> None:
        """Close the file."""
        if self._kept is not None:
            self._kept.close()
        elif self._special is not None:
            with suppress(OSError):  # of what could not be written `write` has told
                self._special.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()
