"""Counters: the formulas of the module's docstring, by phase, axis and kind."""

import pytest
import torch

from d2o_dist.comm import Collectives, Traffic, TrafficCounter, build_mesh
from tests.ranks import run_ranks


def one_of_each(rank, world):
    counter = TrafficCounter()
    comm = Collectives(build_mesh(sp=world).axis("sp"), counter)
    x = torch.zeros(world * 6, 2, dtype=torch.float32)  # world * 48 bytes
    with counter.phase("prefill"):
        comm.all_reduce(x)
        comm.all_gather(x, 1)
        comm.all_to_all(x, 0, 1)
    with counter.phase("decode"):
        comm.reduce_scatter(x, 0)
        comm.broadcast(x, 0)
        comm.ring_shift([x, x.bool()]).wait()
    comm.barrier()
    return counter.to_dict()


@pytest.mark.multirank
@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_of_each_kind(world):
    size, n = world * 48, world
    expected = {
        "prefill": {
            "sp": {
                "all_reduce": {"calls": 1, "bytes": 2 * (n - 1) * size // n},
                "all_gather": {"calls": 1, "bytes": (n - 1) * size},
                "all_to_all": {"calls": 1, "bytes": (n - 1) * size // n},
            }
        },
        "decode": {
            "sp": {
                "reduce_scatter": {"calls": 1, "bytes": (n - 1) * size // n},
                "broadcast": {"calls": 1, "bytes": (n - 1) * size // n},
                "ring_shift": {"calls": 1, "bytes": size + size // 4},
            }
        },
        "other": {"sp": {"barrier": {"calls": 1, "bytes": 0}}},
    }
    assert run_ranks(world, one_of_each) == [expected] * world


def uneven_ones(rank, world):
    comm = Collectives(build_mesh(sp=world).axis("sp"))
    have = [5, 1, 0][rank]

    def bytes_of(call):
        before = comm.counter.total().bytes
        call()
        return comm.counter.total().bytes - before

    mine, sizes = torch.zeros(have, dtype=torch.int64), [5, 1, 0]
    return (
        bytes_of(lambda: comm.all_gather_uneven(mine, 0, sizes)),
        bytes_of(lambda: comm.all_gather_uneven(mine, 0)),
        bytes_of(lambda: comm.reduce_scatter(torch.zeros(6), 0, sizes)),
        bytes_of(lambda: comm.reduce_scatter(torch.zeros(6), 0, sizes, in_rank_order=True)),
        bytes_of(lambda: comm.sum_in_rank_order(torch.zeros(6))),
        bytes_of(lambda: comm.all_reduce(torch.zeros(0))),
    )


@pytest.mark.multirank
def test_padding_is_counted_and_nothing_costs_nothing():
    found = run_ranks(3, uneven_ones)
    for rank, have in enumerate([5, 1, 0]):
        assert found[rank] == (2 * 5 * 8, 2 * 5 * 8 + 2 * 8, 2 * 5 * 4, (6 - have) * 4, 2 * 6 * 4, 0)


def test_phases_nest_totals_filter_and_reset_forgets():
    counter = TrafficCounter()
    with counter.phase("decode"):
        counter.add("tp", "all_reduce", 10)
        with counter.phase("evict"):
            counter.add("sp", "all_gather", 5)
        counter.add("sp", "all_gather", 7)
    counter.add("sp", "all_gather", 100)
    assert counter.total() == Traffic(4, 122)
    assert counter.total(phase="decode") == Traffic(2, 17)
    assert counter.total(axis="sp", kind="all_gather") == Traffic(3, 112)
    assert counter.total(phase="evict", axis="tp") == Traffic()
    assert [line.split() for line in counter.table().splitlines()] == [
        ["phase", "axis", "kind", "calls", "bytes"],
        ["decode", "tp", "all_reduce", "1", "10"],
        ["evict", "sp", "all_gather", "1", "5"],
        ["decode", "sp", "all_gather", "1", "7"],
        ["other", "sp", "all_gather", "1", "100"],
    ]
    counter.reset()
    assert counter.total() == Traffic() and counter.to_dict() == {}


def test_a_phase_that_raises_is_closed():
    counter = TrafficCounter()
    with pytest.raises(KeyError), counter.phase("decode"):
        raise KeyError
    counter.add("sp", "barrier", 0)
    assert list(counter.to_dict()) == ["other"]
