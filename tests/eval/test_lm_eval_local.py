"""The tasks of lm-eval on local files (configs/lm_eval): as lm-eval's own, and through the harness on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.engine.tiny import make_folder

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from d2o_dist.eval.lm_eval import register  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "lm_eval"
OWN = Path(lm_eval.__file__).parent / "tasks"
LOCAL = {"task", "dataset_path", "dataset_name", "dataset_kwargs", "fewshot_config", "training_split", "tag"}


class Loader(yaml.SafeLoader):
    """YAML with `!function` left as text."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def read(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1024))


@pytest.fixture
def truthfulqa():
    sys.path.insert(0, str(FOLDER))
    import truthfulqa_local

    yield truthfulqa_local
    sys.path.remove(str(FOLDER))


def results(task: str, folder: str, shots: int | None = None) -> dict:
    register()
    found = lm_eval.simple_evaluate(
        model="d2o_dist", model_args={"pretrained": folder, "preset": "lean", "keep_ratio": 0.5, "max_gen_toks": 8},
        tasks=[task], device="cpu", task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        num_fewshot=shots, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    return {"scores": found["results"][task], "samples": found["samples"][task]}


def test_gsm8k_differs_from_lm_evals_in_its_data_only():
    own, local = read(OWN / "gsm8k" / "gsm8k.yaml"), read(FOLDER / "gsm8k_local.yaml")
    assert {key for key in {*own, *local} if own.get(key) != local.get(key)} <= LOCAL


def test_gsm8k_runs(folder, tmp_path, monkeypatch):
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    for name, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"{name} {i}?", "answer": f"So {i}.\n#### {i}"} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    found = results("gsm8k_local", folder, shots=2)
    assert 0 <= found["scores"]["exact_match,strict-match"] <= 1
    prompts = {sample["arguments"][0][0] for sample in found["samples"]}
    shots = "Question: train 0?\nAnswer: So 0.\n#### 0\n\nQuestion: train 1?\nAnswer: So 1.\n#### 1\n\n"
    assert prompts == {f"{shots}Question: test {i}?\nAnswer:" for i in range(2)}


def test_truthfulqa_has_lm_evals_prompt_and_score(truthfulqa):
    import jinja2

    own = read(OWN / "truthfulqa" / "truthfulqa_mc1.yaml")["doc_to_text"]
    assert truthfulqa.prompt({"question": "Why?"}) == jinja2.Template(own).render(question="Why?")
    assert read(OWN / "truthfulqa" / "truthfulqa_mc2.yaml")["metadata"] == {"version": 3.0}
    # Probabilities 0.1, 0.2, 0.5, up to a factor that exp could not hold.
    found = [(math.log(p) - 1000, False) for p in (0.1, 0.2, 0.5)]
    assert truthfulqa.process_results({"labels": [1, 0, 1]}, found) == {"acc": pytest.approx(0.6 / 0.8)}


def test_truthfulqa_runs_from_its_authors_file(folder, tmp_path, monkeypatch):
    rows = [
        {"question": "Is it?", "mc1_targets": {"Yes.": 1}, "mc2_targets": {"Yes.": 1, "It is.": 1, "No.": 0}},
        {"question": "Was it?", "mc1_targets": {"No.": 1}, "mc2_targets": {"Yes.": 0, "No.": 1}},
    ]
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    run = [sys.executable, str(FOLDER / "truthfulqa_local.py"), "mc_task.json", "data/truthfulqa/mc.jsonl"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "2 rows\n"
    found = results("truthfulqa_mc2_local", folder)
    assert [sample["doc"]["labels"] for sample in found["samples"]] == [[1, 1, 0], [0, 1]]
    assert 0 < found["scores"]["acc,none"] < 1
