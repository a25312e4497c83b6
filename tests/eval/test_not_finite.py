"""Rows that a model makes NaN of are errors: not 0, not NaN, and no reason to stop the others."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from d2o_dist.cli import evaluate as cli
from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.eval.aggregate import summarise_cell
from d2o_dist.eval.continuation import compare, lost_rows
from d2o_dist.eval.evaluate import evaluate
from d2o_dist.eval.plan import prepare
from d2o_dist.eval.reading import Reading
from d2o_dist.eval.store import RankFile, read_records
from d2o_dist.fields.io import dump_yaml
from tests.engine.tiny import make_folder, make_tokenizer
from tests.eval.parts import TEXT
from tests.ranks import run_ranks

POISON = "東"  # its first token is the one whose embedding is NaN
SMALL = {"budget": {"min_layer_tokens": 8}}
METHODS = [
    {"name": "snapkv", "preset": "snapkv", **SMALL},
    {"name": "paper", "preset": "paper", **SMALL},  # whose budgets need the attention of the prompt
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("model"), template=False, max_position_embeddings=640)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    embeddings = model.get_input_embeddings().weight.data
    assert embeddings.data_ptr() != model.lm_head.weight.data_ptr()
    embeddings[make_tokenizer()(POISON)["input_ids"][0]] = torch.nan
    model.save_pretrained(folder)
    return str(folder)


def plan_of(folder, tmp_path, tasks, **values):
    rows = tmp_path / "rows.jsonl"
    texts = [f"the quick brown {word} jumps over the lazy dog " * 3 for word in ("fox", POISON, "cache")]
    rows.write_text("".join(json.dumps({"context": text, "answers": ["none"]}) + "\n" for text in texts))
    tasks = [{**task, "data": str(rows)} if task["kind"] == "jsonl" else task for task in tasks]
    values = {"model": folder, "output": str(tmp_path / "out"), "device": "cpu", "tasks": tasks, "methods": METHODS,
              "keep_ratios": [0.6], **values}  # fmt: skip
    # The first passage has it in its prompt, the last in its continuation.
    return prepare(EvalConfig.from_dict(values), {"essays": lambda: f"{POISON} {TEXT} {POISON} the fox"})


ROWS = {"kind": "jsonl", "question": "what is it?", "max_new_tokens": 4}
PASSAGES = {"lengths": [64], "num_scored": 20, "samples": 3}


def strict(path) -> list:
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.read_text().splitlines()]


def check_output(outcome, plan, lost: int) -> dict:
    """Nothing but JSON, the good rows alone in means, failed ones counted; the metrics of the task."""
    (task,) = [task.name for task in plan.tasks]
    assert (outcome.num_results, outcome.num_missing) == (3 * (3 - lost), 3 * lost)
    assert len(strict(outcome.folder / "predictions.jsonl")) == 3 * (3 - lost)
    metrics = json.loads((outcome.folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    lines = metrics["tasks"][task]["methods"]
    assert [(line["n"], line["num_failed"]) for line in lines] == [(3 - lost, lost)] * 3
    assert f"Failed: full {lost}, snapkv@60% {lost}, paper@60% {lost}." in outcome.table
    return metrics["tasks"][task]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("question", ["visible", "hidden"])
def test_answers(folder, tmp_path, batch_size, question):
    plan = plan_of(folder, tmp_path, [ROWS], batch_size=batch_size, question=question)
    log: list[str] = []
    outcome = evaluate(plan, ParallelMesh.local(), log=log.append)
    check_output(outcome, plan, 1)
    assert {record["row"] for record in read_records(outcome.folder).values()} == {"1", "3"}
    start = "the logits of new token 1, right after the prompt, are NaN or infinite, and keys or values from layer 0 on"
    for label in ("full", "snapkv@60%"):
        (line,) = [line for line in log if line.startswith(f"jsonl row 2, {label}: ")]
        assert line.startswith(f"jsonl row 2, {label}: {start}: weights of the model are not finite")
    (line,) = [line for line in log if line.startswith("jsonl row 2, paper@60%: ")]
    assert "paper@60%: the prompt's attention is not finite in 2 of 2 layers, the first of them 0: weights" in line


@pytest.mark.parametrize("kind", ["perplexity", "fidelity"])
@pytest.mark.parametrize("continuation", ["chunk", "decode"])
def test_continuations(folder, tmp_path, kind, continuation):
    plan = plan_of(folder, tmp_path, [{"kind": kind, "continuation": continuation, **PASSAGES}], batch_size=3)
    log: list[str] = []
    outcome = evaluate(plan, ParallelMesh.local(), log=log.append)
    task = check_output(outcome, plan, 2)
    assert all(line["scores"]["nll"]["mean"] > 0 for line in task["methods"])
    (first,) = [line for line in log if line.startswith(f"{kind} row 64-0, snapkv@60%: ")]
    assert "snapkv@60%: the logits of token 1 of the continuation are NaN or infinite: weights" in first
    last = [line for line in log if line.startswith(f"{kind} row 64-2, ")]
    assert len(last) == 3 and all("logits of token " in line and "logits of token 1 " not in line for line in last)


def test_what_is_wrong_with_the_full_cache_is_said(folder, tmp_path, monkeypatch):
    """Nothing can be compared with it, however sound the other is."""
    start = Reading.start

    def spoil(self, config, *rest, **named):
        session = start(self, config, *rest, **named)
        if config.keeps_everything:
            session._logits = torch.full_like(session._logits, torch.nan)
        return session

    monkeypatch.setattr(Reading, "start", spoil)
    plan = plan_of(folder, tmp_path, [{"kind": "fidelity", **PASSAGES}])
    log: list[str] = []
    outcome = evaluate(plan, ParallelMesh.local(), log=log.append)
    assert outcome.num_results == 0 and "no results" in outcome.table
    assert any("row 64-1, snapkv@60%: the full cache's logits of token 1 of the continuation" in line for line in log)


def test_a_method_all_of_whose_rows_failed_has_no_figure(folder, tmp_path, monkeypatch):
    start = Reading.start

    def spoil(self, config, *rest, **named):
        session = start(self, config, *rest, **named)
        if config.score == plan.methods[1].d2o.score:
            session._logits = torch.full_like(session._logits, torch.inf)
        return session

    monkeypatch.setattr(Reading, "start", spoil)
    plan = plan_of(folder, tmp_path, [ROWS])
    outcome = evaluate(plan, ParallelMesh.local())
    line = json.loads((outcome.folder / "metrics.json").read_text())["tasks"]["jsonl"]["methods"][1]
    assert {name: line[name] for name in ("label", "n", "num_failed", "scores", "achieved_keep_ratio")} == {
        "label": "snapkv@60%", "n": 0, "num_failed": 3, "scores": None, "achieved_keep_ratio": None,
    }  # fmt: skip
    assert "| snapkv | 60% | - | - | - | - | 0 |" in outcome.table and "Failed: full 1, snapkv@60% 3" in outcome.table


def test_the_exit_status(folder, tmp_path, capsys):
    plan = plan_of(folder, tmp_path, [ROWS])
    (tmp_path / "c.yaml").write_text(dump_yaml(plan.config.to_dict()))
    assert cli.main(["--config", str(tmp_path / "c.yaml")]) == 1
    said = capsys.readouterr()
    assert "6 done, 3 missing" in said.out and "jsonl row 2, full: the logits of new token 1" in said.err


def test_a_score_that_is_no_number_is_an_error(folder, tmp_path, monkeypatch):
    plan = plan_of(folder, tmp_path, [ROWS])
    monkeypatch.setattr(type(plan.tasks[0]), "score", lambda *args: {"score": float("nan")})
    log: list[str] = []
    outcome = evaluate(plan, ParallelMesh.local(), log=log.append)
    assert outcome.num_results == 0 and "jsonl row 1, full: its score is nan" in log


def test_old_records_with_nan_are_made_again(folder, tmp_path):
    plan = plan_of(folder, tmp_path, [ROWS])
    outcome = evaluate(plan, ParallelMesh.local())
    key = next(iter(read_records(outcome.folder)))
    path = outcome.folder / "predictions.jsonl"
    lines = [line.replace('"score": 0.0', '"score": NaN') if key in line else line for line in path.open()]
    assert "NaN" in "".join(lines)
    path.write_text("".join(lines))
    counted: list[int] = []
    assert evaluate(plan, ParallelMesh.local(), on_results=counted.append).num_results == 6
    assert sum(counted) == 1 + 3 and len(strict(path)) == 6


def test_tokens_that_a_model_rules_out_are_no_fault():
    logits = torch.randn(2, 5, 9)
    logits[..., 7:] = -torch.inf
    other = logits + torch.randn(2, 5, 9).masked_fill(logits.isinf(), 0)
    assert lost_rows(logits, RequestRanks.alone()) == [None, None]
    rows = [[1, 2, 3, 4, 5], [0] * 5]
    kept = compare(other[..., :7], logits[..., :7], rows)
    for found, want in zip(compare(other, logits, rows), kept, strict=True):
        assert found == pytest.approx(want) and found["kl"] > 0
    logits[1, 3, 2] = torch.inf
    assert [error is not None for error in lost_rows(logits, RequestRanks.alone())] == [False, True]
    assert "token 4 of the continuation" in lost_rows(logits, RequestRanks.alone())[1]


def test_a_perplexity_beyond_all_numbers():
    row = {"scores": {"nll": 1e4}, "achieved_keep_ratio": 1.0, "held_bytes": 1, "full_bytes": 1}
    cell = summarise_cell({"a": row, "b": row}, {}, "nll")
    assert cell["scores"]["perplexity"] == {"mean": None, "se": None}


def test_the_file_refuses_what_json_has_not(tmp_path):
    with RankFile(tmp_path, 0) as file, pytest.raises(FloatingPointError, match="value.scores.kl = inf"):
        file.write([{"scores": {"kl": float("inf")}}])


def rank_evaluates(rank, world, folder, tmp_path, tasks, sp, tp):
    plan = plan_of(folder, tmp_path, tasks, parallel={"sp": sp, "tp": tp, "tp_engine": "transformers"}, batch_size=3)
    outcome = evaluate(plan, build_mesh(1, sp, tp))
    return outcome.num_results, outcome.num_missing


@pytest.mark.multirank
@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize("task", [ROWS, {"kind": "fidelity", "continuation": "decode", **PASSAGES}], ids=str)
def test_ranks_that_share_a_request(folder, tmp_path, task, sp):
    lost = 1 if task is ROWS else 2
    found = run_ranks(2, rank_evaluates, folder, tmp_path, [task], sp, 3 - sp, timeout_s=300, fresh=sp == 1)
    assert found == [(3 * (3 - lost), 3 * lost)] * 2
    strict(tmp_path / "out" / "predictions.jsonl")


def test_the_harness_is_told(folder):
    pytest.importorskip("lm_eval")
    from d2o_dist.eval.lm_eval import D2OLM

    lm = D2OLM(folder, device="cpu", preset="snapkv", keep_ratio=0.6, **SMALL)
    text = f"the quick brown {POISON} fox jumps over the lazy dog " * 2

    def asked(*args):
        return [SimpleNamespace(args=each) for each in args]

    arguments = {"max_gen_toks": 4}
    assert lm.generate_until(asked(("the quick fox", arguments)), True)
    with pytest.raises(FloatingPointError, match="request 1: the logits of new token 1, right after the prompt, are"):
        lm.generate_until(asked(("the quick fox", arguments), (text, arguments)), True)
    with pytest.raises(FloatingPointError, match="the logits of token 1 of the continuation are NaN"):
        lm.loglikelihood(asked((text, " dog")), True)
    lm._segment = 20
    late = "the quick brown fox jumps over a cache that keeps what it needs "
    count = len(lm.tok_encode(late, add_special_tokens=False))
    with pytest.raises(FloatingPointError, match=r"the logits of token \d+ of the continuation are NaN") as caught:
        lm.loglikelihood_rolling(asked((f"{late}{text}",)), True)
    # In the segment where it comes, not counted from its beginning.
    assert int(str(caught.value).split("token ")[1].split()[0]) > count // 20 * 20 >= 20
