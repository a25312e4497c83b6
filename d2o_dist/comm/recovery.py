"""Ranks that share requests, and go on together after one of them failed amid its collectives.

The rank that fails says why in the job's store and cuts its connections. Peers that wait for it in a collective, the
library's or an engine's, then fail too, and find the reason. All of them connect anew. Others call these steps revoke,
agree and repair. A rank that died has said nothing: then the job ends.

Only with gloo, on Linux. With NCCL a peer waits on its device, where nothing of this reaches it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

from d2o_dist.comm.groups import group_timeout
from d2o_dist.comm.mesh import ParallelMesh

# How often ranks connect anew in one job. Each time leaves groups behind, with sockets and threads: to destroy one that
# has work under way may block for good.
_MOST = 64
_FILES = Path("/proc/self/fd")


class PeerLostError(RuntimeError):
    """A peer died or came too late, and did not say why."""


class Recovery:
    """The connections of the ranks that hold one request: `sp`, `tp` and `request` of a mesh.

    They get process groups of their own, which nothing else uses, so that the world's stay whole. All ranks of the
    request make it together, before engines are given the groups, and all of them call `agree` where one does.

    Attributes:
        on_renewed: called with an old group of an axis and the one that took its place.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.on_renewed: Callable[[dist.ProcessGroup, dist.ProcessGroup], None] = lambda old, new: None
        self._axes = [mesh.axis(name) for name in ("sp", "tp", "request") if mesh.axis(name).size > 1]
        self._request = mesh.axis("request")
        self._mesh = mesh
        self._works = bool(self._axes) and "nccl" not in str(dist.get_backend()) and _FILES.is_dir()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._sockets: dict[int, str] = {}
        self._attempt = 0
        if self._works:
            self._connect()

    def agree(self, message: str | None) -> str:
        """What failed, the same on all ranks of the request, which are connected anew.

        Args:
            message: why this rank failed; None: it was only left alone by a peer.

        Raises:
            PeerLostError: no rank says why, or they cannot connect anew.
        """
        if not self._works:
            raise PeerLostError(message or "a peer is gone")
        store = dist.PrefixStore(f"d2o_dist/failed/{self._request.group.group_name}", _get_default_store())
        # Before the connections are cut: whoever is left alone finds a reason, unless the peer died.
        if message is not None:
            store.set(str(self._mesh.rank), message)
        if not self._said(store):
            raise PeerLostError("a peer died or came too late")
        try:
            self._cut()
            self._connect()
        except RuntimeError as error:
            raise PeerLostError(f"the ranks could not connect anew: {error}") from error
        # Connected, all have said what they had to say.
        said = self._said(store)
        first = min(said)
        everyone = len(said) == self._request.size and len(set(said.values())) == 1
        return said[first] if everyone or first == 0 else f"rank {first}: {said[first]}"

    def _said(self, store: dist.Store) -> dict[int, str]:
        return {rank: store.get(str(rank)).decode() for rank in self._request.ranks if store.check([str(rank)])}

    def _cut(self) -> None:
        """End the connections under gloo. It has no call for that, and keeps them as long as any engine has a group."""
        now = _open_sockets()
        for number in [number for number, name in self._sockets.items() if now.get(number) == name]:
            # A listening one is shared with groups that stay, and refuses this.
            with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.getpeername()
                connection.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> None:
        if self._attempt > _MOST:
            raise RuntimeError(f"they did so {_MOST} times before")
        self._attempt += 1
        before, old = _open_sockets(), self._groups
        timeout, ranks_of_groups = group_timeout(dist.group.WORLD), dict.fromkeys(axis.ranks for axis in self._axes)
        self._groups = {
            ranks: dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            for ranks in ranks_of_groups
        }
        self._sockets = {number: name for number, name in _open_sockets().items() if before.get(number) != name}
        for axis in self._axes:
            axis.group = self._groups[axis.ranks]
        for ranks, group in old.items():
            self.on_renewed(group, self._groups[ranks])


def _open_sockets() -> dict[int, str]:
    """Numbers of this process's sockets, and the system's name of each: a number may come to mean another."""
    found = {}
    for entry in _FILES.iterdir():
        with suppress(OSError):
            name = os.readlink(entry)
            if name.startswith("socket:"):
                found[int(entry.name)] = name
    return found
