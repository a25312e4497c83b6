"""Faults under two torchrun agents with a rank each, in place of two machines: `python -m tests.launch.two_agents`.

Prints for each fault both agents' statuses, the seconds from the fault to their end, and what became of the rows; then
the same of the next run. It takes some minutes, so it is no test. A line `HANGS` is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.engine.tiny import make_folder
from tests.launch.test_infer import REPO, TORCHRUN, WORDS
from tests.launch.test_resume import children
from tests.ports import free_port

TIMEOUT_S = 8
# The second rank fails while it reads row 2; a decode step takes a moment, so that there is time for signals.
SCRIPT = """
import os, pathlib, signal, sys, time, torch
from d2o_dist.cli.infer import main
from d2o_dist.comm import run_guarded
from d2o_dist.engine import runner, session

how, last, reads = sys.argv.pop(1), os.environ["RANK"] == "1", []
read, decode, try_room, load = (
    runner.InferRunner.read, session.Session.decode, runner.try_room, runner.loading.load_model
)

def fault(kind):
    if not last or how != kind or reads[-1] != 2:
        return False
    pathlib.Path("failed_at").write_text(str(time.time()))
    return True

def noted(self, requests):
    reads.append(requests[0].index)
    return read(self, requests)

def slowly(self, *args):
    time.sleep(0.15 if how == "wait" else 0)
    return decode(self, *args)

def room(*args):
    if fault("memory"):
        raise torch.OutOfMemoryError("no room")
    try_room(*args)

def forward(module, args, out):
    if fault("raise"):
        raise ValueError("the original error")
    if fault("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    return out * torch.nan if fault("nan") else out

def hooked(*args):
    adapter = load(*args)
    adapter.model.model.layers[0].mlp.register_forward_hook(forward)
    return adapter

runner.InferRunner.read, session.Session.decode, runner.try_room = noted, slowly, room
runner.loading.load_model = hooked
raise SystemExit(run_guarded(main))
"""
FIELDS = ["--model=model", "--prompts=p.jsonl", "--output=out.jsonl", "device=cpu", "parallel.tp_engine=transformers",
          "sampling.max_new_tokens=30", "d2o.preset=paper", "d2o.keep_ratio=0.6", "d2o.budget.min_layer_tokens=8",
          "max_batch_size=2"]  # fmt: skip


def to_rank(number: int) -> Callable[[list[subprocess.Popen]], None]:
    """A signal to the second rank alone."""
    return lambda agents: os.kill(children(agents[1].pid)[0], number)


def kill(agents: list[subprocess.Popen]) -> None:
    """SIGKILL of agents and their ranks, as machines that go down do."""
    for pid in [pid for agent in agents for pid in (agent.pid, *children(agent.pid))]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# By name, what is done to the agents once two rows are there; None: the script does it.
FAULTS: dict[str, Callable[[list[subprocess.Popen]], None] | None] = {
    **dict.fromkeys(("raise", "memory", "nan", "kill", "stop")),
    "term": lambda agents: agents[1].terminate(),
    "usr1": to_rank(signal.SIGUSR1),
    "machine": lambda agents: kill(agents[1:]),
    "machines": kill,
}


def start(folder: Path, axis: str, how: str) -> list[subprocess.Popen]:
    """Both agents."""
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    timeout = TIMEOUT_S if how == "stop" else 120
    args = ["script.py", how, f"--{axis}=2", f"parallel.timeout={timeout}", *FIELDS]
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*TORCHRUN, *where, f"--node-rank={node}", *args], cwd=folder, env=env, stdout=subprocess.DEVNULL,
            stderr=(folder / f"agent{node}").open("w"),
        )
        for node in (0, 1)
    ]  # fmt: skip


def records(folder: Path) -> dict[int, dict]:
    """By index, the latest."""
    found = {}
    for path in folder.glob("out.jsonl*"):
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found[record["index"]] = record
    return found


def end(folder: Path, agents: list[subprocess.Popen], began: float | None) -> str:
    """What became of both agents, and of the rows."""
    for agent in agents:
        try:
            agent.wait(300)
        except subprocess.TimeoutExpired:
            kill(agents)
            return "HANGS"
    began = float((folder / "failed_at").read_text()) if began is None else began
    rows = records(folder)
    failed = "; ".join(f"row {index}: {row['error'][:70]}" for index, row in rows.items() if row["error"])
    good = sum(row["error"] is None for row in rows.values())
    return f"status {[agent.returncode for agent in agents]}, {time.time() - began:.1f} s, {good} rows ok; {failed}"


def try_fault(folder: Path, axis: str, name: str) -> None:
    """The fault, and the run after it."""
    for path in folder.glob("out.jsonl*"):
        path.unlink()
    act, began = FAULTS[name], None
    agents = start(folder, axis, name if act is None else "wait")
    if act is not None:
        while len(records(folder)) < 2 and agents[0].poll() is None:
            time.sleep(0.05)
        began = time.time()
        act(agents)
    elif name == "stop":  # nobody ends the stopped rank but who starts the job again
        agents[0].wait(300)
        kill(agents[1:])
    print(f"{axis} {name}: {end(folder, agents, began)}", flush=True)
    agents = start(folder, axis, "none")
    print(f"    the next run: {end(folder, agents, time.time())}", flush=True)


def main() -> None:
    """Try the faults that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.launch.two_agents", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all of them by default")
    parser.add_argument("--axis", default="sp", choices=("sp", "tp", "dp"), help="what the two ranks share (sp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_folder(folder / "model")
        rows = [{"id": n, "prompt": " ".join(WORDS * 2)[: 20 + 31 * n % 90]} for n in range(6)]
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "script.py").write_text(SCRIPT)
        for name in args.faults or FAULTS:
            try_fault(folder, args.axis, name)


if __name__ == "__main__":
    sys.exit(main())
