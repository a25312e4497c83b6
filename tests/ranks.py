"""The multi-rank harness: `run_ranks(world, fn, *args)` runs `fn(rank, world, *args)` in real processes over gloo.

Worlds of all sizes share one pool of workers, forked from a server that has already imported torch, transformers and
DeepSpeed, so that a worker costs milliseconds. Workers live on across runs; each run has a fresh process group (a file
store in a temporary folder) that is destroyed after it. `fn` travels as module and name: a module-level function, not
a lambda.

A rank that raises, dies or hangs ends the run: all its workers are killed and the next run forks new ones. A rank that
aborts from C++ is tried once more, with a warning that shows what it wrote: see `ABORTED`.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPO = Path(__file__).resolve().parents[1]
# What workers import, once for all of them; what is not installed is left out. The last one is the slowest import that
# DeepSpeed makes as it trains: torch.compile's.
PRELOAD = ["torch", "torch.distributed.device_mesh", "numpy", "pytest", "hypothesis", "d2o_dist.comm", "tests.models",
           "tests.train.runs", "datasets", "peft", "deepspeed.runtime.zero.muon.original_muon"]  # fmt: skip
DEFAULT_TIMEOUT_S = 60.0
# Tries to connect the ranks of one run.
RENDEZVOUS_ATTEMPTS = 4
# Seen once, amid collectives of a test that passes otherwise: gloo's threads end the process where they cannot raise.
# The first time is a warning, so that it is seen and its words are kept; a second time in a row is a failure.
ABORTED = "was killed by SIGABRT"
GRACE_S = 0.5  # after a first failure, how long to listen for another that explains it


class RankError(AssertionError):
    """A rank failed. Its message holds the traceback of the rank that failed first, then the others'.

    Attributes:
        rank: who failed first.
        error: what it raised, where that could be pickled; None for a death or a hang.
    """

    def __init__(self, message: str, rank: int, error: BaseException | None):
        super().__init__(message)
        self.rank = rank
        self.error = error


def run_ranks(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    fresh: bool = False,
    init: bool = True,
    lost: Sequence[int] = (),
) -> list[Any]:
    """What `fn(rank, world, *args)` returned, by rank; arguments and results are anything picklable, tensors too.

    Args:
        timeout_s: of the whole run, and of each collective in it.
        fresh: new workers, gone afterwards: for code that leaves global state behind (DeepSpeed, registries).
        init: whether torch.distributed is initialised (gloo) around `fn`, with RANK, LOCAL_RANK and WORLD_SIZE set.
        lost: ranks that are expected to die; their result is None, and the other ranks' results are still collected.

    Raises:
        RankError: if a rank raises, dies or does not return in time.
    """
    for attempt in range(RENDEZVOUS_ATTEMPTS):
        try:
            return _POOL.run(world, fn, args, timeout_s, fresh, init, set(lost))
        except RankError as error:
            text = str(error)
            if attempt == 0 and ABORTED in text:
                warnings.warn(f"{fn.__module__}.{fn.__name__} runs a second time: {text}", stacklevel=2)
            # gloo's handshake, when a group is made, now and then loses a connection on a busy machine.
            elif "connectFullMesh failed" not in text or attempt + 1 == RENDEZVOUS_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def start_process(fn: Callable[..., Any], *args: Any) -> multiprocessing.process.BaseProcess:
    """`fn(*args)` in a process of its own, forked from the server; it ends with this process at the latest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=fn, args=args, daemon=True)
    # The server takes its path from the environment: Python 3.11 forgets sys.path when it preloads.
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        process.start()
    return process


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    link: Connection
    stacks: Path  # where it writes its stacks when asked

    def kill(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.link.close()


@dataclass
class _Pool:
    workers: list[_Worker] = field(default_factory=list)
    folder: Path | None = None
    runs: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, world, fn, args, timeout_s, fresh, init, lost) -> list[Any]:
        if getattr(fn, "__qualname__", "") != getattr(fn, "__name__", None):
            raise TypeError(f"{fn} must be a function at the top of a module: ranks import it")
        with self.lock:
            # Those that stay are taken out while they run, so that whatever goes wrong leaves no broken worker behind.
            workers, self.workers = ([], self.workers) if fresh else (self.workers[:world], self.workers[world:])
            try:
                while len(workers) < world:
                    workers.append(self._start())
                self.runs += 1
                store = self.folder / f"store{self.runs}"
                for rank, worker in enumerate(workers):
                    worker.link.send_bytes(
                        pickle.dumps((fn.__module__, fn.__name__, args, rank, world, str(store), timeout_s, init))
                    )
                results = _collect(workers, lost, time.monotonic() + timeout_s)
                if not fresh and not lost:
                    self.workers, workers = workers + self.workers, []
                return results
            finally:
                for worker in workers:
                    worker.kill()

    def _start(self) -> _Worker:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="ranks"))
            atexit.register(self.close)
        here, there = multiprocessing.Pipe()
        stacks = Path(tempfile.mkstemp(dir=self.folder)[1])
        process = start_process(_serve, there, str(stacks))
        there.close()
        return _Worker(process, here, stacks)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


_POOL = _Pool()


def _collect(workers: list[_Worker], lost: set[int], deadline: float) -> list[Any]:
    """Results by rank, or the RankError that says why there are none."""
    results: dict[int, Any] = {}
    failed: dict[int, tuple[str, BaseException | None]] = {}  # in order of arrival
    died: dict[int, str] = {}
    while len(results) + len(failed) + len(died) < len(workers):
        open_ranks = [r for r in range(len(workers)) if r not in results and r not in failed and r not in died]
        # A link reports both a message and, by its end of file, a death.
        ready = wait([workers[r].link for r in open_ranks], max(0.0, deadline - time.monotonic()))
        for rank in open_ranks:
            if workers[rank].link not in ready:
                continue
            try:
                kind, *rest = pickle.loads(workers[rank].link.recv_bytes())
            except (EOFError, ConnectionError):
                workers[rank].process.join(5)
                died[rank] = _cause_of_death(workers[rank].process.exitcode)
                continue
            if kind == "done":
                results[rank] = rest[0]
            else:
                failed[rank] = (rest[0], rest[1] and _load_error(rest[1]))
        if (failed or set(died) - lost) and deadline > time.monotonic() + GRACE_S:
            deadline = time.monotonic() + GRACE_S
        if not ready and time.monotonic() >= deadline:
            break
    unexpected = {rank: how for rank, how in died.items() if rank not in lost}
    missing = [rank for rank in range(len(workers)) if rank not in results and rank not in failed and rank not in died]
    if unexpected or failed or missing:
        raise _explain(workers, unexpected, failed, missing)
    return [results.get(rank) for rank in range(len(workers))]


def _explain(workers, died, failed, missing) -> RankError:
    parts = [f"rank {rank} of {len(workers)} {how}{_last_words(workers[rank])}" for rank, how in died.items()]
    by_text: dict[str, list[str]] = {}
    for rank, (text, _) in failed.items():
        by_text.setdefault(text, []).append(str(rank))
    parts += [f"rank {', '.join(who)} of {len(workers)} raised:\n{text}" for text, who in by_text.items()]
    if not parts:
        for rank in missing:
            if hasattr(signal, "SIGUSR1"):
                os.kill(workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        parts = [
            f"rank {rank} of {len(workers)} did not return in time; it was here:\n{workers[rank].stacks.read_text()}"
            for rank in missing
        ]
    first = next(iter([*died, *failed, *missing]))
    error = failed[first][1] if first in failed and first not in died else None
    return RankError("\n".join(parts), first, error)


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


def _last_words(worker: _Worker) -> str:
    """What a worker that died of a signal had to say: its stack, and above it what the C++ libraries printed."""
    text = worker.stacks.read_text(errors="replace").strip()
    return f"; it wrote:\n{text}" if text else ""


def _load_error(data: bytes) -> BaseException | None:
    try:
        return pickle.loads(data)
    except Exception:  # noqa: BLE001  an exception class may need arguments that its pickle lacks
        return None


# In the workers.


def _serve(link: Connection, stacks: str) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # host names need not resolve
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and pytest ends the workers
    log = open(stacks, "a")  # noqa: SIM115
    # C++ libraries say why they abort on the standard error: it is shown with the failure, not lost among the workers'.
    os.dup2(log.fileno(), 2)
    faulthandler.enable(file=log)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=False)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            task = link.recv_bytes()
        except EOFError:
            return
        link.send_bytes(_run(task))


def _die_with_parent() -> None:
    """End even when blocked in a collective: the main thread cannot see that pytest is gone."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(task: bytes) -> bytes:
    import importlib

    import torch.distributed as dist

    try:
        module, name, args, rank, world, store, timeout_s, init = pickle.loads(task)
        for variable, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            os.environ.pop(variable, None)
            if init:
                os.environ[variable] = str(value)
        fn = getattr(importlib.import_module(module), name)
        if init:
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        answer = pickle.dumps(("done", fn(rank, world, *args)))
        if init and dist.is_initialized():
            dist.destroy_process_group()
        return answer
    except BaseException as error:  # noqa: BLE001  whatever it is, the parent must know
        # The process group stays open until the parent kills this worker: peers fail only for reasons of their own.
        try:
            pickled = pickle.dumps(error)
        except Exception:  # noqa: BLE001
            pickled = None
        return pickle.dumps(("failed", traceback.format_exc(), pickled))
