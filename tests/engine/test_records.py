"""Records, the file they go to, and the summary."""

from __future__ import annotations

import json

import pytest

from d2o_dist.engine.encode import BadRow
from d2o_dist.engine.loop import Generated
from d2o_dist.engine.output import check_output
from d2o_dist.engine.records import FIELDS, RecordWriter, error_record, make_record, read_records, to_line
from d2o_dist.engine.session import RowUsage
from d2o_dist.engine.summary import summarise
from tests.engine.tiny import request


def good(index: int, keep: float = 0.2) -> dict:
    result = Generated([5, 6], "hi", "eos", 1.0, 10.0, RowUsage(keep, 20, 100))
    return make_record(request(index, [1, 2, 3]), result)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_has_every_field_in_order():
    bad = error_record(BadRow(1, "x", "why", 7))
    failed = error_record(request(2, [1, 2]), "OutOfMemoryError: ...")
    for record in (good(0), bad, failed):
        assert tuple(record) == FIELDS
    assert (bad["error"], bad["num_prompt_tokens"], bad["text"]) == ("why", 7, None)
    assert (failed["error"], failed["num_prompt_tokens"], failed["id"]) == ("OutOfMemoryError: ...", 2, "row2")


def test_records_are_on_disk_at_once(tmp_path):
    path = tmp_path / "out.jsonl"
    with RecordWriter(str(path)) as writer:
        writer.write([good(3)])
        assert [record["index"] for record in read(path)] == [3]
        writer.write([good(0), good(2)])
        assert [record["index"] for record in read(path)] == [3, 0, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_cut_off_is_no_record_and_a_good_one_counts(tmp_path):
    """Of two runs, with an error tried again; the second was killed inside a character."""
    path, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    failed = {**error_record(BadRow(1, "r1", "bad")), "text": "\u2028"}
    path.write_text(to_line(good(0)) + to_line(failed) + to_line(good(0, 0.9))[:-9] + "\n[]\n\n{}\n", encoding="utf-8")
    assert read_records([path, tmp_path / "none"]) == {0: good(0), 1: failed}
    half = to_line({**good(2), "text": "東"}).encode()
    again.write_bytes(to_line(good(1)).encode() + half[: half.index("東".encode()) + 1])
    assert read_records([path, again]) == read_records([again, path]) == {0: good(0), 1: good(1)}


def test_standard_output(capsys):
    for output in (None, "-"):
        with RecordWriter(output) as writer:
            writer.write([good(0)])
        assert json.loads(capsys.readouterr().out)["text"] == "hi"
    with RecordWriter(None, quiet=True) as writer:
        writer.write([good(0)])
    assert capsys.readouterr().out == "" and len(writer.records) == 1


def test_half_a_surrogate_pair_in_an_id_is_escaped():
    line = to_line(error_record(BadRow(0, "\ud800", "bad")))
    assert json.loads(line.encode("utf-8"))["id"] == "\ud800"
    assert "東" in to_line(error_record(BadRow(0, "東", "bad")))


def test_outputs_that_are_refused(tmp_path):
    full = tmp_path / "full.jsonl"
    full.write_text("x")
    with pytest.raises(ValueError, match="exists: delete it, name another, or set overwrite=true"):
        check_output(str(full), False)
    check_output(str(full), True)
    with pytest.raises(ValueError, match="is a folder"):
        check_output(str(tmp_path), False)
    with pytest.raises(ValueError, match="cannot be made"):
        check_output(str(full / "below" / "a.jsonl"), False)
    check_output(str(tmp_path / "new" / "a.jsonl"), False)
    assert (tmp_path / "new").is_dir()
    check_output("-", False)
    check_output(None, False)


def test_summary():
    records = [good(0, 0.1), good(1, 0.3), error_record(BadRow(2, "x", "bad"))]
    summary = summarise(records, 5, 4.0, times=[(1.0, 10.0), (3.0, None)], rank_bytes=[60], interrupted=True)
    assert (summary.num_ok, summary.num_failed, summary.num_missing) == (2, 1, 2)
    assert (summary.num_prompt_tokens, summary.num_new_tokens, summary.new_tokens_per_s) == (6, 4, 1.0)
    assert (summary.median_time_to_first_token_s, summary.median_tokens_per_s) == (2.0, 10.0)
    assert summary.mean_keep_ratio == pytest.approx(0.2)
    assert (summary.held_bytes, summary.full_bytes) == (40, 200)
    assert "2 ok, 1 failed, 2 not reached" in str(summary)
    json.dumps(summary.to_dict())


def test_rows_of_an_earlier_run_are_not_what_this_one_took():
    records = [good(0, 0.1), good(1, 0.3), error_record(BadRow(2, "x", "bad"))]
    summary = summarise(records, 3, 4.0, times=[(3.0, None)], rank_bytes=[60], earlier=[0, 2])
    assert (summary.num_ok, summary.num_failed, summary.num_earlier, summary.held_bytes) == (2, 1, 2, 40)
    assert (summary.num_prompt_tokens, summary.num_new_tokens, summary.new_tokens_per_s) == (3, 2, 0.5)
    assert "rows: 2 ok, 1 failed; 2 of them by an earlier run\n" in str(summary)


def test_a_summary_of_nothing():
    summary = summarise([], 0, 0.0, times=[], rank_bytes=[0])
    assert summary.median_tokens_per_s is None and "rows: 0 ok, 0 failed" in str(summary)
