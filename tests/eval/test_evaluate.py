"""Whole evaluations on a tiny model: results, resuming, failures, several ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
import yaml

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.engine.records import to_line
from d2o_dist.engine.runner import BatchError
from d2o_dist.engine.stop import Stop, StoppedError
from d2o_dist.eval import runner as runner_module
from d2o_dist.eval.aggregate import summarise
from d2o_dist.eval.evaluate import check_parallel, evaluate
from d2o_dist.eval.plan import EvalPlan, prepare
from d2o_dist.eval.reading import Reading
from d2o_dist.eval.store import RankFile, read_records
from d2o_dist.eval.table import report
from d2o_dist.policy.score import Accumulated
from tests.engine.tiny import make_folder
from tests.eval.parts import TEXT
from tests.eval.test_longbench import row_of, write
from tests.ranks import run_ranks

TASKS = [
    {"kind": "needle", "lengths": [200, 260], "depths": 2, "max_new_tokens": 6},
    {"kind": "fidelity", "lengths": [100], "num_scored": 20, "samples": 3},
    {"kind": "ruler", "name": "r", "lengths": [500], "tasks": "fwe", "samples": 2},
]
SMALL = {"budget": {"min_layer_tokens": 8}}
TWICE = {"name": "reread", "preset": "reread", **SMALL}
METHODS = [{"name": "mass", "preset": "lean", **SMALL}, {"name": "h2o", "preset": "h2o", **SMALL}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), template=False, max_position_embeddings=640))


def plan_of(folder: str, output, **values) -> EvalPlan:
    values = {"model": folder, "output": str(output), "device": "cpu", "tasks": TASKS, "methods": METHODS,
              "keep_ratios": [0.3], **values}  # fmt: skip
    return prepare(EvalConfig.from_dict(values), {"essays": lambda: TEXT})


def run(plan: EvalPlan, **kwargs):
    return evaluate(plan, ParallelMesh.local(), **kwargs)


def comparable(path) -> dict:
    """Records by task, row and method, without what may differ between runs."""
    return comparable_of(read_records(path).values())


def comparable_of(records) -> dict:
    found = {}
    for record in records:
        record = {key: value for key, value in record.items() if not key.startswith("rank")}
        if record["scores"]:
            record["scores"] = {name: round(value, 9) for name, value in record["scores"].items()}
        found[record["task"], record["row"], record["method"]] = record
    return found


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    plan = plan_of(folder, output)
    counted: list[int] = []
    outcome = run(plan, on_results=counted.append)
    return plan, outcome, output, counted


def test_everything_is_there(done):
    plan, outcome, output, counted = done
    assert len(plan.jobs) == 4 + 3 + 2 and outcome.num_results == sum(counted) == 27 and outcome.num_missing == 0
    names = {path.name for path in output.iterdir()}
    assert names >= {"predictions.jsonl", "metrics.json", "config.yaml", "environment.json", "table.md"}
    assert "heatmap-needle-30pct.png" in names and not [name for name in names if "rank" in name]
    config = EvalConfig.from_dict(yaml.safe_load((output / "config.yaml").read_text()))
    assert config == plan.config
    environment = json.loads((output / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["ranks"] == 1


def test_records_and_metrics_agree(done):
    plan, outcome, output, _ = done
    records = list(read_records(output).values())
    assert {record["method"] for record in records} == {"full", "mass", "h2o"}
    for record in records:
        ratio = record["held_bytes"] / record["full_bytes"]
        assert ratio == pytest.approx(record["achieved_keep_ratio"])
        assert ratio == 1 if record["method"] == "full" else ratio == pytest.approx(0.3, abs=0.01)
    metrics = json.loads((output / "metrics.json").read_text())["tasks"]
    assert list(metrics) == ["needle", "fidelity", "r/fwe"]
    full, mass, _ = metrics["fidelity"]["methods"]
    assert full["scores"]["kl"] == {"mean": 0.0, "se": 0.0} and full["scores"]["top1"]["mean"] == 1
    values = [
        record["scores"]["kl"] for record in records if record["task"] == "fidelity" and record["method"] == "mass"
    ]
    assert mass["n"] == 3 and mass["scores"]["kl"]["mean"] == pytest.approx(sum(values) / 3) and min(values) > 0
    assert len(metrics["needle"]["methods"][1]["cells"]) == 4
    assert {cell["length"] for cell in metrics["needle"]["methods"][1]["by"]["length"]} == {200, 260}
    assert "| mass | 30% | 0.3" in outcome.table and "## r\n\n| method | budget | average |" in outcome.table


def test_distances_from_a_reference_are_paired(done, folder):
    plan, _, output, _ = done
    plan = plan_of(folder, output, reference="mass")
    records = read_records(output)
    summary = summarise(plan, records)
    full, mass, h2o = summary["tasks"]["fidelity"]["methods"]
    assert "to_reference" not in full and "to_reference" not in mass
    kl = {name: [r["scores"]["kl"] for r in records.values() if (r["task"], r["method"]) == ("fidelity", name)]
          for name in ("mass", "h2o")}  # fmt: skip
    apart = [b - a for a, b in zip(kl["mass"], kl["h2o"], strict=True)]
    assert h2o["to_reference"]["mean"] == pytest.approx(sum(apart) / 3)
    assert h2o["to_reference"]["se"] == pytest.approx(statistics.stdev(apart) / 3**0.5)
    table = report(summary, {})
    assert "| kl: minus mass |" in table and "minus" not in report(summarise(plan_of(folder, output), records), {})


def test_finished_rows_are_not_run_again(done, folder, tmp_path, monkeypatch):
    plan, _, output, _ = done
    lines = (output / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines[:10]) + "\n")
    # What a killed run leaves: a rank's file whose last line is broken.
    (tmp_path / "predictions.rank0003.jsonl").write_text("\n".join(lines[10:14]) + "\n" + lines[14][:40])
    counted: list[int] = []
    again = plan_of(folder, tmp_path)
    outcome = run(again, on_results=counted.append)
    assert sum(counted) == 27 - 14 and outcome.num_results == 27
    assert comparable(tmp_path) == comparable(output)
    monkeypatch.setattr(runner_module.EvalRunner, "run_batch", None)
    assert run(again).num_results == 27
    # Another budget is another result; the old ones stay.
    monkeypatch.undo()
    counted.clear()
    run(plan_of(folder, tmp_path, keep_ratios=[0.3, 0.6], tasks=TASKS[1:2]), on_results=counted.append)
    assert sum(counted) == 3 * 2 and len(read_records(tmp_path)) == 27 + 6


def test_a_grid_is_extended(done, folder, tmp_path):
    """Rows that were there are not run again, and their results are those of a run of their own."""
    *_, output, _ = done
    (tmp_path / "predictions.jsonl").write_text((output / "predictions.jsonl").read_text())
    wider = {**TASKS[0], "lengths": [200, 230, 260], "depths": [0, 0.4, 1], "samples": 2}
    counted: list[int] = []
    outcome = run(plan_of(folder, tmp_path, tasks=[wider]), on_results=counted.append)
    assert (sum(counted), outcome.num_results) == ((18 - 4) * 3, 18 * 3)
    old = comparable(output)
    assert {key: record for key, record in comparable(tmp_path).items() if key in old} == old


def test_batches_change_nothing(done, folder, tmp_path):
    *_, output, _ = done
    run(plan_of(folder, tmp_path, batch_size=3, prefill_chunk=64))
    assert comparable(tmp_path) == comparable(output)


def test_hidden_questions_are_other_results(done, folder, tmp_path):
    *_, output, _ = done
    run(plan_of(folder, tmp_path, question="hidden", tasks=TASKS[:1]))
    visible, hidden = comparable(output), comparable(tmp_path)
    assert {record["text"] for key, record in hidden.items() if key[2] == "full"} == {
        record["text"] for key, record in visible.items() if key[0] == "needle" and key[2] == "full"
    }
    differs = [key for key in hidden if key[2] != "full" and hidden[key]["held_bytes"] != visible[key]["held_bytes"]]
    assert len(differs) == 8  # the question's own tokens do not count towards the budget
    assert not {record["key"] for record in hidden.values()} & {record["key"] for record in visible.values()}


def test_one_failing_method_does_not_stop_the_others(folder, tmp_path, monkeypatch):
    start = Reading.start

    def fail_for_h2o(self, config, *rest, **named):
        if config.keep_ratio == 0.3 and config.score == Accumulated():
            raise RuntimeError("out of something")
        return start(self, config, *rest, **named)

    monkeypatch.setattr(Reading, "start", fail_for_h2o)
    log: list[str] = []
    plan = plan_of(folder, tmp_path, tasks=TASKS[1:2], methods=[METHODS[1], METHODS[0]], batch_size=2)
    outcome = run(plan, log=log.append)
    assert outcome.num_missing == 3 and outcome.num_results == 6
    assert "a batch of 2 rows of fidelity failed (RuntimeError: out of something)" in log[0]
    assert sum("h2o@30%: RuntimeError: out of something" in line for line in log) == 3
    assert "Incomplete, of 3 rows: h2o@30% 0." in outcome.table
    monkeypatch.undo()
    counted: list[int] = []
    assert run(plan, on_results=counted.append).num_missing == 0
    assert sum(counted) == 3


def test_what_fails_on_one_rank_of_a_request_is_no_bad_usage(folder, tmp_path, monkeypatch):
    """Bad usage is said by rank 0 alone, and this may happen on another one."""

    def fails(*args):
        raise ValueError("not on rank 0")

    monkeypatch.setattr(runner_module.EvalRunner, "_shared", True)
    monkeypatch.setattr(runner_module.EvalRunner, "_read", fails)
    with pytest.raises(BatchError, match="rows 260-1-0 of needle failed: ValueError: not on rank 0"):
        run(plan_of(folder, tmp_path, tasks=TASKS[:1]))


def test_an_interruption_keeps_what_is_written(folder, tmp_path):
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    plan = plan_of(folder, tmp_path, tasks=TASKS[:1])
    outcome = run(plan, on_results=stop)
    assert outcome.interrupted and outcome.table is None and len(read_records(tmp_path)) == 1
    assert run(plan).num_missing == 0


def test_a_stop_keeps_what_is_written_and_the_same_command_goes_on(folder, tmp_path):
    plan, stop = plan_of(folder, tmp_path, tasks=TASKS[:1]), Stop()
    line = r"stopped \(TEST\); 1 of 12 results are done and stay: the same command goes on"
    with pytest.raises(StoppedError, match=line) as caught:
        run(plan, on_results=lambda count: stop.ask(75, "TEST"), stop=stop)
    assert caught.value.status == 75 and len(read_records(tmp_path)) == 1
    assert run(plan).num_missing == 0


@pytest.mark.parametrize("what", ["file", "folder", "replaced"])
def test_records_that_are_taken_away_are_written_anew(done, folder, tmp_path, what):
    *_, output, _ = done
    out, counted, log = tmp_path / "out", [], []
    mine = out / "predictions.rank0000.jsonl"

    def meddle(count: int) -> None:
        counted.append(count)
        if len(counted) == 4:
            shutil.rmtree(out) if what == "folder" else mine.unlink()
            if what == "replaced":
                mine.write_text(to_line({"task": "mine", "key": "k", "error": None}))

    outcome = run(plan_of(folder, out, tasks=TASKS[1:2]), on_results=meddle, log=log.append)
    assert (outcome.num_results, outcome.num_missing) == (9, 0) and sum(counted) == 9
    place = out / "predictions.rank0000-1.jsonl" if what == "replaced" else mine
    how = "was replaced" if what == "replaced" else "was removed"
    assert log == [f"{mine} {how} while it was written: the results of this run are in {place}"]
    found = comparable_of([record for record in read_records(out).values() if record["task"] != "mine"])
    assert found == {key: record for key, record in comparable(output).items() if key[0] == "fidelity"}


def rival(rank: int, world: int, folder: str, output: str) -> tuple[int, str]:
    """Rank 0 waits at its first result until rank 1 has been refused; rank 1 tries again when rank 0 is done."""
    tried, begun, counted = Path(output + ".tried"), Path(output + ".begun"), []

    def wait_for(path: Path) -> None:
        while not path.exists():
            time.sleep(0.02)

    def on_results(count: int) -> None:
        counted.append(count)
        begun.touch()
        wait_for(tried)

    plan, said = plan_of(folder, output, tasks=TASKS[1:2]), ""
    if rank == 0:
        run(plan, on_results=on_results)
        Path(output + ".done").touch()
    else:
        wait_for(begun)
        try:
            run(plan)
        except ValueError as error:
            said = str(error)
        tried.touch()
        wait_for(Path(output + ".done"))
        run(plan, on_results=counted.append)
    return sum(counted), said


def test_two_evaluations_do_not_write_into_one_folder(done, folder, tmp_path):
    *_, output, _ = done
    mine = tmp_path / "out"
    (first, _), (second, said) = run_ranks(2, rival, folder, str(mine), init=False, timeout_s=120)
    assert (first, second) == (9, 0) and f"output {mine} is written by process" in said
    assert comparable(mine) == {key: record for key, record in comparable(output).items() if key[0] == "fidelity"}
    assert not [path.name for path in mine.iterdir() if path.name.startswith(".")]


def dies(rank: int, world: int, folder: str, output: str) -> None:
    def on_results(count: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run(plan_of(folder, output, tasks=TASKS[1:2]), on_results=on_results)


def test_a_killed_evaluation_is_resumed(folder, tmp_path):
    run_ranks(1, dies, folder, str(tmp_path), init=False, lost=[0], timeout_s=120)
    assert (tmp_path / ".lock").exists() and len(read_records(tmp_path)) == 1
    counted: list[int] = []
    assert run(plan_of(folder, tmp_path, tasks=TASKS[1:2]), on_results=counted.append).num_missing == 0
    assert sum(counted) == 8 and not (tmp_path / ".lock").exists()


def rank_evaluates(rank: int, world: int, folder: str, output: str, tasks: list, parallel: dict) -> tuple[int, bool]:
    outcome = evaluate(plan_of(folder, output, tasks=tasks, parallel=parallel), build_mesh(dp=world))
    return outcome.num_results, outcome.table is not None


@pytest.mark.multirank
def test_replicas_share_the_rows(done, folder, tmp_path):
    *_, output, _ = done
    found = run_ranks(2, rank_evaluates, folder, str(tmp_path), TASKS[1:2], {}, timeout_s=300)
    assert found == [(9, True), (9, False)]
    assert comparable(tmp_path) == {key: record for key, record in comparable(output).items() if key[0] == "fidelity"}


def rank_of_a_machine(rank: int, world: int, folder: str, output: str, tasks: list, sp: int) -> int:
    # As if each rank's machine had a file system of its own.
    plan = plan_of(folder, f"{output}/{rank}", tasks=tasks, parallel={"sp": sp})
    if sp == 1:
        with pytest.raises(ValueError, match=r"cannot be seen by rank 0: with several replicas \(dp\)"):
            evaluate(plan, build_mesh(dp=world))
        return len(read_records(Path(output) / str(rank)))
    return sum(evaluate(plan, build_mesh(sp=sp)).num_results for _ in range(2))


@pytest.mark.multirank
@pytest.mark.parametrize(("sp", "found"), [(1, 0), (2, 6)])
def test_machines_that_do_not_share_the_folder(folder, tmp_path, sp, found):
    tasks = [{**TASKS[1], "continuation": "decode", "samples": 1}]
    assert run_ranks(2, rank_of_a_machine, folder, str(tmp_path), tasks, sp, timeout_s=300) == [found, found]
    assert [len(read_records(tmp_path / str(rank))) for rank in range(2)] == [found // 2, 0]


@pytest.mark.multirank
@pytest.mark.parametrize("question", ["visible", "hidden"])
def test_ranks_that_share_a_request_find_what_one_finds(folder, tmp_path, question):
    tasks = [{**TASKS[0], "lengths": [200], "depths": 1}, {**TASKS[1], "continuation": "decode", "samples": 1}]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(plan_of(folder, alone, tasks=tasks, question=question, methods=[*METHODS, TWICE]))
    found = run_ranks(2, rank_asks, folder, str(shared), tasks, question, timeout_s=300)
    assert found == [8, 8]
    assert comparable(shared) == comparable(alone)


def rank_asks(rank: int, world: int, folder: str, output: str, tasks: list, question: str) -> int:
    plan = plan_of(
        folder, output, tasks=tasks, question=question, methods=[*METHODS, TWICE], parallel={"sp": 2}
    )
    return evaluate(plan, build_mesh(1, 2, 1)).num_results


def test_parallel_checks(folder, tmp_path):
    def config(task=TASKS[0], **parallel) -> EvalConfig:
        return plan_of(folder, tmp_path, tasks=[task], parallel=parallel).config

    assert check_parallel(config(), 4) == 4 and check_parallel(config(dp=2), 2) == 2
    with pytest.raises(ValueError, match=r"world size \(3\) must equal dp \(2\)"):
        check_parallel(config(dp=2), 3)
    values = {"model": folder, "output": "o", "tasks": TASKS[1:2], "methods": [], "parallel": {"sp": 2}}
    with pytest.raises(ValueError, match=r"task fidelity: continuation \(chunk\) needs a request on one rank"):
        check_parallel(EvalConfig.from_dict(values), 2)
    with pytest.raises(ValueError, match="method reread@30%: score.rule reread .* cache_layout is sequence"):
        plan_of(folder, tmp_path, methods=["reread"], parallel={"sp": 2, "sp_prefill": "allgather"})


def test_what_is_wrong_is_found_before_the_weights(folder, tmp_path):
    with pytest.raises(ValueError, match="method mass@30%: budget.protected_layers has 9, but the model has 2 layers"):
        plan_of(folder, tmp_path, methods=[{"name": "mass", "preset": "lean", "budget": {"protected_layers": [9]}}])
    with pytest.raises(ValueError, match="task needle: row 260-0-0: the prompt has .* above the limit of 200"):
        plan_of(folder, tmp_path, tasks=TASKS[:1], max_prompt_tokens=200, truncation="error")
    with pytest.raises(ValueError, match="does not exist"):
        plan_of(folder, tmp_path, tasks=[{**TASKS[0], "haystack": "nowhere.txt"}])


def test_rows_of_one_task_have_ids_of_their_own(folder, tmp_path):
    # Two rows of one id would be counted as one.
    write(tmp_path, "trec", [row_of("trec", 0), row_of("trec", 1, _id="id0")])
    with pytest.raises(ValueError, match="task longbench/trec: two rows have the id id0"):
        plan_of(folder, tmp_path, tasks=[{"kind": "longbench", "data": str(tmp_path), "tasks": ["trec"]}])


def test_a_broken_merged_file_is_an_error(tmp_path):
    with RankFile(tmp_path, 0) as file:
        file.write([{"key": "a", "error": None}, {"key": "b", "error": "x"}])
    assert list(read_records(tmp_path)) == ["a"]
    (tmp_path / "predictions.jsonl").write_text('{"key": "c", "error": null}\nnope\n')
    with pytest.raises(ValueError, match="predictions.jsonl line 2 is not a record"):
        read_records(tmp_path)
