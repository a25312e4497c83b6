"""LongBench's rows: every task, its prompts and limits, those of the user's own files, and refusals."""

from __future__ import annotations

import hashlib
import json

import pytest

from d2o_dist.config.eval_tasks import LONGBENCH_TASKS, LongBenchTask
from d2o_dist.eval.table import report
from d2o_dist.eval.tasks.longbench import LongBench
from d2o_dist.eval.tasks.longbench_prompts import SPECS
from tests.eval.parts import make_tools, write


@pytest.fixture(scope="module")
def tools():
    return make_tools()


def row_of(task: str, number: int = 0, **values) -> dict:
    answer = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3", "passage_count": "3"}
    common = {"all_classes": ["yes", "no"], "answers": [answer.get(task, "yes")], "context": "a context {with} braces"}
    return {**common, "input": f"the input {{x}} {number}", "_id": f"id{number}", **values}


def test_every_longbench_task_has_a_specification():
    assert set(SPECS) == set(LONGBENCH_TASKS)


@pytest.mark.parametrize("name", LONGBENCH_TASKS)
def test_longbench_rows_and_scores(tools, tmp_path, name):
    if SPECS[name].metric.__name__.endswith("_zh") and name != "passage_retrieval_zh":
        pytest.importorskip("jieba")
    write(tmp_path, name, [row_of(name, number) for number in range(3)], compress=name == "trec")
    task = LongBench(LongBenchTask(data=str(tmp_path), samples=2), name)
    rows = task.rows(tools)
    assert [row.id for row in rows] == ["id0", "id1"]
    assert rows[1].context.endswith("a context {with} braces") and "the input {x} 1" in rows[1].question
    assert "{input}" not in rows[1].question and rows[0].max_new_tokens == SPECS[name].max_new_tokens
    right = "3" if "passage" in name else "yes"
    if SPECS[name].first_line:
        assert task.score(rows[0], f"\n{right}\nno")["score"] == pytest.approx(1)
    assert task.score(rows[0], right)["score"] == pytest.approx(1) and task.score(rows[0], "")["score"] == 0


def test_longbench_takes_prompts_and_limits_from_the_users_files(tools, tmp_path):
    prompts, lengths = tmp_path / "dataset2prompt.json", tmp_path / "dataset2maxlen.json"
    prompts.write_text(json.dumps({"qasper": "On {input}. Article: {context}\n\nQ: {input}\nA:", "trec": "no place"}))
    lengths.write_text(json.dumps({"qasper": 77, "trec": 0}))
    write(tmp_path, "qasper", [row_of("qasper")])
    files = dict(data=str(tmp_path), prompts_file=str(prompts), lengths_file=str(lengths))
    task, own = LongBench(LongBenchTask(**files), "qasper"), LongBench(LongBenchTask(data=str(tmp_path)), "qasper")
    (row,), (other,) = task.rows(tools), own.rows(tools)
    assert row.context == "On the input {x} 0. Article: a context {with} braces"
    assert row.question == "\n\nQ: the input {x} 0\nA:" and row.max_new_tokens == 77
    assert other.question == SPECS["qasper"].after.replace("{input}", "the input {x} 0") and other.max_new_tokens == 128
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest()[:12]
    assert f"prompts: dataset2prompt.json, sha256 {digest}; new tokens: dataset2maxlen.json, sha256 " in task.note
    assert "prompts: our own wording; new tokens: as published" in own.note
    summary = {"primary": "score", "higher_is_better": True, "num_rows": 0, "methods": [], "note": task.note}
    page = report({"model": "m", "question": "last", "tasks": {task.name: summary}}, {})
    assert task.note in page
    for name, fields, message in [
        ("trec", {"lengths_file": None}, "trec must be a text with one {context}"),
        ("trec", {"prompts_file": None}, r"trec \(0\) must be at least 1"),
        ("lcc", {}, "has nothing for lcc"),
        ("lcc", {"prompts_file": str(tmp_path / "none.json")}, "none.json cannot be read"),
        ("lcc", {"prompts_file": str(tmp_path / "qasper.jsonl")}, "has nothing for lcc"),
    ]:
        with pytest.raises(ValueError, match=message):
            LongBench(LongBenchTask(**{**files, **fields}), name)


def test_longbench_refusals(tools, tmp_path):
    with pytest.raises(ValueError, match="has no qasper.jsonl"):
        LongBench(LongBenchTask(data=str(tmp_path)), "qasper").rows(tools)
    write(tmp_path, "qasper", [{"input": "a", "answers": ["b"]}])
    with pytest.raises(ValueError, match="qasper row 1: KeyError: 'context'"):
        LongBench(LongBenchTask(data=str(tmp_path)), "qasper").rows(tools)
    (tmp_path / "trec.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="trec has no rows"):
        LongBench(LongBenchTask(data=str(tmp_path)), "trec").rows(tools)
