"""Files that are there as a whole or not at all, whatever ends the program that writes them."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A block that writes a new file, at the path it is given, which then takes the place of what has the name `path`.

    If the block raises, nothing changes. Once it is left, the file outlasts a machine that goes down.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}.new")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a text as a whole or not at all, in place of what has its name; nothing else is touched on the way."""
    with replaced(path) as scratch, scratch.open("x", encoding="utf-8", newline="") as file:
        file.write(text)


def remove_scratch(path: Path) -> None:
    """Delete what a process left that was killed in `replaced`. Only where no other process writes the file."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.new")
    for found in path.parent.iterdir():
        if pattern.fullmatch(found.name):
            found.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a new file is lost without its name."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems on which only files can be
            raise
    finally:
        os.close(number)


def reason(error: OSError) -> str:
    """What the system says, for people: no number, and no path."""
    return error.strerror or str(error)
