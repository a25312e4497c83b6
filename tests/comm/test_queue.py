"""The shared work queue: every number once, ascending, and no replica bound to a share of them."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from d2o_dist.comm import ParallelMesh, TrafficCounter, WorkQueue, build_mesh
from d2o_dist.comm.queue import first_rank_first
from tests.ranks import run_ranks


def claim_all(queue: WorkQueue) -> list[int]:
    return list(iter(queue.claim, None))


def test_one_process_needs_nothing():
    counter = TrafficCounter()
    queue = WorkQueue(ParallelMesh.local(), 3, counter)
    assert claim_all(queue) == [0, 1, 2] and queue.claim() is None
    assert (queue.finish(2), queue.finish(5)) == (2, 7)
    queue.settle(100, 1)  # with one replica there is nobody to wait for
    assert counter.total().calls == 0


def test_an_empty_queue():
    assert WorkQueue(ParallelMesh.local(), 0).claim() is None


def shared(rank, world, dp, sp, tp):
    mesh = build_mesh(dp, sp, tp)
    queues = [WorkQueue(mesh, length) for length in (7, 2)]
    found = [claim_all(queue) for queue in queues]
    totals = [queue.finish(len(own)) for queue, own in zip(queues, found, strict=True) if mesh.leads_request]
    for queue, length in zip(queues, (7, 2), strict=True):
        queue.settle(length, 60, poll_s=0.01)
    return mesh.dp_rank, found, totals


@pytest.mark.multirank
@pytest.mark.parametrize(("dp", "sp", "tp"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_every_number_once_and_alike_on_the_ranks_of_a_replica(dp, sp, tp):
    results = run_ranks(dp * sp * tp, shared, dp, sp, tp)
    by_replica = {}
    for replica, found, _ in results:
        assert by_replica.setdefault(replica, found) == found
    for queue, length in enumerate((7, 2)):
        taken = [found[queue] for found in by_replica.values()]
        assert sorted(sum(taken, [])) == list(range(length))
        assert all(own == sorted(own) for own in taken)
        totals = [totals[queue] for _, _, totals in results if totals]
        assert max(totals) == length


def slow_first(rank, world):
    mesh = build_mesh(dp=world)
    queue, begun = WorkQueue(mesh, 9), WorkQueue(mesh, 0)
    if rank == 0:
        own = [queue.claim()]
        begun.finish(1)
        queue.settle(8, 60, poll_s=0.01)  # its one piece takes as long as all the others together
        queue.finish(1)
        return own + claim_all(queue)
    own = []
    begun.settle(1, 60, poll_s=0.01)
    while (number := queue.claim()) is not None:
        own.append(number)
        queue.finish(1)
    queue.settle(9, 60, poll_s=0.01)
    return own


@pytest.mark.multirank
def test_a_slow_replica_holds_nobody_up():
    first, *others = run_ranks(3, slow_first)
    assert len(first) == 1 and sorted(first + sum(others, [])) == list(range(9))


def draw(rank, world):
    # What every replica draws in one round is different; a second queue begins at 0 again.
    mesh = build_mesh(dp=world)
    return [WorkQueue(mesh, 10).claim() for _ in range(2)]


@pytest.mark.multirank
def test_queues_of_one_job_are_apart():
    first, second = zip(*run_ranks(2, draw), strict=True)
    assert sorted(first) == sorted(second) == [0, 1]


def in_turn(rank: int, world: int) -> tuple[float, float]:
    def forbidden(*args, **kwargs):
        raise AssertionError("a collective would wait no longer than its timeout")

    mesh = build_mesh(dp=world)
    dist.barrier = forbidden  # of this process alone
    with first_rank_first(mesh, poll_s=0.01):
        entered = time.monotonic()
        time.sleep(0.5 if rank == 0 else 0)
        left = time.monotonic()
    return entered, left


@pytest.mark.multirank
def test_the_first_rank_goes_first():
    with first_rank_first(ParallelMesh.local()):
        pass
    (_, left), *others = run_ranks(3, in_turn, fresh=True)
    assert all(entered >= left for entered, _ in others)


def stopped(rank, world, dp, sp):
    """The second replica stops at its second piece, and is not waited for; the first has done what it took."""
    mesh = build_mesh(dp, sp)
    queue, begun = WorkQueue(mesh, 100), WorkQueue(mesh, 0)
    if mesh.dp_rank == 0:
        while queue.claim() is not None:
            if mesh.leads_request:
                queue.finish(1)
            time.sleep(0.01)
    else:
        queue.claim()
        queue.stop(75)
    found = queue.settle(100, 60, poll_s=0.01), queue.claim()
    queue.leave()
    done = WorkQueue(mesh, 0)  # the next queue knows nothing of it
    if mesh.leads_request:
        done.finish(1)
    return *found, done.settle(dp, 60, poll_s=0.01), begun.settle(0, 60, poll_s=0.01)


@pytest.mark.multirank
@pytest.mark.parametrize(("dp", "sp"), [(2, 1), (2, 2)])
def test_all_replicas_end_as_the_one_that_stops(dp, sp):
    assert run_ranks(dp * sp, stopped, dp, sp) == [(75, None, 0, 0)] * (dp * sp)


def asked_to(rank, world):
    """All is waited for by the first; it is told to stop meanwhile."""
    queue = WorkQueue(build_mesh(dp=world), 0)
    return queue.settle(1, 60, (lambda: 75) if rank == 0 else (lambda: 0), poll_s=0.01)


@pytest.mark.multirank
def test_a_replica_that_waits_can_be_told_to_stop():
    assert run_ranks(2, asked_to) == [75, 75]
