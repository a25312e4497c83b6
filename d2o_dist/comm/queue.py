"""A shared work queue: replicas take the next piece of work when they are free, so that none waits for the longest.

The queue is one counter in the job's store (what the ranks met through): no process serves it, and no replica has to
answer another. The first rank of a replica draws a number and tells the other ranks that hold the same request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter

_BEAT_S = 1.0
# The key that says how the work ended; not there while it goes on.
_OUTCOME = "outcome"


class StandstillError(RuntimeError):
    """Replicas wait for one that does nothing any more."""


@contextmanager
def first_rank_first(mesh: ParallelMesh, poll_s: float = 0.5) -> Iterator[None]:
    """A block that rank 0 goes through before the others, which find what it has left. Every rank calls it together.

    They ask the store, as `WorkQueue.settle` does: rank 0 may take longer than any collective waits. If it fails there,
    the launcher ends them.
    """
    store = _own_store(mesh) if mesh.world_size > 1 else None
    while store is not None and mesh.rank != 0 and store.add("done", 0) == 0:
        time.sleep(poll_s)
    yield
    if store is not None and mesh.rank == 0:
        store.add("done", 1)


def _own_store(mesh: ParallelMesh) -> dist.Store:
    """A part of the job's store under a name of its own, so that a job may have several; all ranks call it."""
    name = Collectives(mesh.axis("world")).broadcast_object(uuid.uuid4().hex)
    return dist.PrefixStore(f"d2o_dist/queue/{name}", _get_default_store())


class WorkQueue:
    """The numbers 0 .. length - 1, each handed to one replica, ascending.

    Every rank of the mesh makes it at the same point, and all ranks of a replica call `claim` together. With one
    replica nothing is sent.

    Args:
        counter: where the broadcast inside a replica is counted; a private one by default.
    """

    def __init__(self, mesh: ParallelMesh, length: int, counter: TrafficCounter | None = None):
        self._length = length
        self._request = Collectives(mesh.axis("request"), counter)
        self._store: dist.Store | None = None
        self._claimed = self._done = self._status = 0
        self._is_first, self._replica, self._replicas = mesh.rank == 0, mesh.dp_rank, mesh.dp
        self._beaten = 0.0
        if mesh.dp > 1:
            self._store = _own_store(mesh)

    def claim(self) -> int | None:
        """The next number, the same on all ranks of the replica; None when all are taken, or `stop` was called.

        Raises:
            CollectiveError: a rank of this replica is gone; RuntimeError: the store is.
        """
        if self._store is None:
            number, self._claimed = self._claimed, self._claimed + 1
        else:
            number = None
            if self._request.rank == 0:
                ended = self._store.check([_OUTCOME])
                number = self._length if ended else self._store.add("claimed", 1) - 1
            number = self._request.broadcast_object(number)
        return number if number < self._length else None

    def finish(self, count: int) -> int:
        """Add `count` to what is done; the total over all replicas. Called by the first rank of a replica."""
        self._done = self._done + count if self._store is None else self._store.add("done", count)
        return self._done

    def beat(self) -> None:
        """Show the other replicas that this one is at work; called as often as one likes, by any of its ranks."""
        if self._store is not None and self._request.rank == 0 and time.monotonic() - self._beaten >= _BEAT_S:
            self._beaten = time.monotonic()
            self._store.add("beats", 1)

    def _until_standstill(self, total: int, timeout_s: float, poll_s: float) -> Iterator[None]:
        """Yields at once, and every `poll_s` seconds; raises `StandstillError`."""
        if self._request.rank == 0:
            self._store.set(f"waits/{self._replica}", "")
        found, since = None, time.monotonic()
        while True:
            yield
            done = self._store.add("done", 0)
            if found != (now := (done, self._store.add("beats", 0))):
                found, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                late = [replica for replica in range(self._replicas) if not self._store.check([f"waits/{replica}"])]
                raise StandstillError(
                    f"{done} of {total} are done, and nothing has happened for {timeout_s:.0f} s in "
                    f"replica {', '.join(map(str, late))}, which others wait for"
                )
            time.sleep(poll_s)

    def stop(self, status: int) -> None:
        """Hand out no more, and let `settle` return `status`, on all replicas; the first status given counts. All ranks
        of a replica call it with the same."""
        if self._store is None:
            self._status = status
        elif self._request.rank == 0:
            self._decide(status)

    def settle(
        self, total: int, timeout_s: float, asked: Callable[[], int] = lambda: 0, poll_s: float = 0.5
    ) -> int:
        """Wait until `total` is done, or a replica stops: 0, or the status of `stop`; the same on all ranks.

        By asking the store, not in a collective: another replica may take longer than any timeout, and a rank that
        fails meanwhile is the launcher's to notice.

        Args:
            timeout_s: how long nothing may be done, and no replica beat.
            asked: the status that this rank wants to stop with meanwhile; 0: it does not.

        Raises:
            StandstillError: nothing happened for so long.
        """
        if self._store is None:
            return self._status
        # Written once, so that nobody takes for done what another takes for stopped.
        for _ in self._until_standstill(total, timeout_s, poll_s):
            if self._request.rank == 0 and self._store.add("done", 0) >= total:
                self._decide(0)
            elif self._request.rank == 0 and (status := asked()):
                self._decide(status)
            if self._store.check([_OUTCOME]):
                return int(self._store.get(_OUTCOME))

    def leave(self, patience_s: float = 10.0) -> None:
        """After a stop, once this replica's results are written: the first of all ranks waits a while for the others.

        It holds what they need, such as a lock. Another that does not come may be gone.
        """
        if self._store is None or self._request.rank > 0:
            return
        left, ends = self._store.add("left", 1), time.monotonic() + patience_s
        while self._is_first and left < self._replicas and time.monotonic() < ends:
            time.sleep(0.1)
            left = self._store.add("left", 0)

    def _decide(self, status: int) -> None:
        self._store.compare_set(_OUTCOME, "", str(status))
