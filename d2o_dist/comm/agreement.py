"""Ranks that decide together whether to go on: what fails on one of them fails on all of them alike.

Before and after the work (`agreed`), and at a few points amid it (`failing_alike`). Elsewhere a rank that fails ends
the job (`comm.launch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh

# What an error shows at most: of things that differ, of ranks, and of characters of a value.
_SHOWN_THINGS, _SHOWN_RANKS, _SHOWN_CHARACTERS = 5, 8, 60

Parts = dict[str, tuple[str, str | None]]


class AgreedError(ValueError):
    """Raised on all ranks alike: one of them speaks for all."""


class Fingerprint:
    """What a rank has read, as named digests to compare with those of other ranks."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    def add(self, name: str, *values: object, shown: object = None) -> None:
        """Values whose `repr` says all that matters about them.

        Args:
            name: what they are, as in "rank 1 differs from rank 0 in NAME".
            shown: what an error says beside the name; None: nothing.
        """
        digest = hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()
        text = None if shown is None else str(shown)
        if text is not None and len(text) > _SHOWN_CHARACTERS:
            text = text[:_SHOWN_CHARACTERS] + "..."
        self.parts[name] = digest, text


def agreed(mesh: ParallelMesh) -> AbstractContextManager[Fingerprint]:
    """A block that all ranks of the world leave in the same way; see `agreed_over`."""
    return agreed_over(Collectives(mesh.axis("world")))


@contextmanager
def agreed_over(ranks: Collectives) -> Iterator[Fingerprint]:
    """A block that all these ranks leave in the same way. One exchange at its end; nothing collective may happen
    inside.

    Yields:
        a `Fingerprint` to fill with what must be the same everywhere.

    Raises:
        ValueError: what the block raised, where there is one rank. AgreedError: of the lowest rank that raised one, on
            all ranks; or the fingerprints differ. Other errors are not caught: they end the job.
    """
    fingerprint, error = Fingerprint(), None
    try:
        yield fingerprint
    except ValueError as raised:
        if ranks.size == 1:
            raise
        error = raised
    if ranks.size == 1:
        return
    found = ranks.all_gather_object((None if error is None else str(error), fingerprint.parts))
    for rank, (message, _) in enumerate(found):
        if message is not None:
            # Wrong on rank 0 too, it may be wrong for everyone; otherwise the machine of this rank matters.
            raise AgreedError(f"rank {rank}: {message}" if rank else message) from error
    if wrong := _differences([parts for _, parts in found]):
        raise AgreedError(f"{wrong}: make them the same on all machines")


@contextmanager
def failing_alike(ranks: Collectives) -> Iterator[None]:
    """A block amid a run that all these ranks leave in the same way, whatever one of them raises: lack of memory, say.
    One exchange at its end; nothing collective may happen inside.

    Raises:
        AgreedError: on all ranks, what the lowest of them raised, with its type. Where there is one rank, the error.
    """
    with agreed_over(ranks):
        try:
            yield
        except Exception as error:
            if ranks.size == 1:
                raise
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _differences(found: Sequence[Parts]) -> str:
    """What is not the same on all ranks as on rank 0, for people; empty if all is."""
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(name for parts in found for name in parts):
        mine, shown = found[0].get(name, (None, None))
        odd = tuple(rank for rank, parts in enumerate(found) if parts.get(name, (None, None))[0] != mine)
        if odd:
            other = found[odd[0]].get(name, (None, None))[1]
            by_ranks.setdefault(odd, []).append(name if other == shown else f"{name} ({other}, not {shown})")
    return "; ".join(f"{_ranks(odd)} from rank 0 in {_some(names)}" for odd, names in by_ranks.items())


def _ranks(odd: Sequence[int]) -> str:
    if len(odd) == 1:
        return f"rank {odd[0]} differs"
    more = f" and {len(odd) - _SHOWN_RANKS} more" if len(odd) > _SHOWN_RANKS else ""
    return f"ranks {', '.join(map(str, odd[:_SHOWN_RANKS]))}{more} differ"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_THINGS} more" if len(names) > _SHOWN_THINGS else ""
    return ", ".join(names[:_SHOWN_THINGS]) + more
