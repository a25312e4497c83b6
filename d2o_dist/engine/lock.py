"""One run at a time writes to an output: a file beside it or in it names the process that does.

Three things guard it, since none is enough alone. The file is made only where there is none, which machines that share
a file system see alike. `flock` holds it while its process lives, so that one that was killed is known to be gone; not
every file system tells other machines. So its process also touches it now and then, and a file from another machine
that nobody touches for a while was left behind: a job that was preempted may go on elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.engine.agreement import agreed

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
        ValueError: another process writes there; the lock cannot be written; or one of `check`. On all ranks.
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
            while (file := _take(output, path)) is None:
                pass
            self._file: int | None = file
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.truncate(file, os.pwrite(file, owner, 0))
        except OSError as error:
            raise ValueError(f"output {output} cannot be locked: {error}") from error
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
        # Before the file is closed: whoever waits for it must find that it is gone.
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


def _take(output: str | Path, path: Path) -> int | None:
    """The open lock file, from now on ours; None if it was deleted before it was."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        made = True
    except FileExistsError:
        made = False
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
    try:
        flocked = _flock(file)
        owner = None if made and flocked is not False else _owner(file)
        if flocked is False or (owner and _works(owner, path, flocked)):
            who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            raise ValueError(f"output {output} is written by {who} now: wait for it, or name another output")
        if _is(file, path):
            return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


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


def _owner(file: int) -> dict[str, Any] | None:
    """Who wrote the file, `pid` and `host`; None if nobody did, or it is broken."""
    ends = time.monotonic() + _GRACE_S
    while True:
        try:
            owner = json.loads(os.pread(file, 4096, 0))
            return {"pid": int(owner["pid"]), "host": str(owner["host"])}
        except (ValueError, TypeError, KeyError):
            if time.monotonic() > ends:
                return None
        time.sleep(0.05)


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
    except FileNotFoundError:
        return False
