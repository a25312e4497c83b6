"""`EvalConfig`: YAML in and out, methods at budgets, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.fields.io import dump_yaml
from d2o_dist.policy import D2OConfig
from tests.spec import spec

REPO = Path(__file__).resolve().parents[2]
BASE = {"model": "m", "output": "o", "tasks": [{"kind": "needle", "lengths": [128]}], "keep_ratios": [0.5, 0.2]}
CONFIGS = sorted((REPO / "configs").glob("eval_*.yaml"))
STUDIES = sorted((REPO / "studies").glob("*.yaml"))


def make(**values) -> EvalConfig:
    return EvalConfig.from_dict({**BASE, **values})


def test_round_trip(tmp_path):
    tasks = [
        {"kind": "needle", "lengths": [128, 256], "depths": 3},
        {"kind": "ruler", "lengths": 1000, "tasks": ["vt", "cwe"]},
        {"kind": "longbench", "data": "folder", "tasks": "all", "samples": 3},
        {"kind": "jsonl", "data": "file", "question": "{q}", "stop": ["\n"], "samples": 3},
        {"kind": "perplexity", "lengths": [64]},
        {"kind": "fidelity", "lengths": [64], "continuation": "decode"},
    ]
    config = make(
        tasks=tasks, methods=["lean", {"name": "x", "preset": "lean", "recent_fraction": 0.7}], parallel={"dp": 2}
    )
    assert config.tasks[0].depths == (0.0, 0.5, 1.0) and len(config.tasks[2].tasks) == 21
    assert EvalConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config.to_dict()))
    assert EvalConfig.load(path) == config
    assert EvalConfig.load(path, [("keep_ratios", [0.1]), ("parallel.dp", None)]).keep_ratios == (0.1,)


def test_full_comes_first_and_every_method_runs_at_every_budget():
    variant = {"name": "x", "preset": "lean", "merge": {"targets": {"fraction": 0.2}}}
    methods = make(methods=["full", "h2o", variant], keep_tokens=[64])
    expanded = methods.expand_methods()
    assert [method.label for method in expanded] == [
        "full", "h2o@50%", "h2o@20%", "h2o@64 tokens", "x@50%", "x@20%", "x@64 tokens",
    ]  # fmt: skip
    assert expanded[0].d2o == D2OConfig.preset("full")
    assert expanded[3].d2o == spec("h2o", keep_tokens=64)
    assert expanded[5].d2o == spec("lean", keep_ratio=0.2, tail_fraction=0.2)
    assert [method.label for method in make(methods=[], keep_ratios=[]).expand_methods()] == ["full"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tasks": []}, "tasks .* must be a list of at least one task"),
        ({"tasks": [{"kind": "neelde", "lengths": [99]}]}, 'Did you mean "needle"'),
        ({"methods": ["lean"], "reference": "h2o"}, r"reference \('h2o'\) must be one of lean"),
        ({"methods": ["full", "lean"], "reference": "full"}, r"reference \('full'\) must be one of lean"),
        ({"tasks": [{"kind": "needle"}]}, "a task of kind needle needs lengths"),
        ({"tasks": [{"kind": "needle", "lengths": [10]}]}, r"lengths \(10\) must be in \[64, 16777216\]"),
        ({"tasks": [{"kind": "needle", "lengths": [99], "depths": [1.5]}]}, r"depths has 1.5; a depth must be in"),
        ({"tasks": [{"kind": "needle", "lengths": [99], "fact": "a"}]}, "fact, question and answer belong together"),
        ({"tasks": [{"kind": "needle", "lengths": [99], "depth": 2}]}, 'no field "depth". Did you mean "depths"'),
        ({"tasks": [{"kind": "ruler", "lengths": [999], "tasks": ["vtt"]}]}, 'Did you mean "vt"'),
        ({"tasks": [{"kind": "ruler", "lengths": [999], "tasks": "all"}]}, "qa_1 needs qa_1_file"),
        ({"tasks": [{"kind": "longbench", "data": "x", "tasks": "lc"}]}, 'Did you mean "lcc"'),
        ({"tasks": [{"kind": "jsonl", "data": "x"}]}, "question, prefix and question_from are all empty"),
        ({"tasks": [{"kind": "jsonl", "data": "x", "prefix": "a", "metric": "rouge"}]}, 'Did you mean "rouge_'),
        ({"tasks": [{"kind": "jsonl", "data": "x", "question": 3}]}, r"question \(3\) must be a string"),
        ({"tasks": BASE["tasks"] * 2}, '2 tasks have the name "needle"'),
        ({"keep_ratios": []}, "keep_ratios and keep_tokens are both empty"),
        ({"keep_ratios": [1.2]}, r"method d2o at 120%: keep_ratio \(1.2\) must be in \(0, 1\]"),
        ({"methods": ["snapkvv"]}, 'Did you mean "snapkv"'),
        ({"methods": ["d2o", {"name": "d2o", "preset": "lean"}]}, '2 methods would be called "d2o@50%" in results'),
        ({"keep_ratios": [0.1, 0.10000001]}, '2 methods would be called "d2o@10%" in results'),
        ({"methods": [{"name": "x", "preset": ["d2o"]}]}, r"method x at 50%: no preset \"\['d2o'\]\""),
        ({"methods": [{"name": "x", "preset": "d2o", 1: 2}]}, 'method x at 50%: D2OConfig has no field "1"'),
        ({"tasks": [{"kind": ["needle"]}]}, r"task kind \(\['needle'\]\) must be one of needle"),
        ({"methods": [{"preset": "lean"}]}, "a method's name"),
        ({"methods": [{"name": "x", "keep_ratio": 0.1}]}, "method x sets keep_ratio: budgets are given once"),
        ({"methods": [{"name": "x", "reading": "auto"}]}, r"method x at 50%: reading \('auto'\) must be one of whole"),
        ({"methods": [{"name": "x", "preset": "reread", "reading": "layerwise"}]}, "x at 50%: .* the prompt a second"),
        ({"methods": [{"name": "x", "preset": "lean", "reading": "stream"}]}, "x at 50%: .* needs keep_tokens"),
        ({"methods": [{"name": "x", "prest": "lean"}]}, 'method x at 50%: .*no field "prest"'),
        ({"methods": [{"name": "full", "preset": "lean"}]}, 'the method "full" is the uncompressed cache'),
        ({"question": "seen"}, "question .* must be one of visible, hidden"),
        ({"batch_sizes": 3}, 'Did you mean "batch_size"'),
        ({"parallel": {"dpp": 2}}, 'ParallelConfig has no field "dpp"'),
        ({"model": None}, "model is missing"),
        ({"dtype": "float8"}, "dtype"),
    ],
)  # fmt: skip
def test_refusals(values, words):
    with pytest.raises(ValueError, match=words):
        make(**values)


def test_lengths_and_depths_count_once():
    (task,) = make(tasks=[{"kind": "needle", "lengths": [128, 256, 128], "depths": [0.5, 0.50000001, 1]}]).tasks
    assert task.lengths == (128, 256) and task.depths == (0.5, 1.0)


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_are_valid(path):
    assert EvalConfig.load(path).expand_methods()[0].name == "full"


def test_there_are_shipped_configurations():
    assert "eval_smollm2" in {path.stem for path in CONFIGS} and "defaults" in {path.stem for path in STUDIES}


def test_a_minimum_for_all_methods_that_name_none():
    methods = ["d2o", "reread", "paper", {"name": "own", "preset": "h2o", "budget": {"min_layer_tokens": 7}}]
    for given, expected in ((None, [256, 256, 16, 32, 7]), (8, [256, 8, 16, 32, 7])):
        config = make(methods=methods, keep_ratios=[0.2], min_layer_tokens=given)
        assert [method.d2o.budget.min_layer_tokens for method in config.expand_methods()] == expected
    with pytest.raises(ValueError, match="min_layer_tokens"):
        make(min_layer_tokens=-1)
