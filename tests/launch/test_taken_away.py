"""Outputs that are removed, replaced or written to while a run writes them: it is said, and no result is lost."""

from __future__ import annotations

import json
import sys

import pytest

from tests.launch.test_infer import TORCHRUN, finish, job, start  # noqa: F401  a fixture

pytestmark = pytest.mark.multirank

# Does something to the output once the first rows are written; of two ranks rank 0 does so when it reads its first
# prompt, and rank 1 waits for it.
MEDDLE = """
import os, pathlib, shutil, sys, time
from d2o_dist.cli.infer import main
from d2o_dist.comm import run_guarded
from d2o_dist.engine import runner

how, output = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
real, batches, rank = runner.Runner.read, [], os.environ.get("RANK")
done = pathlib.Path(__file__).with_name("done")

def read(self, batch):
    batches.append(batch)
    while rank == "1" and not done.exists():
        time.sleep(0.05)
    if len(batches) == (2 if rank is None else 1) and rank != "1":
        if how == "remove":
            output.unlink()
        elif how == "folder":
            shutil.rmtree(output.parent)
        elif how == "replace":
            output.with_name("mine").write_text("mine\\n")
            os.replace(output.with_name("mine"), output)
        elif how == "overwrite":
            output.write_text("mine\\n")
        elif how == "block":
            shutil.rmtree(output.parent)
            output.parent.write_text("mine\\n")
        done.touch()
    return real(self, batch)

runner.Runner.read = read
raise SystemExit(run_guarded(main))
"""


@pytest.fixture
def meddle(job, tmp_path):  # noqa: F811
    script = tmp_path / "meddle.py"
    script.write_text(MEDDLE)

    def run(how, target, output, *args, launcher=(sys.executable,)):
        args = [how, str(target), "--output", str(output), "sampling.max_new_tokens=5", *args]
        return finish(start(job, launcher, *args, script=script))

    return run


def ids(path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "what", "left"),
    [
        ("remove", "was removed", None),
        ("folder", "was removed", None),
        ("replace", "was replaced", "mine\n"),
        ("overwrite", "was changed by something else", "mine\n"),
    ],
)
def test_one_process_keeps_its_rows_beside_the_output(meddle, tmp_path, how, what, left):
    output = tmp_path / "out" / "o.jsonl"
    status, _, err = meddle(how, output, output)
    part = output.with_name("o.jsonl.part-0")
    said = f"infer.py: error: {output} {what} while it was written: the results of this run are in {part}\n"
    assert status == 1 and said in err and "rows: 6 ok" in err, err
    assert ids(part) == list(range(6))
    assert (output.read_text() if output.exists() else None) == left
    assert {path.name for path in output.parent.iterdir()} <= {"o.jsonl", "o.jsonl.part-0"}
    # The next run does not write over what was kept.
    status, _, err = meddle("nothing", output, tmp_path / "out" / "o.jsonl")
    assert status == 2 and ids(part) == list(range(6))


def test_where_nothing_can_be_kept_it_is_said(meddle, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    status, _, err = meddle("block", output, output)
    assert status == 1 and (tmp_path / "out").read_text() == "mine\n"
    assert f"error: {output} was removed while it was written: the results of this run could not be kept: " in err, err


def test_replicas_go_on_in_another_part(meddle, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    args = ["max_batch_size=1"]
    status, _, err = meddle("remove", f"{output}.part-0", output, *args, launcher=launcher)
    assert status == 0, err
    assert ids(output) == list(range(6)) and [path.name for path in output.parent.iterdir()] == ["o.jsonl"]
    assert f"{output}.part-0 was removed while it was written" in err


def test_replicas_do_not_write_over_an_output_that_appeared(meddle, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    status, _, err = meddle("overwrite", output, output, "max_batch_size=1", launcher=launcher)
    assert status != 0 and f"error: output {output} was written by something else meanwhile: the part files" in err, err
    assert output.read_text() == "mine\n"
    parts = [output.with_name(f"o.jsonl.part-{replica}") for replica in (0, 1)]
    assert sorted(ids(parts[0]) + ids(parts[1])) == list(range(6))
