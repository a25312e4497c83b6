"""A file whose lines outlast what others do to it while it is written: where it is removed, they go on beside it."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path


class KeptFile:
    """Lines that are appended, and flushed at once.

    Before and after each writing the name must still be that of this file, and hold what was written. If it was
    removed, replaced or written to by something else, all lines of this object are written anew under another name, and
    more follow there.

    Args:
        path: the file.
        mode: `w`: a new or empty one, or one that is emptied; `a`: after what is there.
        spare: number -> the names to go on under, tried in order; one that exists is left alone.

    Attributes:
        path: where the lines are; None where no place was found.
        lost: what happened to the file, for people; None: nothing.
    """

    def __init__(self, path: Path, mode: str, spare: Callable[[int], Path]) -> None:
        self.path: Path | None = path
        self.lost: str | None = None
        self._name, self._spare, self._why = path, spare, ""
        self._lines: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)  # it was checked, but that may be a while ago
        self._file = path.open(mode + "b")
        self._file.seek(0, os.SEEK_END)
        self._begins_inside = self._file.tell() > 0

    def write(self, lines: Iterable[str]) -> None:
        """Append lines; each ends with its line break."""
        lines = list(lines)
        self.check()  # what something else wrote in its place must not be mixed with these
        self._lines += lines
        if self._begins_inside:
            # Ends the half line of a run that was killed.
            lines, self._begins_inside = ["\n", *lines], False
        if self.path is not None:
            try:
                self._file.writelines(line.encode("utf-8") for line in lines)
                self._file.flush()
            except OSError as error:
                if error.errno != errno.ESTALE:  # how a network file system says that it is gone
                    raise
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

    def rewrite(self, lines: Iterable[str]) -> None:
        """Put `lines` in place of all that was written, as a whole or not at all; the file is then closed."""
        self._lines = list(lines)
        self.check()
        if self.path is not None:
            self.close()
            replace_text(self.path, "".join(self._lines))

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
                self._file = path.open("xb")
            except OSError as error:
                self._why = str(error)
                return
            try:
                self._file.writelines(line.encode("utf-8") for line in self._lines)
                self._file.flush()
            except OSError as error:
                self._why = str(error)
                # No second file with a part of the lines at the next try.
                with suppress(OSError):
                    path.unlink()
                with suppress(OSError):  # what it could not write is tried again
                    self._file.close()
                return
            self.path = path
            return


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, in place of what has its name; nothing else is touched on the way."""
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with scratch.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
