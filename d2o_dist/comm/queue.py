"""A shared work queue: replicas take the next piece of work when they are free, so that none waits for the longest.

The queue is one counter in the job's store (what the ranks met through): no process serves it, and no replica has to
answer another. The first rank of a replica draws a number and tells the other ranks that hold the same request.
"""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.traffic import TrafficCounter


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
        self._claimed = self._done = 0
        if mesh.dp > 1:
            # A name of its own, so that a job may make several queues.
            name = Collectives(mesh.axis("world")).broadcast_object(uuid.uuid4().hex)
            self._store = dist.PrefixStore(f"d2o_dist/queue/{name}", _get_default_store())

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

    def wait(self, total: int, poll_s: float = 0.5) -> None:
        """Until `total` is done. By asking the store, not in a collective: another replica may take longer than any
        timeout, and a rank that fails meanwhile is the launcher's to notice."""
        while self._store is not None and self._store.add("done", 0) < total:
            time.sleep(poll_s)
