"""Starting from each launcher's variables, and ending when a rank fails."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from d2o_dist.comm import (
    CollectiveError,
    Collectives,
    Launch,
    Mpu,
    build_mesh,
    destroy,
    init_distributed,
    launch,
    read_environment,
    run_guarded,
    watch,
)
from tests.ports import free_port
from tests.ranks import run_ranks

REPO = Path(__file__).resolve().parents[2]
multirank = pytest.mark.multirank


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch(3, 4, 1, "environment")),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
            Launch(5, 8, 1, "slurm"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Launch()),  # a batch script without srun
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch(1, 2, 1, "openmpi"),
        ),
        # torchrun inside a Slurm step: the inner launcher counts.
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            Launch(1, 2, 1, "environment"),
        ),
    ],
)
def test_each_launcher_is_read(env, expected):
    assert read_environment(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK \(2\) must be in \[0, WORLD_SIZE \(2\)\)"),
    ],
)
def test_contradictory_variables_are_refused(env, message):
    with pytest.raises(ValueError, match=message):
        read_environment(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[007-009,012],x1", "gpu007"), ("n1,n2", "n1"), ("n1", "n1"), ("a-[3]", "a-3"), ("r[1-2]c[4-5]", "r1c4")],
)
def test_first_host_of_a_node_list(nodes, host):
    assert launch.first_host(nodes) == host


def test_slurm_variables_become_those_of_torchrun():
    env = {"SLURM_STEP_NODELIST": "gpu[2-3]", "SLURM_JOB_ID": "123456"}
    launch._export(Launch(1, 4, 1, "slurm"), env)
    assert {name: env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
    }
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu2", str(29500 + 456))
    with pytest.raises(ValueError, match="MASTER_ADDR must name the host of rank 0; this is rank 1 of 4"):
        launch._export(Launch(1, 4, 1, "openmpi"), {})


def test_one_process_without_a_launcher_starts_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed() == Launch()
    assert not dist.is_initialized() and destroy()


def join(rank, world, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    first = init_distributed("gloo", timeout_s=30)
    assert init_distributed("gloo") == first == Launch(rank, world, rank, "environment")
    assert dist.get_backend() == "gloo" and dist.get_world_size() == world
    total = Collectives(build_mesh(sp=world).axis("sp")).all_reduce(torch.tensor(rank))
    assert destroy() and not dist.is_initialized() and destroy()
    return int(total)


@multirank
@pytest.mark.parametrize("world", [1, 2])
def test_join_and_leave(world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_ranks(world, join, port, init=False, fresh=True) == [world * (world - 1) // 2] * world


def timeouts(rank, world, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_distributed("gloo", timeout_s=77)
    mesh = build_mesh(sp=2, tp=2)
    groups = [dist.group.WORLD, mesh.axis("sp").group, mesh.axis("tp").group, Mpu(mesh).get_data_parallel_group()]
    found = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    assert destroy()
    return found


@multirank
def test_groups_of_a_mesh_wait_as_long_as_the_job():
    assert run_ranks(4, timeouts, free_port(), init=False, fresh=True) == [{77.0}] * 4


def slow_to_connect(rank, world, port, said):
    """Rank 1 meets rank 0, and comes to the first connections three seconds later, in which it looks at nothing."""
    sys.stderr = (Path(said) / str(rank)).open("w", buffering=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    real = dist.init_process_group

    def init_process_group(*args, **kwargs):
        time.sleep(3 * rank)
        real(*args, **kwargs)

    if rank == 1:
        launch.Watch = Mock()
    with patch.object(dist, "init_process_group", init_process_group), patch.object(watch, "NOTICE_S", 1.0):
        launch.init_distributed("gloo", timeout_s=60)
    destroy()


@multirank
def test_ranks_that_wait_for_the_first_connections_say_for_whom(tmp_path):
    run_ranks(2, slow_to_connect, free_port(), str(tmp_path), init=False, fresh=True)
    assert (tmp_path / "1").read_text() == ""
    said = (tmp_path / "0").read_text()
    assert said.startswith("[rank 0 of 2] has waited 1 s for rank 1 in ") and said.count("\n") == 1


def guarded(rank, world, folder):
    sys.stderr = (Path(folder) / str(rank)).open("w")
    launch.SECONDARY_DELAY_S = 0.1
    launch.traces_beside(Path(folder) / "out")
    comm = Collectives(build_mesh(sp=world).axis("sp"))

    def main():
        if rank == 1:
            dist.destroy_process_group = lambda: time.sleep(60)  # as if it waited for peers
            raise ValueError("the original error")
        comm.all_reduce(torch.ones(1))

    if rank == 2:
        with pytest.raises(CollectiveError):
            main()
        return "released"
    return run_guarded(main)


@multirank
def test_a_guarded_rank_that_raises_ends_at_once_and_releases_its_peers(tmp_path):
    started = time.monotonic()
    assert run_ranks(3, guarded, str(tmp_path), lost=[0, 1]) == [None, None, "released"]
    assert time.monotonic() - started < 20
    first, second = (tmp_path / "1").read_text(), (tmp_path / "0").read_text()
    assert first.startswith("[rank 1 of 3] failed: ValueError: the original error; traceback: ")
    assert second.startswith("[rank 0 of 3] stopped because a peer did, whose error counts: ")
    assert first.count("\n") == second.count("\n") == 1
    for said, end in ((first, "ValueError: the original error\n"), (second, "\n")):
        trace = Path(said.split("; traceback: ")[1].strip())
        assert trace.parent == tmp_path and trace.name.startswith("out.")
        assert trace.read_text().startswith("Traceback") and trace.read_text().endswith(end)


def stuck(rank, world):
    dist.destroy_process_group = lambda: time.sleep(60)
    assert not destroy(timeout_s=0.2)
    launch.destroy = lambda: False
    run_guarded(lambda: 0)


@multirank
def test_a_process_group_that_does_not_close_cannot_keep_a_rank():
    assert run_ranks(1, stuck, lost=[0]) == [None]


@pytest.mark.parametrize("status", [None, 0, 3])
def test_a_single_process_returns_its_status(status):
    assert run_guarded(lambda: status) == (status or 0)


def test_a_single_process_raises_as_usual():
    def main():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_guarded(main)


JOB = """
import os, pathlib, signal, sys, time, torch
from d2o_dist.comm import Collectives, build_mesh, init_distributed, run_guarded

def main():
    rank = init_distributed("gloo", timeout_s=300).rank
    comm = Collectives(build_mesh(sp=2).axis("sp"))
    assert comm.all_reduce(torch.tensor(rank)).item() == 1
    if rank == 1:
        pathlib.Path("failed_at").write_text(str(time.time()))
    if rank == 1 and sys.argv[-1] == "raise":
        raise ValueError("the original error")
    if rank == 1 and sys.argv[-1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(torch.tensor(rank))
    return 0

raise SystemExit(run_guarded(main))
"""
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]


@multirank
@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_real_job_ends_within_a_minute(tmp_path, how):
    """Of DeepSpeed's launcher; `tests/launch` has those of torchrun."""
    pytest.importorskip("deepspeed")
    launcher = [*DEEPSPEED, "--master_port", free_port()]  # its default is the same for every job
    script = tmp_path / "job.py"
    script.write_text(JOB)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    # Starting may take long on a busy machine; what is promised is the time from the failure to the end.
    ended = subprocess.run(
        [*launcher, str(script), how], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    said = ended.stdout + ended.stderr
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 60, said
    assert ended.returncode != 0, said
    if how == "raise":
        assert said.count("[rank 1 of 2] failed: ValueError: the original error; traceback: ") >= 1
        assert "[rank 0 of 2]" not in said
