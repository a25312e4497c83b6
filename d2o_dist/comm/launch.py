"""Starting and ending a job of many ranks, under torchrun, the DeepSpeed launcher, Slurm or Open MPI.

    def main() -> int:
        launch = init_distributed()
        ...
        return 0

    raise SystemExit(run_guarded(main))

What is promised: a rank that raises prints its error in one line, which names a file with the traceback, and ends at
once, whatever its peers or its process group are doing. The launcher then ends the others (torchrun and deepspeed do so
when one exits with a status other than 0; under Slurm use `srun --kill-on-bad-exit=1`). Peers that sit in a gloo
collective with it are released by its closed connection, those with NCCL by the launcher or, at the latest, by the
timeout.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from d2o_dist.comm.collectives import in_one_line
from d2o_dist.comm.watch import Watch

DEFAULT_TIMEOUT_S = 1800
# How long a rank that only lost its peer waits before it reports that, so that the first error is seen first and,
# since the launcher ends this rank meanwhile, mostly alone.
SECONDARY_DELAY_S = 5.0
# How long a rank waits at the start before it says for whom.
MEET_NOTICE_S = 10.0
_LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited", re.I)


class RankError(ValueError):
    """Wrong on this rank and not on all of its machine: where one rank speaks for the others, this one must itself."""


# The file that tracebacks lie beside, if one was named.
_BESIDE: list[Path] = []
_WATCHES: list[Watch] = []


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process. Without one: rank 0 of 1.

    Attributes:
        rank, world_size: among all processes.
        local_rank: among those of this machine.
        launcher: "environment" (torchrun, deepspeed), "slurm", "openmpi" or "none".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = "none"

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def read_environment(env: Mapping[str, str] = os.environ) -> Launch:
    """Which rank this is, from RANK and WORLD_SIZE, else from Open MPI's or Slurm's variables.

    Slurm counts only inside a job step (srun): a plain `python` in a batch script is one process, however many tasks
    the job has.

    Raises:
        ValueError: if only one of RANK and WORLD_SIZE is set, or they do not fit.
    """
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        have, lack = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise ValueError(f"{have} is set and {lack} is not: start with torchrun, deepspeed or srun, or unset {have}")
    for launcher, rank, world, local_rank in (
        ("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in env and world in env:
            found = Launch(int(env[rank]), int(env[world]), int(env.get(local_rank, 0)), launcher)
            if not 0 <= found.rank < found.world_size:
                raise ValueError(f"{rank} ({found.rank}) must be in [0, {world} ({found.world_size}))")
            return found
    return Launch()


def num_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often torchrun or Slurm has started this job again."""
    return sum(int(env.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def init_distributed(backend: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> Launch:
    """Join the default process group, if there is more than this process or a launcher was used.

    Does nothing more if the group exists already (DeepSpeed or an earlier call made it). The variables of torchrun are
    set from Slurm's or Open MPI's, as DeepSpeed and transformers read them.

    Args:
        backend: "nccl" or "gloo"; None: nccl where there is CUDA.
        timeout_s: how long a collective waits for a peer before it raises. For all groups made from this one.

    Raises:
        ValueError: on contradictory variables, no MASTER_ADDR, or ranks that do not come.
        RankError: more ranks on a machine than GPUs; on those that have none.
    """
    launch = read_environment()
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if launch.launcher == "none":
        return launch
    if "nccl" in backend:
        gpus = torch.cuda.device_count()
        if launch.local_rank >= gpus:
            raise RankError(
                f"local rank ({launch.local_rank}) must be below the number of visible GPUs ({gpus}): "
                "start one rank a GPU, and show every rank all GPUs of its machine (Slurm: --gpus-per-node, not "
                "--gpus-per-task), or pass backend gloo"
            )
        torch.cuda.set_device(launch.local_rank)
    if not dist.is_initialized():
        _export(launch, os.environ)
        store = _meet(launch, timeout_s) if launch.world_size > 1 else None
        if store is not None:  # the first connections are waited for, too
            _WATCHES.append(Watch(store, launch.rank, launch.world_size, timeout_s))
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=launch.device if backend == "nccl" else None,
        )
    return launch


def _meet(launch: Launch, timeout_s: float, env: Mapping[str, str] = os.environ) -> dist.Store:
    """The job's store, once all ranks have come to it. Of those that wait long the first says for whom.

    Raises:
        ValueError: some do not come within `timeout_s`.
    """
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, which may start the ranks again
    prefix = f"d2o_dist/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    serves, store, began = launch.rank == 0 and not served, None, time.monotonic()
    for patience_s in (min(MEET_NOTICE_S, timeout_s / 2), timeout_s):
        try:
            if store is None:
                rest = timedelta(seconds=began + patience_s - time.monotonic())
                tcp = dist.TCPStore(host, port, None, serves, rest, wait_for_workers=False, multi_tenant=True)
                tcp.set_timeout(timedelta(seconds=timeout_s))
                store = dist.PrefixStore(prefix, tcp)
                store.set(str(launch.rank), "")
                if store.add("met", 1) == launch.world_size:
                    store.set("all", "")
            while time.monotonic() < began + patience_s:
                if store.check(["all"]):
                    return store
                time.sleep(0.1)
        except dist.DistError:
            if store is None and serves:
                raise  # the port is taken
        left = [0] if store is None else [rank for rank in range(launch.world_size) if not store.check([str(rank)])]
        present = [launch.rank] if store is None else [rank for rank in range(launch.world_size) if rank not in left]
        who = f"{len(left)} of {launch.world_size} ranks ({', '.join(map(str, left[:8]))}{', ...' * (len(left) > 8)})"
        if left and patience_s < timeout_s and launch.rank == present[0]:
            hint = "; Slurm counts them in this step: srun starts all, without SLURM_PROCID it is one process"
            sys.stderr.write(
                f"[rank {launch.rank} of {launch.world_size}] waits for {who} at {host}:{port}"
                f"{hint if launch.launcher == 'slurm' else ''}\n"
            )
    raise ValueError(f"{who} did not come to {host}:{port} in {timeout_s:.0f} s")


def _export(launch: Launch, env: MutableMapping[str, str]) -> None:
    """Set what torch's env:// and DeepSpeed read, where the launcher did not."""
    if launch.launcher == "slurm" and "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if launch.world_size == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")  # any free one: nobody else has to find it
    if not env.get("MASTER_ADDR"):
        raise ValueError(f"MASTER_ADDR must name the host of rank 0; this is rank {launch.rank} of {launch.world_size}")
    # Ranks of one job must agree on a port, and two jobs on one machine should differ. Below 32768, where systems begin
    # to give ports to whoever asks for any; above 29500, which is the default of other launchers.
    job = int(env.get("SLURM_JOB_ID", 0)) if launch.launcher == "slurm" else 0
    env.setdefault("MASTER_PORT", str(29500 + job % 3000))
    env.setdefault("RANK", str(launch.rank))
    env.setdefault("WORLD_SIZE", str(launch.world_size))
    env.setdefault("LOCAL_RANK", str(launch.local_rank))


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "gpu[007-009,012],x1" -> "gpu007"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodelist)[0])


def destroy(timeout_s: float = 10.0) -> bool:
    """Leave all process groups. False if it takes longer than `timeout_s`: peers gone, a collective under way."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    while _WATCHES:
        _WATCHES.pop().stop()
    worker = threading.Thread(target=dist.destroy_process_group, daemon=True)
    worker.start()
    worker.join(timeout_s)
    return not worker.is_alive()


def run_guarded(main: Callable[[], int | None]) -> int:
    """Run `main` so that its end is this process's end: returns its status, or ends the process if it raises.

    One process by itself is left to Python: errors propagate. As one rank of many, an error is a line with the rank;
    its traceback is in a file (`traces_beside`), and the line in torchrun's summary. The process ends with status 1
    without any clean-up that could wait for peers: no destructors, no exit handlers. So close files with `with`.
    """
    try:
        status = main() or 0
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        rank, world = _who()
        if world == 1:
            destroy()
            raise
        if code:
            try:
                # With a number, whoever raised it has said why.
                if not (isinstance(error, SystemExit) and isinstance(code, int)):
                    _report(error, rank, world)
            finally:
                _exit_now(code if isinstance(code, int) else 1)
        status = 0
    rank, world = _who()
    if status and world > 1:
        tell_launcher(f"status {status}: see what rank 0 said")
    if not destroy():
        print(f"[rank {rank}] left without its peers: the process group did not close", file=sys.stderr)
        _exit_now(status)
    return status


def _who() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        launch = read_environment()
    except ValueError:
        return 0, 1
    return launch.rank, launch.world_size


def traces_beside(path: str | Path | None) -> None:
    """From now on tracebacks lie beside this file; None: where temporary files do."""
    _BESIDE[:] = [] if path is None else [Path(path)]


def _report(error: BaseException, rank: int, world: int) -> None:
    said = in_one_line(error)
    line = f"[rank {rank} of {world}] failed: {type(error).__name__}: {said}"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        time.sleep(SECONDARY_DELAY_S)
        line = f"[rank {rank} of {world}] stopped because a peer did, whose error counts: {said}"
    line += f"; traceback: {_keep_trace(error, rank)}"
    sys.stderr.write(line + "\n")  # one write, so that ranks do not mix their lines
    if isinstance(error, Exception):
        tell_launcher(line)


def _keep_trace(error: BaseException, rank: int) -> str:
    """The file that now holds the traceback; the traceback itself where no file can be made."""
    text = "".join(traceback.format_exception(error))
    for folder, name in (*((path.parent, path.name) for path in _BESIDE), (None, "d2o_dist")):
        try:
            file, path = tempfile.mkstemp(f".rank{rank}.trace", f"{name}.", folder)
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
            return path
        except OSError:
            continue
    return text


def tell_launcher(line: str) -> None:
    """What torchrun's own report, which comes last, shows of this rank if its status is not 0."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:  # it was said on standard error, too
            json.dump({"message": line, "timestamp": int(time.time())}, file)


def _exit_now(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # whoever read them is gone
    finally:
        os._exit(status)
