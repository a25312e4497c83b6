"""What a trace writes."""

from __future__ import annotations

import json

import pytest
import torch

from d2o_dist.comm import ParallelMesh
from d2o_dist.engine.trace import PROFILED_STEP, Trace


def test_one_step_is_profiled_and_all_are_counted(tmp_path):
    trace = Trace(tmp_path / "new" / "trace", ParallelMesh.local())
    for number in range(PROFILED_STEP + 2):
        with trace.step(), torch.profiler.record_function(f"step {number + 1}"):
            torch.ones(2).sum()
    with trace.counter.phase("decode"):
        trace.counter.add("sp", "all_gather", 96)
    trace.add_row(7, 0.5, None)
    assert trace.write() == str(trace)
    names = {event.get("name") for event in json.loads(trace.profile_path.read_text())["traceEvents"]}
    assert f"step {PROFILED_STEP}" in names and not {f"step {PROFILED_STEP - 1}", f"step {PROFILED_STEP + 1}"} & names
    assert json.loads((tmp_path / "new" / "trace" / "traffic-rank0.json").read_text()) == {
        "rank": 0, "dp": [0, 1], "sp": [0, 1], "tp": [0, 1], "decode_steps": PROFILED_STEP + 2,
        "traffic": {"decode": {"sp": {"all_gather": {"calls": 1, "bytes": 96}}}},
        "rows": [{"index": 7, "time_to_first_token_s": 0.5, "tokens_per_s": None}],
    }  # fmt: skip
    assert f"{PROFILED_STEP + 2} decode steps of rank 0; profile: " in str(trace) and "all_gather" in str(trace)


def test_a_profile_of_an_earlier_run_does_not_stay(tmp_path):
    (tmp_path / "decode-rank0.json").write_text('{\n  "schemaVersion": 1,\n  "traceEvents": []\n}')
    trace = Trace(tmp_path, ParallelMesh.local())
    assert not trace.profile_path.exists()
    assert str(trace) == "0 decode steps of rank 0; no decode step to profile\nnothing was sent between ranks"


@pytest.mark.parametrize("name", ["decode-rank0.json", "traffic-rank0.json"])
@pytest.mark.parametrize("link", [False, True])
def test_files_of_others_are_refused_by_name(tmp_path, name, link):
    mine, path = tmp_path / "mine.json", tmp_path / "t" / name
    path.parent.mkdir()
    mine.write_text('{"notes": 1}')
    path.symlink_to(mine) if link else path.write_text(mine.read_text())
    with pytest.raises(ValueError, match=f"{path} is in the way of a trace"):
        Trace(tmp_path / "t", ParallelMesh.local())
    assert path.read_text() == mine.read_text() == '{"notes": 1}' and path.is_symlink() == link
