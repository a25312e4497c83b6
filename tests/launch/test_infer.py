"""`launch/infer.py` under each launcher: one file, the same text; and how a job ends whose rank fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.tiny import make_folder
from tests.ports import free_port
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "launch" / "infer.py"
WORDS = "the quick brown fox jumps over the lazy dog and folds the rest into a cache".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FIELDS = ["--model", "model", "--prompts", "p.jsonl", "device=cpu", "max_batch_size=2",
          "d2o.budget.min_layer_tokens=8", "d2o.keep_ratio=0.4"]  # fmt: skip
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("job")
    make_folder(folder / "model")
    rows = [{"id": n, "prompt": " ".join(WORDS * 2)[: 20 + 31 * n % 90]} for n in range(6)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(folder, launcher, *args, script=SCRIPT) -> subprocess.Popen:
    """The script under a launcher, with the folder's model and prompts."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), *args, *FIELDS]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def texts(folder, name) -> list[str]:
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(6)) and not any(record["error"] for record in records)
    return [record["text"] for record in records]


@pytest.fixture(scope="module")
def alone(job):
    status, out, err = finish(start(job, [sys.executable], "--output", "alone.jsonl", "sampling.max_new_tokens=20"))
    assert status == 0 and out == "" and "rows: 6 ok" in err
    return texts(job, "alone.jsonl")


def test_torchrun_gives_the_text_of_one_process_and_one_rank_speaks(job, alone):
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    args = ["--output", "two.jsonl", "--sp", "2", "--trace", "trace", "sampling.max_new_tokens=20"]
    status, out, err = finish(start(job, launcher, *args))
    assert status == 0, err
    assert texts(job, "two.jsonl") == alone
    assert out == "" and err.count("rows: 6 ok") == 1 and err.count("all_gather") >= 1
    for rank in (0, 1):
        traffic = json.loads((job / "trace" / f"traffic-rank{rank}.json").read_text())
        assert traffic["sp"] == [rank, 2] and set(traffic["traffic"]) >= {"prefill", "finalize", "decode"}
        assert "traceEvents" in json.loads((job / "trace" / f"decode-rank{rank}.json").read_text())


def test_deepspeed_gives_the_text_of_one_process(job, alone):
    pytest.importorskip("deepspeed")
    args = ["--output", "deepspeed.jsonl", "--tp", "2", "sampling.max_new_tokens=20"]
    status, _, err = finish(start(job, [*DEEPSPEED, "--master_port", free_port()], *args))
    assert status == 0, err
    assert texts(job, "deepspeed.jsonl") == alone and err.count("rows: 6 ok") == 1


def test_two_agents_as_two_nodes(job, alone):
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    args = ["--output", "nodes.jsonl", "--dp", "2", "sampling.max_new_tokens=20"]
    nodes = [start(job, [*TORCHRUN, *where, "--node-rank", str(rank)], *args) for rank in (0, 1)]
    ends = [finish(node) for node in nodes]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert texts(job, "nodes.jsonl") == alone
    assert "rows: 6 ok" in ends[0][2] and "rows:" not in ends[1][2]


FAIL = """
import os, pathlib, signal, sys, time
from d2o_dist.cli.infer import main
from d2o_dist.comm import run_guarded
from d2o_dist.engine import session

real, how, seen = session.Session.decode, sys.argv.pop(1), []

def decode(self, *args):
    seen.append(self)
    # In the second batch: the first one is written by then.
    if os.environ["RANK"] == "1" and self is not seen[0]:
        pathlib.Path("failed_at").write_text(str(time.time()))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the original error")
    return real(self, *args)

session.Session.decode = decode
raise SystemExit(run_guarded(main))
"""


def forked(rank, world, job, said, port, argv):
    """The script as a rank, without a launcher: forked, where all that it imports is there."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(job)
    sys.argv, sys.stderr = ["fail.py", *argv], (Path(said) / f"said{rank}").open("w", buffering=1)
    try:
        exec(FAIL, {})
    except SystemExit as end:
        os._exit(end.code)


def fail_in_the_second_batch(job, tmp_path, how, *, launched: bool) -> tuple[str, list[dict], float]:
    """What was said, the records, and seconds from the fault to the end. launched: by torchrun."""
    (job / "failed_at").unlink(missing_ok=True)
    args = [how, "--output", str(tmp_path / "out.jsonl"), "--sp", "2", "sampling.max_new_tokens=20"]
    if launched:
        script = tmp_path / "fail.py"
        script.write_text(FAIL)
        launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
        status, _, err = finish(start(job, launcher, *args, script=script))
        assert status != 0, err
    else:
        # Neither returns: the pool of ranks sees both die.
        options = {"init": False, "fresh": True, "lost": [0, 1], "timeout_s": 200}
        assert run_ranks(2, forked, str(job), str(tmp_path), free_port(), [*args, *FIELDS], **options) == [None, None]
        err = "".join((tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    seconds = time.time() - float((job / "failed_at").read_text())
    # A later record of a row is that of a later try.
    lines = map(json.loads, filter(None, (tmp_path / "out.jsonl").read_text().splitlines()))
    return err, list({record["index"]: record for record in lines}.values()), seconds


def test_a_rank_that_raises_ends_the_job_and_says_why_in_the_rows_of_its_batch(job, tmp_path):
    err, records, seconds = fail_in_the_second_batch(job, tmp_path, "raise", launched=True)
    assert seconds < 60, err
    assert "[rank 1 of 2] failed: BatchError: the batch of rows" in err and "ValueError: the original error" in err
    assert "failed\nTraceback" not in err and "[rank 0 of 2] failed" not in err, err
    assert [bool(record["text"]) for record in records] == [True, True, False, False]
    assert all("rank 1: ValueError: the original error" in record["error"] for record in records[2:])
    # The next run tries both once more, last and each alone. What ends the job again is final.
    first, second = sorted(record["index"] for record in records[2:])
    _, records, _ = fail_in_the_second_batch(job, tmp_path, "raise", launched=False)
    errors = {record["index"]: record["error"] for record in records if record["error"]}
    assert len(records) == 6 and set(errors) == {first, second}
    assert errors[first].endswith(f"the original error, while rows {first} ran again")
    assert errors[second].endswith(" ran")


def test_a_rank_that_dies_ends_the_job_and_its_rows_are_written_as_failed(job, tmp_path):
    """The next run tries them once more, alone."""
    err, records, seconds = fail_in_the_second_batch(job, tmp_path, "kill", launched=False)
    assert seconds < 60 and "[rank 0 of 2] stopped because a peer did" in err, err
    assert [bool(record["text"]) for record in records] == [True, True, False, False]
    assert all("a peer died or came too late" in record["error"] for record in records[2:])
