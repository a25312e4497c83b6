"""Rows and results are known by digests: of all that they depend on, and of nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from d2o_dist.eval.store import read_records
from tests.engine.tiny import make_folder
from tests.eval.test_evaluate import TASKS, plan_of, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), template=False, max_position_embeddings=640))


@pytest.fixture
def data(tmp_path):
    """A file of rows for `jsonl`, and a folder of LongBench's form."""
    rows = [{"context": f"the fox {n} folds", "input": "what?", "answers": [f"fox {n}"], "stop": n} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{**row, "all_classes": ["fox", "dog"], "answers": ["fox"]} for row in rows]
    (tmp_path / "trec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


JSONL = {"kind": "jsonl", "question": "{input}", "samples": 2}


def digests(folder, data, **task) -> dict[tuple[str, str], str]:
    """(task, row) -> digest."""
    if task["kind"] in ("jsonl", "longbench"):
        task = {"data": str(data / "rows.jsonl" if task["kind"] == "jsonl" else data), **task}
    plan = plan_of(folder, data / "out", tasks=[task])
    found = {(job.task.name, job.row.id): job.digest for job in plan.jobs}
    assert len(set(found.values())) == len(plan.jobs), "one row, one digest"
    return found


@pytest.mark.parametrize(
    ("task", "more", "common"),
    [
        (TASKS[0], {"samples": 3}, 4),
        (TASKS[0], {"lengths": [260, 150, 200], "depths": [0.25, 1, 0]}, 4),
        ({**TASKS[0], "fact": "It is 7.", "question": "What?", "answer": "7"}, {"samples": 2, "lengths": [200]}, 2),
        (TASKS[1], {"lengths": [100, 70]}, 3),
        (TASKS[1], {"samples": 4}, 1),  # the others lie elsewhere in the text
        (TASKS[2], {"samples": 4, "lengths": [550, 500]}, 2),
        ({**TASKS[2], "tasks": ["fwe", "niah_single_2"], "max_new_tokens": 8}, {"tasks": ["fwe"], "samples": 5}, 2),
        (JSONL, {"samples": 5}, 2),
        ({"kind": "longbench", "tasks": ["trec"], "samples": 2}, {"samples": None}, 2),
    ],
    ids=str,
)
def test_a_row_is_known_whatever_other_rows_there_are(folder, data, task, more, common):
    before, after = digests(folder, data, **task), digests(folder, data, **{**task, **more})
    assert len(set(before.values()) & set(after.values())) == common
    assert all(after[row] == one for row, one in before.items() if one in after.values())


@pytest.mark.parametrize(
    ("task", "other"),
    [
        (TASKS[0], {"max_new_tokens": 7}),
        (TASKS[0], {"digits": 6}),
        (TASKS[0], {"needles": 2}),
        (TASKS[0], {"name": "another"}),
        (TASKS[1], {"kind": "perplexity", "name": "fidelity"}),
        (TASKS[1], {"continuation": "decode"}),
        (TASKS[1], {"num_scored": 19}),
        (TASKS[2], {"max_new_tokens": 5}),
        (TASKS[2], {"lengths": [501]}),
        (JSONL, {"metric": "qa_f1"}),
        (JSONL, {"stop": ["x"]}),
        (JSONL, {"answers": "input"}),
        (JSONL, {"prefix": "the"}),
        (JSONL, {"max_new_tokens": 5}),
    ],
    ids=str,
)
def test_what_a_result_depends_on_is_in_its_digest(folder, data, task, other):
    assert not set(digests(folder, data, **task).values()) & set(digests(folder, data, **{**task, **other}).values())


def test_rows_that_read_alike_are_rows_of_their_own(folder, data):
    (data / "rows.jsonl").write_text('{"context": "the fox", "input": "what?", "answers": "fox"}\n' * 3)
    assert len(digests(folder, data, **{**JSONL, "samples": 3})) == 3
    before = digests(folder, data, kind="longbench", tasks=["trec"])
    text = (data / "trec.jsonl").read_text()
    (data / "trec.jsonl").write_text(text.replace('"dog"', '"cat"'))  # scoring looks for wrong classes too
    assert not set(before.values()) & set(digests(folder, data, kind="longbench", tasks=["trec"]).values())


@pytest.mark.parametrize("file", ["weights", "config", "generation"])
def test_another_model_under_the_same_path_is_another_result(folder, tmp_path, file):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    before, out = plan_of(str(model), tmp_path / "out", tasks=TASKS[1:2]), tmp_path / "out"
    run(before)
    if file == "weights":
        weights = load_file(model / "model.safetensors")
        save_file({**weights, "model.norm.weight": -weights["model.norm.weight"]}, model / "model.safetensors")
    else:
        path = model / {"config": "config.json", "generation": "generation_config.json"}[file]
        changed = {"rms_norm_eps": 1e-3} if file == "config" else {"eos_token_id": [1, 7]}
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    counted: list[int] = []
    again = plan_of(str(model), out, tasks=TASKS[1:2])
    assert run(again, on_results=counted.append).num_results == sum(counted) == 9
    # The old records stay, as with any other setting, and are in no table.
    found = read_records(out)
    assert len(found) == 18 and before.weights != again.weights
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model digest"] == again.weights
    own = [found[job.key(method)]["scores"]["nll"] for job in again.jobs for method in again.methods[:1]]
    assert metrics["tasks"]["fidelity"]["methods"][0]["scores"]["nll"]["mean"] == pytest.approx(sum(own) / 3)
    assert run(plan_of(str(model), out, tasks=TASKS[1:2]), on_results=counted.append).num_results == sum(counted) == 9
