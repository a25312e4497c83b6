"""The records of an evaluation on disk: appended by each rank as they come, merged into one file at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2o_dist.engine.kept import KeptFile
from d2o_dist.engine.parts import holds_records
from d2o_dist.engine.paths import Named, check_apart
from d2o_dist.engine.records import to_line
from d2o_dist.files.whole import replace_text

Record = dict[str, Any]
MERGED = "predictions.jsonl"
# Whoever holds it appends and merges; see `engine.lock`.
LOCK = ".lock"
# Beside the records; made anew by every run.
DERIVED = ("config.yaml", "environment.json", "metrics.json", "table.md")
_PICTURES = ("heatmap-*.png", "curve-*.png")
_PART = re.compile(r"predictions\.rank\d{4,}(-\d+)?\.jsonl")
# How every record begins.
_RECORD = b'{"task":'


def rank_files(folder: Path) -> list[Path]:
    """What ranks have written and nobody has merged."""
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name)) if folder.is_dir() else []


def check_folder(folder: Path, inputs: Iterable[Named] = ()) -> None:
    """Refuse a folder in which results would replace what no evaluation wrote.

    Args:
        inputs: (what it is, path) of the files that the run reads.

    Raises:
        ValueError: names a file that would be lost, and why.
    """
    inputs, records = list(inputs), [folder / MERGED, *rank_files(folder)]
    written = records + [folder / name for name in DERIVED]
    written += [path for pattern in _PICTURES for path in sorted(folder.glob(pattern))]
    for path in written:
        check_apart(path, inputs)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{path} is not a regular file, and an evaluation writes it: name another output")
    for path in records:
        if path.exists() and not holds_records(path, _RECORD):
            raise ValueError(f"{path} is not a file of an evaluation's records: move it away, or name another output")
    there = [path for path in written if path.exists()]
    # Somebody may have deleted the records to have them made again; the rest is then complete.
    ours = any(path in there for path in records) or all(folder / name in there for name in DERIVED)
    if there and not ours:
        raise ValueError(
            f"{there[0]} would be replaced, and {folder} holds no records of an evaluation: name another output"
        )


def read_records(folder: Path) -> dict[str, Record]:
    """Good records by key, from the merged file and what interrupted runs left. Records of errors are not kept, nor
    those that hold NaN or infinity, which earlier versions wrote.

    Raises:
        ValueError: a line in the middle of a file that is not a record.
    """
    found: dict[str, Record] = {}
    for path in [folder / MERGED, *rank_files(folder)]:
        if not path.is_file():
            continue
        # Half a line may end inside a character.
        errors = "strict" if path.name == MERGED else "replace"
        lines = path.read_text(encoding="utf-8", errors=errors).split("\n")
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
    """The file that one rank appends its records to. If it is taken away, they go on in another (see `engine.kept`)."""

    def __init__(self, folder: Path, rank: int) -> None:
        name = f"predictions.rank{rank:04d}"

        def spare(number: int) -> Path:
            return folder / (f"{name}-{number}.jsonl" if number else f"{name}.jsonl")

        self._kept = KeptFile(spare(0), spare)

    @property
    def lost(self) -> str | None:
        """What happened to the file while it was written, and where the records are; None: nothing."""
        return None if self._kept.lost is None else str(self._kept)

    def write(self, records: Iterable[Record]) -> None:
        """Append and flush, so that records outlive the process."""
        self._kept.write(map(to_line, records))

    def check(self) -> None:
        """Notice what happened to the file since the last writing."""
        self._kept.check()

    def __enter__(self) -> RankFile:
        return self

    def __exit__(self, *args: Any) -> None:
        self._kept.close()


def merge_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the merged file, whole or not at all, and remove the files of the ranks."""
    replace_text(folder / MERGED, "".join(map(to_line, records)))
    for path in rank_files(folder):
        path.unlink()
