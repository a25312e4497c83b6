"""Ranks that begin together or not at all."""

from __future__ import annotations

import pytest

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.comm.agreement import AgreedError, agreed
from tests.ranks import run_ranks


def test_one_process_raises_what_was_raised():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, agreed(ParallelMesh.local()):
        raise error
    assert caught.value is error
    with agreed(ParallelMesh.local()) as same:
        same.add("anything", 1)


def attempt(rank, world, wrong, everywhere, saw):
    mesh = build_mesh(dp=world)
    try:
        with agreed(mesh) as same:
            same.add("config", saw if rank == world - 1 else "a", shown=saw if rank == world - 1 else "a")
            same.add("prompts", rank > 0 and saw == "c")
            for number in range(9 * (rank == 1 and saw == "c")):
                same.add(f"file {number}", 0)
            if rank in wrong:
                raise ValueError("no such file" if everywhere else f"no such file on {rank}")
    except AgreedError as error:
        return str(error)
    return None


MANY = (
    "rank 2 differs from rank 0 in config (c, not a); ranks 1, 2 differ from rank 0 in prompts; rank 1 differs from "
    "rank 0 in file 0, file 1, file 2, file 3, file 4 and 4 more: make them the same on all machines"
)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("wrong", "everywhere", "saw", "message"),
    [
        ((), False, "a", None),
        ((0, 1, 2), True, "a", "no such file"),
        ((1,), True, "a", "rank 1: no such file"),
        ((2, 1), False, "a", "rank 1: no such file on 1"),
        ((), False, "b", "rank 2 differs from rank 0 in config (b, not a): make them the same on all machines"),
        ((), False, "c", MANY),
        ((1,), True, "b", "rank 1: no such file"),
    ],
)
def test_all_ranks_end_alike(wrong, everywhere, saw, message):
    assert run_ranks(3, attempt, wrong, everywhere, saw) == [message] * 3
