"""Ranks that decide together whether to go on: what fails on one of them before the work begins ends all of them alike.

Only for the beginning and the end of a run. While batches run, a rank that fails ends the job (`comm.launch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh


class Fingerprint:
    """What a rank has read, as a digest to compare with that of other ranks."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *values: object) -> None:
        """Values whose `repr` says all that matters about them."""
        self._digest.update(repr(values).encode("utf-8", "surrogatepass"))

    def __str__(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def agreed(mesh: ParallelMesh) -> Iterator[Fingerprint]:
    """A block that all ranks leave in the same way. One exchange at its end; nothing collective may happen inside.

    Yields:
        a `Fingerprint` to fill with what must be the same everywhere.

    Raises:
        ValueError: of the lowest rank that raised one, on all ranks; or the fingerprints differ. Other errors are not
            caught: they end the job.
    """
    world = Collectives(mesh.axis("world"))
    fingerprint, error = Fingerprint(), None
    try:
        yield fingerprint
    except ValueError as raised:
        if world.size == 1:
            raise
        error = raised
    if world.size == 1:
        return
    found = world.all_gather_object((None if error is None else str(error), str(fingerprint)))
    for rank, (message, _) in enumerate(found):
        if message is not None:
            # Wrong on rank 0 too, it may be wrong for everyone; otherwise the machine of this rank matters.
            raise ValueError(f"rank {rank}: {message}" if rank else message) from error
    odd = next((rank for rank, (_, digest) in enumerate(found) if digest != found[0][1]), None)
    if odd is not None:
        raise ValueError(
            f"ranks 0 and {odd} read different things: the configuration, the prompts or the tokenizer are not the "
            "same on their machines"
        )
