"""Jobs that are killed, stopped and started again, in real processes: the output of one that ran through."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.engine.tiny import make_folder
from tests.launch.test_infer import REPO, TORCHRUN, WORDS

pytestmark = pytest.mark.multirank
PYTHON = [sys.executable]
# The shapes that a job goes on with.
ALONE, DP, SP, TP = ([], ["--dp", "2"], ["--sp", "2"], ["--tp", "2"])
SAMPLED = ["sampling.temperature=0.8", "sampling.seed=5", "parallel.tp_engine=transformers", "device=cpu"]
# A step takes a moment, so that there is time to end it.
SLOW = """
import os, sys, time
from d2o_dist.cli.infer import main
from d2o_dist.comm import run_guarded
from d2o_dist.engine import session

real, pause = session.Session.decode, float(os.environ["PAUSE"])

def decode(self, *args):
    time.sleep(pause)
    return real(self, *args)

session.Session.decode = decode
raise SystemExit(run_guarded(main))
"""


class Job:
    """A folder with a model and prompts, and commands that all have the same output.

    Args:
        bad: whether the last row has an error.
    """

    def __init__(self, folder, model, num_rows, new_tokens, pause, *, bad=True):
        self.folder, self.output, self.num_rows = folder, folder / "out.jsonl", num_rows
        shutil.copytree(model, folder / "model")
        text = " ".join(WORDS * 3)
        rows = [{"id": f"r{n}", "prompt": text[n % 7 : 20 + 31 * n % 90]} for n in range(num_rows - bad)]
        rows += [{"id": "bad"}] * bad
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "slow.py").write_text(SLOW)
        self._fields = [*SAMPLED, f"sampling.max_new_tokens={new_tokens}", "d2o.keep_ratio=0.4",
                        "d2o.budget.min_layer_tokens=8", "max_batch_size=4"]  # fmt: skip
        self._pause = pause

    def start(self, shape=(), *more, restarts=None, output="out.jsonl") -> subprocess.Popen:
        launcher = PYTHON
        if shape or restarts is not None:
            launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", f"--max-restarts={restarts or 0}"]
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PAUSE": str(self._pause)}
        args = [*shape, "--model=model", "--prompts=p.jsonl", f"--output={output}", *self._fields, *more]
        pipe = subprocess.PIPE
        # A group of its own, so that all of it can be killed, as a machine that goes down does.
        return subprocess.Popen([*launcher, "slow.py", *args], cwd=self.folder, env=env, stdout=pipe, stderr=pipe,
                                text=True, start_new_session=True)  # fmt: skip

    def run(self, shape=(), *more, **how) -> tuple[int, str]:
        process = self.start(shape, *more, **how)
        _, err = process.communicate(timeout=400)
        return process.returncode, err

    def rows_there(self) -> set[int]:
        """Indices of the rows that are in a file of the job."""
        found, lines = set(), []
        for file in self.folder.glob("out.jsonl*"):
            with suppress(FileNotFoundError):  # it may have become another one since it was listed
                lines += file.read_bytes().split(b"\n")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # half a line, or another file
                found.add(json.loads(line)["index"])
        return found

    def wait_for_rows(self, process, count) -> None:
        ends = time.monotonic() + 400
        while len(self.rows_there()) < count and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.02)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith("out")
                      and not path.name.endswith(".trace"))  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


def kill_again_and_again(job: Job, shapes, seed: int) -> None:
    """One kill a shape, by SIGKILL of everything and by SIGTERM in turn, after some rows; then to the end."""
    status, err = job.run(output="whole.jsonl")
    assert status == 1 and f"rows: {job.num_rows - 1} ok, 1 failed" in err, err
    chance = random.Random(seed)
    for number, shape in enumerate(shapes):
        held = job.rows_there()
        process = job.start(shape)
        job.wait_for_rows(process, len(held) + chance.randint(1, 3))
        time.sleep(chance.random() * 0.2)
        if number % 2:
            process.send_signal(signal.SIGTERM)
        else:
            kill_all(process.pid)
        _, err = process.communicate(timeout=400)
        assert process.returncode != 0
        if number % 2:
            assert err.count("SIGTERM: the running step ends") == 1 and "infer.py: stopped (SIGTERM); " in err, err
            assert shape or process.returncode == 75
        assert job.rows_there() > held
    status, err = job.run()
    assert status == 1 and f"rows: {job.num_rows - 1} ok, 1 failed; " in err and "by an earlier run" in err, err
    assert job.output.read_bytes() == (job.folder / "whole.jsonl").read_bytes()
    assert job.files() == ["out.jsonl", "out.jsonl.job"]


@pytest.mark.slow
def test_a_job_of_300_rows_that_is_killed_again_and_again(model, tmp_path):
    """Once, or as often as D2O_KILLS says, up to ten: each kill is a start of all ranks."""
    shapes = [DP, SP, TP, ALONE, ALONE, DP, SP, TP, DP, ALONE]
    kills = int(os.environ.get("D2O_KILLS", 1))
    kill_again_and_again(Job(tmp_path, model, 300, 6, pause=0.02), shapes[:kills], seed=1)


@pytest.mark.parametrize("shape", [pytest.param(DP, marks=pytest.mark.slow), SP], ids=["dp", "sp"])
def test_one_rank_that_is_told_to_stop_stops_them_all(model, tmp_path, shape):
    """SIGUSR1 to the second rank alone, as nobody promises that all get it; no rank hangs, and each ends with 75."""
    job = Job(tmp_path, model, 24, 30, pause=0.05)
    process = job.start(shape)
    job.wait_for_rows(process, 2)
    (worker,) = [pid for pid in children(process.pid) if "\0RANK=1\0" in environ(pid)]
    os.kill(worker, signal.SIGUSR1)
    _, err = process.communicate(timeout=400)
    assert "rows are done and stay: the same command goes on" in err and "status 75: " in err, err
    assert "Traceback" not in err.split("torch/distributed")[0], err
    assert 1 < len(job.rows_there()) < 24


@pytest.mark.slow
def test_torchrun_starts_a_job_again_that_goes_on(model, tmp_path):
    """A rank is killed; with overwrite=true, which counts at the first start only. All rows are good: with status 1
    torchrun would start the job as often as it may.

    One restart is enough, but gloo's handshake may lose a connection on a busy machine: see `tests.ranks`.
    """
    job = Job(tmp_path, model, 12, 10, pause=0.05, bad=False)
    whole, process = job.start(output="whole.jsonl"), job.start(SP, "overwrite=true", "parallel.timeout=30", restarts=4)
    job.wait_for_rows(process, 3)
    (worker,) = [pid for pid in children(process.pid) if "\0RANK=1\0" in environ(pid)]
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "by an earlier run" in err, err
    whole.communicate(timeout=400)
    assert job.output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def kill_all(pid: int) -> None:
    """A process and all below it, as a machine that goes down does; torchrun's workers have sessions of their own."""
    found = [pid]
    for one in found:
        found += children(one)
    for one in found:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def environ(pid: int) -> str:
    return "\0" + open(f"/proc/{pid}/environ").read()
