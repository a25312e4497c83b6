"""Outputs that are removed, replaced or written to while a run writes them: it is said, and no result is lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import pytest

from d2o_dist.cli import infer
from d2o_dist.engine.runner import InferRunner
from tests.cli.speak import speak
from tests.launch.test_infer import FIELDS, job  # noqa: F401  a fixture
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank


def meddled(rank, world, folder, done, how, target, output, argv) -> tuple[int, str, str]:
    """A run in `folder`, and what is done to its output.

    It is done once the first rows are written; of two ranks rank 0 does it when it reads its first prompt, and rank 1
    waits for it.
    """
    real, batches = InferRunner.read, []

    def read(self, batch):
        batches.append(batch)
        while rank == 1 and not done.exists():
            time.sleep(0.05)
        if rank == 0 and len(batches) == (3 if world == 1 else 1):
            meddle(how, target)
            done.touch()
        return real(self, batch)

    with chdir(folder), patch.object(InferRunner, "read", read):
        return speak(infer.main, [*FIELDS, "sampling.max_new_tokens=5", "--output", str(output), *argv])


def meddle(how: str, output: Path) -> None:
    if how == "remove":
        output.unlink()
    elif how == "folder":
        shutil.rmtree(output.parent)
    elif how == "replace":
        output.with_name("mine").write_text("mine\n")
        os.replace(output.with_name("mine"), output)
    elif how == "overwrite":
        output.write_text("mine\n")
    elif how == "block":
        shutil.rmtree(output.parent)
        output.parent.write_text("mine\n")


@pytest.fixture
def run(job, tmp_path):  # noqa: F811
    """(status, standard output, standard error) of each of some ranks."""

    def run(how, target, output, *argv, ranks=1):
        # One process by itself is no rank.
        return run_ranks(ranks, meddled, job, tmp_path / "done", how, target, output, argv, init=ranks > 1)

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
def test_one_process_keeps_its_rows_beside_the_output(run, tmp_path, how, what, left):
    output = tmp_path / "out" / "o.jsonl"
    ((status, _, err),) = run(how, output, output)
    part = output.with_name("o.jsonl.part-0")
    said = f"infer.py: error: {output} {what} while it was written: the results of this run are in {part}\n"
    assert status == 1 and said in err and "rows: 6 ok" in err, err
    assert ids(part) == list(range(6))
    assert (output.read_text() if output.exists() else None) == left
    assert {path.name for path in output.parent.iterdir()} <= {"o.jsonl", "o.jsonl.job", "o.jsonl.part-0"}
    # The next run does not write over what was kept. Where nothing is in the way, and what tells whose the rows are is
    # still there, it puts them where they belong.
    ((status, _, err),) = run("nothing", output, output)
    if how == "remove":
        assert status == 0 and "6 of them by an earlier run" in err and ids(output) == list(range(6)), err
    else:
        assert status == 2 and ids(part) == list(range(6))


def test_where_nothing_can_be_kept_it_is_said(run, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    ((status, _, err),) = run("block", output, output)
    assert status == 1 and (tmp_path / "out").read_text() == "mine\n"
    assert f"error: {output} was removed while it was written: the results of this run could not be kept: " in err, err


def test_replicas_go_on_in_another_part(run, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    part = output.with_name("o.jsonl.part-0")
    ends = run("remove", part, output, "max_batch_size=1", ranks=2)
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert ids(output) == list(range(6))
    assert sorted(path.name for path in output.parent.iterdir()) == ["o.jsonl", "o.jsonl.job"]
    assert f"{part} was removed while it was written" in ends[0][2]


def test_replicas_do_not_write_over_an_output_that_appeared(run, tmp_path):
    output = tmp_path / "out" / "o.jsonl"
    ends = run("overwrite", output, output, "max_batch_size=1", ranks=2)
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert f"error: output {output} was written by something else meanwhile: the part files" in ends[0][2], ends
    assert output.read_text() == "mine\n"
    parts = [output.with_name(f"o.jsonl.part-{replica}") for replica in (0, 1)]
    assert sorted(ids(parts[0]) + ids(parts[1])) == list(range(6))
