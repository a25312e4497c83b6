"""One run at a time writes to an output: a file beside it or in it names the process that does.

Three things guard it, since none is enough alone. The file is made only where there is none, which machines that share
a file system see alike. `flock` holds it while its process lives, so that one that was killed is known to be gone; not
every file system tells other machines. So its process also touches it now and then, and a file from another machine
that nobody touches for a while was left behind: a job that was preempted may go on elsewhere.

A file of that name that no run wrote is somebody's: it is named and left alone. One that is empty says nothing, and may
be what a process left that was killed as it made it: it is used, and left empty.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.files.whole import reason

# How long a file may be empty: another process has made it and not yet written its name.
_GRACE_S = 1.0
# How often a holder touches its file, and how long one from another machine is watched. Network file systems may show
# a touch up to a minute late.
_BEAT_S, _WATCH_S = 15.0, 100.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_writer(
    output: str | Path, lock: Path | None, mesh: ParallelMesh, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """A block in which no other run writes to `output`. Rank 0 holds `lock`; all ranks enter the block or none does.

    Args:
        lock: the lock's file, asked of rank 0 only; None: nothing to guard.
        check: what rank 0 checks once it holds the lock: the run that held it before may have left results.

    Raises:
        ValueError: another process writes there; the lock cannot be written, or is a file that no run wrote; or one of
            `check`. On all ranks.
    """
    held = None
    try:
        with agreed(mesh):
            if mesh.rank == 0:
                held = None if lock is None else OutputLock(output, lock)
                check()
        yield
    finally:
        if held is not None:
            held.release()


class OutputLock:
    """Held from its making to `release`, also when a signal to terminate (SIGTERM) ends the process.

    Raises:
        ValueError: as `only_writer`.
    """

    def __init__(self, output: str | Path, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while (taken := _take(output, path)) is None:
                pass
            file, self._is_ours = taken
            self._file: int | None = file
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.truncate(file, os.pwrite(file, owner, 0))
        except OSError as error:
            raise ValueError(f"output {output} cannot be locked: {error.filename}: {reason(error)}") from error
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(file,), daemon=True)
        self._heart.start()
        self._watches = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if self._watches:
            signal.signal(signal.SIGTERM, self._terminated)

    def release(self) -> None:
        """Let others write. A second call does nothing."""
        if self._file is None:
            return
        self._released.set()
        self._heart.join()
        # Before the file is closed: whoever waits for it must find that it is gone, or empty.
        if not self._is_ours:
            os.truncate(self._file, 0)
        elif _is(self._file, self.path):  # or somebody has deleted it, and another run has one of that name
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._watches:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _beat(self, file: int) -> None:
        while not self._released.wait(_BEAT_S):
            with suppress(OSError):  # a file system that is away for a while
                os.utime(file)

    def _terminated(self, number: int, frame: Any) -> None:
        self.release()
        os.kill(os.getpid(), number)


def _take(output: str | Path, path: Path) -> tuple[int, bool] | None:
    """The open lock file, from now on ours, and whether a run made it; None if it was deleted before it was.

    Raises:
        ValueError: another process has it, or no run wrote it.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        made = True
    except FileExistsError:
        made = False
        if not stat.S_ISREG(_mode(path)):
            raise _foreign(output, path) from None
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
    try:
        if not made:
            _owner(file, _GRACE_S)  # who made it is about to hold it and to write its name: nobody comes between
        flocked = _flock(file)
        owner = None if made and flocked is not False else _owner(file)
        if owner is None and not made and os.fstat(file).st_size:
            raise _foreign(output, path)
        if flocked is False or (owner and _works(owner, path, flocked)):
            who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            raise ValueError(f"output {output} is written by {who} now: wait for it, or name another output")
        if _is(file, path):
            return file, made or owner is not None
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _foreign(output: str | Path, path: Path) -> ValueError:
    return ValueError(f"{path} is no lock that a run has left: move it away, or name another output than {output}")


def _mode(path: Path) -> int:
    """Kind and rights of a file, or of the link itself; those of a plain file where there is none."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return stat.S_IFREG


def _flock(file: int) -> bool | None:
    """Whether no other process holds the file; None where the file system cannot tell."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _owner(file: int, wait_s: float = 0.0) -> dict[str, Any] | None:
    """Who wrote the file, `pid` and `host`; None if it is empty, or no run wrote it, also after `wait_s` seconds."""
    ends = time.monotonic() + wait_s
    while True:
        with suppress(ValueError, AttributeError):
            owner = json.loads(os.pread(file, 4096, 0))
            if owner.keys() == {"pid", "host"} and type(owner["pid"]) is int and isinstance(owner["host"], str):
                return owner
        if time.monotonic() >= ends:
            return None
        time.sleep(0.01)


def _works(owner: dict[str, Any], path: Path, flocked: bool | None) -> bool:
    """Whether the process that wrote the file still runs, as far as `flock` did not tell."""
    if owner["host"] == socket.gethostname():
        return flocked is None and _lives(owner["pid"])
    touched, ends = _touched(path), time.monotonic() + _WATCH_S
    while time.monotonic() < ends:
        time.sleep(min(1.0, _BEAT_S / 4))
        if _touched(path) != touched:
            return True
    return False


def _touched(path: Path) -> int | None:
    """When the file was touched last, by the clock of its file system; opened anew, or it may be an old answer."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(file).st_mtime_ns
    finally:
        os.close(file)


def _lives(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _is(file: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
