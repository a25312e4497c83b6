"""Ending a run early and in order: a signal says so, or its results cannot be written.

A signal only leaves a wish. The ranks of a request look at it together, at the end of a step or of a batch, so that
all of them end at the same place.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What a job's script takes for "queue me again": EX_TEMPFAIL of sysexits.h.
STATUS_STOPPED, STATUS_UNWRITTEN = 75, 1
# The first is how jobs are ended everywhere; the second is Slurm's warning before a time limit (--signal=USR1@120).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """The wish to end.

    Attributes:
        status: the process should end with it; 0: the run goes on.
        why: what happened, for people.
    """

    def __init__(self) -> None:
        self.status, self.why = 0, ""

    def ask(self, status: int, why: str) -> None:
        """End the run. The first wish counts."""
        if not self.status:
            self.status, self.why = status, why

    @contextmanager
    def on_signals(self, line: str | None) -> Iterator[None]:
        """A block that SIGTERM and SIGUSR1 do not end, but ask to end. In other threads than the main one, which gets
        all signals, it changes nothing.

        Args:
            line: written to standard error, after the name of the first signal; None: nothing is.
        """

        def note(number: int, frame: Any) -> None:
            name = signal.Signals(number).name
            if line is not None and not self.status:
                os.write(2, f"{name}: {line}\n".encode())  # print() is not to be called twice at a time
            self.ask(STATUS_STOPPED, name)

        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, note) for number in _SIGNALS if here}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StoppedError(Exception):
    """A run ended early. What it had written is kept.

    Attributes:
        status: of the process; the same on all ranks.
    """

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status
