"""A file whose lines outlast what others do to it while it is written: where it is removed, they go on beside it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from d2o_dist.files.whole import reason, sync_folder


class KeptFile:
    """Lines that are appended, and are on the disk when `write` returns.

    Before and after each writing the name must still be that of this file, and hold what was written. If it was
    removed, replaced or written to by something else, all lines of this object are written anew under another name, and
    more follow there.

    Args:
        path: the file; lines follow what is there.
        spare: number -> the names to go on under, tried in order; one that exists is left alone.
        there: lines that it holds already, as far as they are to be written anew too.

    Attributes:
        path: where the lines are; None where no place was found.
        lost: what happened to the file, for people; None: nothing.
    """

    def __init__(self, path: Path, spare: Callable[[int], Path], there: Iterable[str] = ()) -> None:
        self.path: Path | None = path
        self.lost: str | None = None
        self._name, self._spare, self._why = path, spare, ""
        self._lines = list(there)
        path.parent.mkdir(parents=True, exist_ok=True)  # it was checked, but that may be a while ago
        self._file = path.open("ab", buffering=0)
        self._begins_inside = self._file.seek(0, os.SEEK_END) > 0
        sync_folder(path.parent)

    def write(self, lines: Iterable[str]) -> None:
        """Append lines; each ends with its line break.

        Raises:
            OSError: there is no room for them, or the disk fails. Those of earlier calls stay.
        """
        lines = list(lines)
        self.check()  # what something else wrote in its place must not be mixed with these
        if self.path is not None:
            try:
                # The line break ends the half line of a run that was killed.
                _append(self._file, ["\n", *lines] if self._begins_inside else lines)
            except OSError as error:
                if error.errno != errno.ESTALE:  # how a network file system says that it is gone
                    raise
        self._lines += lines
        self._begins_inside = False
        self.check()

    def check(self) -> None:
        """Move on if the file is not what it should be."""
        if self.path is not None:
            how = self._wrong()
            if how is None:
                return
            self.lost = self.lost or f"{self._name} {how} while it was written"
            self.close()
        self._move()

    def close(self) -> None:
        """Close the file. What was written stays."""
        try:
            self._file.close()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise

    def __str__(self) -> str:
        """What happened to a file that was lost, and where its lines are."""
        where = f"could not be kept: {self._why}" if self.path is None else f"are in {self.path}"
        return f"{self.lost}: the results of this run {where}"

    def _wrong(self) -> str | None:
        try:
            there = os.lstat(self.path)
        except OSError:
            return "was removed"
        try:
            mine = os.fstat(self._file.fileno())
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return "was replaced"
        if not os.path.samestat(mine, there):
            return "was replaced"
        return None if mine.st_size == self._file.tell() else "was changed by something else"

    def _move(self) -> None:
        self.path = None
        for number in count():
            path = self._spare(number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(path):
                    continue
                self._file = path.open("xb", buffering=0)
            except OSError as error:
                self._why = reason(error)
                return
            try:
                _append(self._file, self._lines)
                sync_folder(path.parent)
            except OSError as error:
                self._why = reason(error)
                # No second file with a part of the lines at the next try.
                with suppress(OSError):
                    path.unlink()
                with suppress(OSError):  # what it could not write is tried again
                    self._file.close()
                return
            self.path = path
            return


def _append(file: BinaryIO, lines: Iterable[str]) -> None:
    """All lines are on the disk, or none is in the file."""
    data, before = memoryview("".join(lines).encode("utf-8")), file.tell()
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(before)
            file.seek(before)
        raise
