"""Part files of several replicas and the file they become."""

from __future__ import annotations

import json

import pytest

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.engine.encode import BadRow
from d2o_dist.engine.output import check_output, check_parts, check_shared, join_files, open_writer
from d2o_dist.engine.parts import part_path
from d2o_dist.engine.records import error_record, to_line
from d2o_dist.engine.resume import begin
from tests.ranks import run_ranks


def write_parts(output, *parts):
    paths = [part_path(output, replica) for replica in range(len(parts))]
    for path, indices in zip(paths, parts, strict=True):
        # U+2028 ends a line for Python's splitlines, but not for JSON.
        lines = [to_line({**error_record(BadRow(index, index, "e")), "text": f"{index}\u2028x"}) for index in indices]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def test_parts_are_joined_in_the_order_of_the_input(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    # 1 is twice: it was written, and not known to be, when its replica was killed.
    parts = write_parts(output, [4, 0, 1], [], [3, 1, 2])
    check_parts(parts)
    records = join_files(output, parts, 5)
    lines = output.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == records and lines[-1] == ""
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4] and records[3]["text"] == "3\u2028x"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_is_missing_is_said_and_nothing_is_lost(tmp_path):
    output = tmp_path / "out.jsonl"
    parts = write_parts(output, [0], [1, 2])
    with pytest.raises(ValueError, match="out.jsonl.part-2 cannot be seen by rank 0: .* file system that all machines"):
        check_parts([*parts, part_path(output, 2)])
    with pytest.raises(ValueError, match=r"the files of .*out.jsonl hold 3 rows, not 4: give the same command again"):
        join_files(output, parts, 4)
    assert not output.exists() and len(list(tmp_path.iterdir())) == 2


def test_parts_of_an_unfinished_run_are_not_overwritten_unasked(tmp_path):
    output = tmp_path / "out.jsonl"
    write_parts(output, [0], [1])
    for replicas in (1, 2):
        with pytest.raises(ValueError, match="out.jsonl.part-0 holds results of a run that did not end"):
            check_output(str(output), False, replicas)
    check_output(str(output), True, 2)
    begin(str(output), {}, goes_on=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.job"]


@pytest.mark.parametrize("output", [None, "-"])
def test_several_replicas_need_a_file(output, tmp_path):
    check_output(output, False)
    with pytest.raises(ValueError, match=r"2 replicas \(dp\) write their results to part files: name an output file"):
        check_output(output, False, 2)
    with pytest.raises(ValueError, match="/dev/null is not a regular file"):
        check_output("/dev/null", False, 2)
    check_output("/dev/null", False)


def shared(rank, world, folders):
    mesh = build_mesh(dp=world)
    try:
        check_shared(f"{folders[rank]}/new/out.jsonl", mesh, patience_s=0.2)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.multirank
@pytest.mark.parametrize("apart", [False, True])
def test_replicas_on_machines_that_share_no_files_are_refused(tmp_path, apart):
    folders = [tmp_path / "a", tmp_path / ("b" if apart else "a")]
    found = run_ranks(2, shared, [str(folder) for folder in folders])
    assert found[0] == found[1]
    if apart:
        assert "out.jsonl.probe-1 cannot be seen by rank 0" in found[0] and "all machines share" in found[0]
    else:
        assert found[0] is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_replica_writes_the_output_itself(tmp_path):
    with open_writer(str(tmp_path / "out.jsonl"), ParallelMesh.local()) as writer:
        writer.write([{"index": 0}])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
