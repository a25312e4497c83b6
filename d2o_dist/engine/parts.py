"""Part files: how they are named, and how they are told from files of the user's that happen to be named so.

`OUTPUT.part-N` is what replica N writes, and where a run goes on whose file was taken away; `OUTPUT.part-N-M` if that
name is taken. They hold records and nothing else; only those are ever replaced or deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

# How `records.to_line` begins every line.
_RECORD = b'{"id":'


def part_path(output: str | Path, replica: int) -> Path:
    """The part file of a replica."""
    path = Path(output)
    return path.with_name(f"{path.name}.part-{replica}")


def spare_parts(output: str | Path, replica: int) -> Callable[[int], Path]:
    """Number -> the names where a replica may go on; the first is its part file."""
    own = part_path(output, replica)
    return lambda number: own.with_name(f"{own.name}-{number}") if number else own


def stale_parts(path: Path) -> list[Path]:
    """Part files beside an output, by their name; files like `OUTPUT.part-notes` are none."""
    pattern = re.compile(re.escape(path.name) + r"\.part-\d+(-\d+)?")
    if not path.parent.is_dir():
        return []
    return sorted(found for found in path.parent.iterdir() if pattern.fullmatch(found.name))


def holds_records(path: Path, begin: bytes = _RECORD) -> bool:
    """Whether it is a regular file, no link, of nothing but records. One that is empty holds nothing else either.

    Args:
        begin: of every line; one may be cut off, and end there.
    """
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return all(line.startswith(begin) or begin.startswith(line.rstrip()) for line in file)


def check_own_parts(path: Path) -> list[Path]:
    """The part files beside an output, all of them this program's.

    Raises:
        ValueError: one is not, by its content.
    """
    parts = stale_parts(path)
    for part in parts:
        if not holds_records(part):
            raise ValueError(
                f"{part} is named like a part file of {path}, but does not hold records: move it away, or name another "
                "output"
            )
    return parts
