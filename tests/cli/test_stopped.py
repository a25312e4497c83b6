"""A rank that is stopped (SIGSTOP) keeps nobody waiting for ever, and nobody waits in silence."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from d2o_dist.cli import infer
from d2o_dist.comm import run_guarded
from d2o_dist.engine import session
from tests.cli.speak import speak
from tests.engine.tiny import make_folder
from tests.ports import free_port
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
TIMEOUT_S = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=4096))


def as_rank(rank, world, argv, port, said):
    """The program, as a launcher starts it; rank 1 stops itself in its second batch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.stderr = (Path(said) / f"rank{rank}").open("w", buffering=1)
    real, seen = session.Session.decode, []

    def decode(self, *args):
        seen.append(self)
        if rank == 1 and self is not seen[0]:
            (Path(said) / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, *args)

    session.Session.decode = decode
    status = run_guarded(lambda: infer.main(argv))
    os._exit(status)


def clean_up(said: Path, seconds: list[float]) -> None:
    """What a launcher does: the stopped rank is killed once its peer has ended."""
    while not (said / "stopped").exists() or not (said / "stopped").read_text():
        time.sleep(0.05)
    began = time.monotonic()
    while "traceback: " not in (said / "rank0").read_text():
        time.sleep(0.05)
    seconds.append(time.monotonic() - began)
    os.kill(int((said / "stopped").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("axis", "where"),
    [
        ("sp", "CollectiveError"),
        pytest.param("tp", "wait_tensor", marks=pytest.mark.slow),
        pytest.param("dp", "wait", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_waits_says_for_whom_and_ends_in_time(folder, tmp_path, axis, where):
    rows = [{"id": n, "prompt": "the quick brown fox jumps over " * 3} for n in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    argv = ["--model", folder, "--prompts", str(tmp_path / "p.jsonl"), "--output", str(output), f"--{axis}", "2"]
    argv += ["d2o.budget.min_layer_tokens=8", "sampling.max_new_tokens=5", "device=cpu", "max_batch_size=1"]
    argv += [f"parallel.timeout={TIMEOUT_S}", "parallel.tp_engine=transformers"]
    seconds: list[float] = []
    launcher = threading.Thread(target=clean_up, args=(tmp_path, seconds), daemon=True)
    launcher.start()
    run_ranks(2, as_rank, argv, free_port(), str(tmp_path), init=False, fresh=True, lost=[0, 1], timeout_s=200)
    lines = (tmp_path / "rank0").read_text().splitlines()
    said = [line for line in lines if line.startswith("[rank ")]
    waited = rf"\[rank 0 of 2\] has waited {TIMEOUT_S // 2} s for rank 1 in \w+ \(\S+:\d+\); the job ends after "
    assert re.match(waited, said[0]), lines
    failed = re.match(r"\[rank 0 of 2\] failed: \w+: .*; traceback: (\S+)$", said[1])
    assert failed and len(said) == 2 and "Traceback" not in "\n".join(lines)
    trace = Path(failed[1])
    assert trace.parent == tmp_path and where in trace.read_text()
    parts = [json.loads(line) for path in tmp_path.glob("out.jsonl*") for line in path.read_text().splitlines()
             if not path.name.endswith((".trace", ".job"))]  # fmt: skip
    assert parts[0]["text"] and (axis == "dp") == all(part["text"] for part in parts)
    print(axis, f"{seconds[0]:.1f} s")


def by_hand(rank, world, argv, env):
    os.environ |= env
    return speak(infer.main, argv)


def test_a_rank_by_hand_in_a_slurm_step_says_for_whom_it_waits(folder):
    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    argv = ["--model", folder, "--prompt", "one two", "--sp", "3", "device=cpu", "parallel.timeout=2"]
    ((status, out, err),) = run_ranks(1, by_hand, argv, env, init=False, fresh=True)
    who = f"2 of 3 ranks (1, 2) at 127.0.0.1:{env['MASTER_PORT']}"
    waits, ends = err.splitlines()
    assert (status, out) == (2, "")
    assert waits.startswith(f"[rank 0 of 3] waits for {who}; Slurm counts them in this step: srun starts all")
    assert ends == f"infer.py: error: {who.replace('at', 'did not come to')} in 2 s"
