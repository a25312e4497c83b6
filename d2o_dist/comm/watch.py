"""A word about ranks that wait long: for which rank, and where.

A thread looks at the main thread now and then. One that stands in a collective (of this library or of an engine), or
asks the store again and again, waits. Whoever waits long says so in the job's store, so that all know for whom: the
ranks that do not say it. Nothing is sent before somebody has waited that long, and collectives know nothing of it.

Only what waits on the host is seen. With NCCL that is the device.
"""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

import torch.distributed as dist

# How long a rank waits before it says so; half the timeout where that is less.
NOTICE_S = 30.0
_WAITING = ("torch.distributed", "deepspeed.comm", "d2o_dist.comm")
# Frames of torch lie between a wait and the function of a module above that waits.
_DEPTH = 5


def waiting_place(frame: FrameType | None) -> str | None:
    """Where a thread waits, `function (module:line)`, the line that called for it; None: it does not."""
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_globals.get("__name__", "").startswith(_WAITING):
            break
        frame = frame.f_back
    else:
        return None
    name = frame.f_code.co_name
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((*_WAITING, "contextlib")):
        name, frame = frame.f_code.co_name, frame.f_back
    return f"{name} ({frame.f_globals.get('__name__')}:{frame.f_lineno})"


class Watch:
    """Says a line once for each long wait of this process's main thread. Started once the ranks have met.

    Args:
        store: in which they met; rank, world: this process, and how many there are.
        timeout_s: after which collectives end.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_s: float) -> None:
        self._notice_s, self._timeout_s = min(NOTICE_S, timeout_s / 2), timeout_s
        # A connection of its own: a request on a shared one waits for that of the main thread. Older torch has none.
        self._store = dist.PrefixStore("d2o_dist/watch", store.clone() if hasattr(store, "clone") else store)
        self._rank, self._world = rank, world
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()

    def _run(self) -> None:
        place, since, said = None, 0.0, False
        try:
            while not self._ended.wait(min(1.0, self._notice_s / 10)):
                now, calls = waiting_place(sys._current_frames().get(self._main)), _num_calls()
                if (now, calls) != place:
                    if said:
                        self._store.set(str(self._rank), "")
                    place, since, said = (now, calls), time.monotonic(), False
                elif now is not None and not said and time.monotonic() - since >= self._notice_s:
                    self._store.set(str(self._rank), now)
                    said = True
                    self._ended.wait(self._notice_s / 5)  # for those that began to wait a little later
                    self._say(now)
        except RuntimeError:
            pass  # the store is gone, and the job with it

    def _say(self, place: str) -> None:
        waits = {rank for rank in range(self._world) if self._store.check([str(rank)]) and self._store.get(str(rank))}
        if self._rank != min(waits, default=None):
            return  # another speaks
        missing = [rank for rank in range(self._world) if rank not in waits]
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}" if missing else "each other"
        print(
            f"[rank {self._rank} of {self._world}] has waited {self._notice_s:.0f} s for {who} in {place}; "
            f"the job ends after {self._timeout_s:.0f} s of waiting",
            file=sys.stderr,
            flush=True,
        )


def _num_calls() -> tuple[int, ...]:
    """Collectives so far, by group: a place is where one waits only while none begins."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return tuple(group._get_sequence_number_for_group() for group in groups)
