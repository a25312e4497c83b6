"""The harness itself: errors are the original ones, nobody is left waiting, and the pool recovers."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from d2o_dist.comm import Axis, CollectiveError, Collectives, build_mesh
from tests import ranks
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.multirank


def meet() -> float:
    """A collective with everyone."""
    comm = Collectives(build_mesh(sp=dist.get_world_size()).axis("sp"))
    return comm.all_reduce(torch.ones(3, dtype=torch.float64)).sum().item()


def well(rank, world, tensor):
    return os.getpid(), rank, meet(), tensor + rank


def test_results_come_by_rank_from_workers_that_stay():
    tensor = torch.arange(3, dtype=torch.bfloat16)
    first = run_ranks(3, well, tensor)
    assert [result[1:3] for result in first] == [(rank, 9.0) for rank in range(3)]
    assert all(torch.equal(result[3], tensor + rank) for rank, result in enumerate(first))
    started = time.monotonic()
    second = run_ranks(3, well, tensor)
    assert [result[0] for result in second] == [result[0] for result in first]
    assert {result[0] for result in run_ranks(2, well, tensor)} < {result[0] for result in first}
    assert time.monotonic() - started < 10
    fresh = run_ranks(2, well, tensor, fresh=True)
    assert not {result[0] for result in fresh} & {result[0] for result in first}


def one_raises(rank, world):
    if rank == 1:
        raise KeyError("the original error")
    return meet()


def test_a_rank_that_raises_ends_the_run_with_its_error():
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 3 raised:\n(.|\n)*in one_raises(.|\n)*the original error") as caught:
        run_ranks(3, one_raises)
    assert time.monotonic() - started < 10
    assert caught.value.rank == 1 and isinstance(caught.value.error, KeyError)
    assert "rank 0" not in str(caught.value)  # the others wait without an error of their own, and are ended
    assert [result[2] for result in run_ranks(3, well, torch.ones(1))] == [9.0] * 3


def one_is_killed(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return meet()


def test_a_killed_rank_is_named_first():
    with pytest.raises(RankError, match=r"\Arank 1 of 3 was killed by SIGKILL") as caught:
        run_ranks(3, one_is_killed)
    assert caught.value.rank == 1 and caught.value.error is None
    assert [result[2] for result in run_ranks(3, well, torch.ones(1))] == [9.0] * 3


def abort_until(rank, world, marker, times):
    """Rank 0 aborts as a C++ library does, the first `times` times."""
    if rank == 0:
        marker.write_bytes(marker.read_bytes() + b"." if marker.exists() else b".")
        if marker.stat().st_size <= times:
            os.write(2, b"terminate called: the reason\n")
            os.abort()
    return meet()


def test_an_abort_is_shown_and_tried_once_more(tmp_path):
    died = "(?s)rank 0 of 2 was killed by SIGABRT.*the reason"
    with pytest.warns(UserWarning, match=died + ".*in abort_until"):
        assert run_ranks(2, abort_until, tmp_path / "once", 1) == [6.0, 6.0]
    with pytest.warns(UserWarning), pytest.raises(RankError, match=died):
        run_ranks(2, abort_until, tmp_path / "twice", 2)
    assert (tmp_path / "twice").stat().st_size == 2


def outlive(rank, world):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(CollectiveError, match=rf"all_reduce over sp failed on its rank {rank} of 3 .*peer"):
        meet()
    return time.monotonic() - started


def test_peers_of_a_killed_rank_raise_at_once():
    waited = run_ranks(3, outlive, lost=[1])
    assert waited[1] is None and max(waited[0], waited[2]) < 10


def too_late(rank, world):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    comm = Collectives(Axis("sp", rank, (0, 1), group))
    if rank == 0:
        with pytest.raises(CollectiveError, match="(?s)ring_shift over sp.*come too late.*[Tt]imed out"):
            comm.ring_shift([torch.ones(2)]).wait()
    dist.barrier()


def test_a_late_peer_raises_after_the_timeout_of_the_group():
    run_ranks(2, too_late)


def one_hangs(rank, world):
    if rank == 1:
        time.sleep(60)
    return rank


def test_a_hang_is_ended_and_located():
    with pytest.raises(RankError, match="rank 1 of 2 did not return in time(.|\n)*in one_hangs"):
        run_ranks(2, one_hangs, timeout_s=2)


def surroundings(rank, world):
    return dist.is_initialized(), *(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def test_surroundings_are_those_of_a_launcher_or_of_none():
    assert run_ranks(2, surroundings) == [(True, "0", "0", "2"), (True, "1", "1", "2")]
    assert run_ranks(2, surroundings, init=False) == [(False, None, None, None)] * 2


def all_raise(rank, world):
    raise KeyError("on all ranks" if rank < 3 else "on the last")


def test_the_same_error_on_many_ranks_is_shown_once():
    with pytest.raises(RankError) as caught:
        run_ranks(4, all_raise)
    text = str(caught.value)
    assert text.count("on all ranks'") == text.count("on the last'") == 1 and text.count(" of 4 raised") == 2


def test_functions_that_ranks_cannot_import_are_refused():
    with pytest.raises(TypeError, match="must be a function at the top of a module"):
        run_ranks(1, lambda rank, world: None)


def test_no_process_outlives_the_pool(monkeypatch):
    pool = ranks._Pool()
    monkeypatch.setattr(ranks, "_POOL", pool)
    pids = [result[0] for result in run_ranks(2, well, torch.ones(1))]
    folder = pool.folder
    pool.close()
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
