"""The shipped configurations of the paper's rows, on a tiny model: every method and budget, on shorter prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.plan import prepare as prepare_inference
from d2o_dist.engine.runner import run
from d2o_dist.eval.evaluate import evaluate
from d2o_dist.eval.plan import prepare
from d2o_dist.fields.io import load_yaml
from tests.engine.tiny import make_folder
from tests.eval.parts import TEXT
from tests.eval.test_longbench import row_of, write

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (REPO / "configs").glob("eval_*.yaml"))
# What is cheaper here than there; all else is the file's.
SHORTER = {
    "needle": {"lengths": [300], "depths": 2, "samples": 1, "max_new_tokens": 3},
    "ruler": {"lengths": [700], "tasks": ["fwe"], "samples": 1},
    "fidelity": {"lengths": [200], "num_scored": 8, "samples": 1},
    "longbench": {"tasks": ["passage_count"], "samples": 1},
    "jsonl": {"samples": 1, "max_new_tokens": 3},
}
_LONG = "some words of a paragraph " * 60
# A row with the fields of every file that configurations name.
ROW = {
    "input": f"{_LONG}\nWhat is the special magic uuid for it? It is", "outputs": ["one"],
    "ordered_kv_records": [[f"key {i}", f"value {i}"] for i in range(60)], "key": "key 3", "value": "value 3",
    "prompt": f"{_LONG}\n\nNow the record is over. I need the number. ", "expected_number": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1536, num_hidden_layers=4))


def on_this_machine(name: str, folder: str, tmp_path) -> dict:
    values = load_yaml(REPO / "configs" / f"{name}.yaml")
    return {**values, "model": folder, "output": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, folder, tmp_path):
    values = on_this_machine(name, folder, tmp_path)
    write(tmp_path, "passage_count", [row_of("passage_count", context="some words of a paragraph " * 60)])
    write(tmp_path, "rows", [ROW])
    data = {"longbench": {"data": str(tmp_path)}, "jsonl": {"data": str(tmp_path / "rows.jsonl")}}
    tasks = [{**task, **SHORTER[task["kind"]], **data.get(task["kind"], {})} for task in values["tasks"]]
    config = EvalConfig.from_dict({**values, "tasks": tasks})
    prepare(config, {"essays": lambda: TEXT})
    plan = prepare(dataclasses.replace(config, keep_ratios=(0.2,)), {"essays": lambda: TEXT})
    assert evaluate(plan, ParallelMesh.local()).num_missing == 0
    # Short prompts: `min_layer_tokens` holds layers above what `paper` would give them.
    for task in json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"].values():
        kept = {line["label"]: line["achieved_keep_ratio"] for line in task["methods"]}
        assert kept["full"] == 1 and len(kept) == len(values["methods"]) + 1
        same = ("paper", "d2o", "snapkv")
        assert all(kept[f"{name}@20%"] == pytest.approx(0.2, abs=0.06) for name in same if f"{name}@20%" in kept)


def test_time_to_first_token(folder, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    config = InferConfig.load(
        REPO / "configs" / "infer_paper_ttft_32k.yaml",
        [("model", folder), ("device", "cpu"), ("dtype", "float32"), ("prompts", str(tmp_path / "book.txt")),
         ("output", str(tmp_path / "out.jsonl")), ("max_prompt_tokens", 500), ("sampling.max_new_tokens", 4)],
    )  # fmt: skip
    summary = run(config, prepare_inference(config))
    assert summary.num_ok == 1 and summary.num_prompt_tokens == 500 and summary.median_time_to_first_token_s > 0
