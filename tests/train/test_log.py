"""`log.jsonl` of a run that goes on: each step once, each record a line."""

from __future__ import annotations

import json

import pytest

from d2o_dist.train.log import DROPPED_FILE, LOG_FILE, RunLog


def line(step: int) -> str:
    return json.dumps({"kind": "train", "step": step}) + "\n"


@pytest.mark.parametrize("end", ["", line(3), line(3)[:-1], line(3)[:9]], ids=["no break", "more", "both", "half"])
def test_a_run_that_goes_on_repeats_no_step(tmp_path, end):
    text = line(1) + line(2)[:-1] if end == "" else line(1) + line(2) + end
    (tmp_path / LOG_FILE).write_text(text)
    log = RunLog(tmp_path)
    log.go_on(2)
    log.record("train", {"step": 3})
    found = [json.loads(one)["step"] for one in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert found == [1, 2, 3]
    dropped = tmp_path / DROPPED_FILE
    assert (dropped.read_text().splitlines() == end.splitlines()) if end else not dropped.exists()
