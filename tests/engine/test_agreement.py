"""Ranks that begin together or not at all."""

from __future__ import annotations

import pytest

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.engine.agreement import agreed
from tests.ranks import run_ranks


def test_one_process_raises_what_was_raised():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, agreed(ParallelMesh.local()):
        raise error
    assert caught.value is error
    with agreed(ParallelMesh.local()) as same:
        same.add("anything")


def attempt(rank, world, wrong, everywhere, saw):
    mesh = build_mesh(dp=world)
    try:
        with agreed(mesh) as same:
            same.add("config", saw if rank == world - 1 else "a")
            if rank in wrong:
                raise ValueError("no such file" if everywhere else f"no such file on {rank}")
    except ValueError as error:
        return str(error)
    return None


DIFFERENT = (
    "ranks 0 and 2 read different things: the configuration, the prompts or the tokenizer are not the same on their "
    "machines"
)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("wrong", "everywhere", "saw", "message"),
    [
        ((), False, "a", None),
        ((0, 1, 2), True, "a", "no such file"),
        ((1,), True, "a", "rank 1: no such file"),
        ((2, 1), False, "a", "rank 1: no such file on 1"),
        ((), False, "b", DIFFERENT),
    ],
)
def test_all_ranks_end_alike(wrong, everywhere, saw, message):
    assert run_ranks(3, attempt, wrong, everywhere, saw) == [message] * 3
