"""A shared work queue: replicas take the next piece of work when they are free, so that none waits for the longest.

The queue is one counter in the job's store (what the ranks met through): no process serves it, and no replica has to
answer another. The first rank of a replica draws a number and tells the other ranks that hold the same request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter

_BEAT_S = 1.0


class StandstillError(RuntimeError):
    """Replicas wait for one that does nothing any more."""


@contextmanager
def first_rank_first(mesh: ParallelMesh, poll_s: float = 0.5) -> Iterator[None]:
    """A block that rank 0 goes through before the others, which find what it has left. Every rank calls it together.

    They ask the store, as `WorkQueue.wait` does: rank 0 may take longer than any collective waits. If it fails there,
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
        self._replica, self._replicas = mesh.dp_rank, mesh.dp
        self._claimed = self._done = 0
        self._beaten = 0.0
        if mesh.dp > 1:
            self._store = _own_store(mesh)

    def claim(self) -> int | None:
        """The next number, the same on all ranks of the replica; None when all are taken.

        Raises:
            CollectiveError: a rank of this replica is gone; RuntimeError: the store is.
        """
        if self._store is None:
            number, self._claimed = self._claimed, self._claimed + 1
        else:
            number = self._store.add("claimed", 1) - 1 if self._request.rank == 0 else None
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

    def wait(self, total: int, timeout_s: float, poll_s: float = 0.5) -> None:
        """Until `total` is done. By asking the store, not in a collective: another replica may take longer than any
        timeout, and a rank that fails meanwhile is the launcher's to notice.

        Args:
            timeout_s: how long nothing may be done, and no replica beat.

        Raises:
            StandstillError: nothing happened for so long.
        """
        if self._store is None:
            return
        if self._request.rank == 0:
            self._store.set(f"waits/{self._replica}", "")
        found, since = None, time.monotonic()
        while (done := self._store.add("done", 0)) < total:
            if found != (now := (done, self._store.add("beats", 0))):
                found, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                late = [replica for replica in range(self._replicas) if not self._store.check([f"waits/{replica}"])]
                raise StandstillError(
                    f"{done} of {total} are done, and nothing has happened for {timeout_s:.0f} s in "
                    f"replica {', '.join(map(str, late))}, which others wait for"
                )
            time.sleep(poll_s)
