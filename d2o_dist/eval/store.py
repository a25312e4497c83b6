"""The records of an evaluation on disk: appended by each rank as they come, merged into one file at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2o_dist.engine.records import to_line

Record = dict[str, Any]
MERGED = "predictions.jsonl"
# Whoever holds it appends and merges; see `engine.lock`.
LOCK = ".lock"
_PARTS = "predictions.rank*.jsonl"


def read_records(folder: Path) -> dict[str, Record]:
    """Good records by key, from the merged file and what interrupted runs left. Records of errors are not kept, nor
    those that hold NaN or infinity, which earlier versions wrote.

    Raises:
        ValueError: a line in the middle of a file that is not a record.
    """
    found: dict[str, Record] = {}
    for path in [folder / MERGED, *sorted(folder.glob(_PARTS))]:
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                odd: list[str] = []
                record = json.loads(line, parse_constant=odd.append)
                key, error = record["key"], record["error"]
            except (ValueError, TypeError, KeyError) as problem:
                # A process that was killed while writing leaves half a line at the end; later runs write after it.
                if path.name != MERGED:
                    continue
                raise ValueError(f"{path} line {number} is not a record of an evaluation: {problem}") from problem
            if error is None and not odd:
                found[key] = record
    return found


class RankFile:
    """The file that one rank appends its records to."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"predictions.rank{rank:04d}.jsonl").open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # ends the half line of a run that was killed

    def write(self, records: Iterable[Record]) -> None:
        """Append and flush, so that records outlive the process."""
        self._file.writelines(to_line(record) for record in records)
        self._file.flush()

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()


def merge_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the merged file, whole or not at all, and remove the files of the ranks."""
    scratch = folder / (MERGED + ".merging")
    scratch.write_text("".join(map(to_line, records)), encoding="utf-8")
    os.replace(scratch, folder / MERGED)
    for path in folder.glob(_PARTS):
        path.unlink()
