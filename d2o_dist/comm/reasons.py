"""Why a rank failed amid its collectives, told to the ranks that wait for it.

The rank that fails says why in the job's store before it ends. Peers whose collective then fails, for the connection is
gone, find the reason there. A rank that died has said nothing.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

from d2o_dist.comm.mesh import ParallelMesh


def tell_peers(mesh: ParallelMesh, why: str) -> None:
    """This rank fails, and will leave its peers alone."""
    _store(mesh).set(str(mesh.rank), why)


def peer_reason(mesh: ParallelMesh) -> str | None:
    """`rank N: why` of the first rank of the request that said so; None: none has."""
    store = _store(mesh)
    for rank in mesh.axis("request").ranks:
        if store.check([str(rank)]):
            return f"rank {rank}: {store.get(str(rank)).decode()}"
    return None


def _store(mesh: ParallelMesh) -> dist.Store:
    return dist.PrefixStore(f"d2o_dist/failed/{mesh.axis('request').group.group_name}", _get_default_store())
