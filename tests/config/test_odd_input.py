"""Input that is too long, too deep, too large or of another kind: one short `ValueError` that names the field."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.infer import InferConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.engine.prompts import parse_row
from d2o_dist.fields.overrides import parse_override
from d2o_dist.policy.config import D2OConfig

MEGABYTES = "x" * 2_000_000
DEEP: list = []
for _ in range(3000):
    DEEP = [DEEP]
INFER = {"model": "m"}
NEEDLE = {"kind": "needle", "lengths": [128]}
EVAL = {"model": "m", "output": "o", "tasks": [NEEDLE], "keep_ratios": [0.5]}
TRAIN = {"model": "m", "output": "o", "data": {"train": "t"}}


def refusal(make) -> str:
    """What `make()` is refused with, which must be one short line."""
    with pytest.raises(ValueError) as refused:
        make()
    said = str(refused.value)
    assert len(said) < 600 and "\n" not in said
    return said


@pytest.mark.parametrize("value", [MEGABYTES, [MEGABYTES] * 9, {MEGABYTES: 1}, DEEP, 10**5000, torch.zeros(99, 99)],
                         ids=["text", "list", "mapping", "deep", "digits", "tensor"])  # fmt: skip
def test_an_error_repeats_a_part_of_a_value(value):
    for kind, good, name in (
        (InferConfig, INFER, "dtype"), (InferConfig, INFER, "max_batch_size"), (InferConfig, INFER, "stream"),
        (InferConfig, INFER, "parallel"), (InferConfig, INFER, "d2o"), (InferConfig, INFER, "overwrite"),
        (EvalConfig, EVAL, "keep_ratios"), (EvalConfig, EVAL, "reference"), (TrainConfig, TRAIN, "keep_ratio"),
        (TrainConfig, TRAIN, "engine"), (D2OConfig, {}, "score"), (D2OConfig, {}, "keep_ratio"),
        (D2OConfig, {}, "merge"),
    ):  # fmt: skip
        said = refusal(lambda kind=kind, good=good, name=name: kind.from_dict({**good, name: value}))
        assert name in said.lower()  # as in ParallelConfig


def test_an_error_repeats_a_part_of_a_name():
    assert "InferConfig has no field" in refusal(lambda: InferConfig.from_dict({**INFER, MEGABYTES: 1}))
    assert "score" in refusal(lambda: D2OConfig(score={"rule": MEGABYTES}))
    assert "no preset" in refusal(lambda: D2OConfig.preset(MEGABYTES))
    assert "override" in refusal(lambda: parse_override(MEGABYTES))
    assert "model" in refusal(lambda: InferConfig.load(None, [("model", "m"), (f"model.{MEGABYTES}.x", 1)]))


def test_numbers_of_hundreds_of_digits():
    for kind, values, name in (
        (InferConfig, {**INFER, "sampling": {"temperature": 10**400}}, "temperature"),
        (InferConfig, {**INFER, "sampling": {"max_new_tokens": 10**400}}, "max_new_tokens"),
        (EvalConfig, {**EVAL, "keep_ratios": [10**400]}, "keep_ratios"),
        (TrainConfig, {**TRAIN, "optimizer": {"lr": 10**400}}, "lr"),
        (TrainConfig, {**TRAIN, "steps": 10**400}, "steps"),
        (D2OConfig, {"keep_tokens": 10**400}, "keep_tokens"),
        (D2OConfig, {"recent_fraction": 10**400}, "recent_fraction"),
    ):
        said = refusal(lambda kind=kind, values=values: kind.from_dict(values))
        assert name in said and len(said) < 200
    assert "steps=9" in refusal(lambda: parse_override(f"steps={'9' * 5000}"))


@pytest.mark.parametrize(
    "text", ["[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000, "!!timestamp x", "!!bool x", "!!float x",
             "2001-99-99", "1" + ":59" * 300 + ".0", "{a: 1, a: 2}"],
    ids=["lists", "mappings", "no time", "no truth", "no number", "no date", "too large", "twice"],
)  # fmt: skip
def test_what_yaml_cannot_say_is_named_by_file_or_override(tmp_path, text):
    assert refusal(lambda: parse_override(f"d2o={text}")).startswith('override "d2o=')
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\nd2o: {text}\n")
    assert refusal(lambda: InferConfig.load(path)).startswith(f"config file {path} ")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\n")
    assert f"config file {tmp_path / 'c.yaml'} cannot be read" in refusal(lambda: InferConfig.load(tmp_path / "c.yaml"))


def test_arrays_are_no_fields():
    for value in (torch.tensor([1, 2]), torch.tensor(0.5), np.array(["full", "d2o"])):
        for kind, good, name in (
            (D2OConfig, {}, "keep_ratio"), (D2OConfig, {}, "budget"), (InferConfig, INFER, "dtype"),
            (InferConfig, INFER, "stream"), (InferConfig, INFER, "d2o"), (EvalConfig, EVAL, "methods"),
            (EvalConfig, EVAL, "question"), (TrainConfig, TRAIN, "objective"), (TrainConfig, TRAIN, "d2o"),
        ):  # fmt: skip
            said = refusal(lambda kind=kind, good=good, name=name, value=value: kind.from_dict({**good, name: value}))
            assert name in said
        assert "keep_ratio" in refusal(lambda value=value: D2OConfig.preset("full", keep_ratio=value))
        assert "tasks" in refusal(lambda value=value: EvalConfig.from_dict({**EVAL, "tasks": [
            {"kind": "ruler", "lengths": [128], "tasks": value}]}))  # fmt: skip


@pytest.mark.parametrize("value", [[], False, 0, ""])
def test_what_is_empty_is_not_the_default(value):
    for kind, good, name in (
        (EvalConfig, EVAL, "parallel"), (InferConfig, INFER, "parallel"), (TrainConfig, TRAIN, "d2o"),
        (InferConfig, INFER, "d2o"), (TrainConfig, TRAIN, "distill"), (TrainConfig, TRAIN, "engine"),
    ):  # fmt: skip
        said = refusal(lambda kind=kind, good=good, name=name: kind.from_dict({**good, name: value}))
        assert "mapping of fields" in said
        assert kind.from_dict({**good, name: None}) == kind.from_dict(good)
    task = {"kind": "fidelity", "lengths": [64], "name": value}
    assert "name" in refusal(lambda: EvalConfig.from_dict({**EVAL, "tasks": [task]}))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({**NEEDLE, "depths": 10**9}, r"depths (1000000000) must be in [1, 100000]"),
        ({**NEEDLE, "samples": 10**9}, "lengths, depths and samples of task 'needle' make 5000000000 prompts"),
        ({**NEEDLE, "depths": 1000, "samples": 1000}, "make 1000000 prompts: a task has at most 100000"),
        ({**NEEDLE, "lengths": 10**9}, "lengths (1000000000) must be in [64, 16777216]"),
        ({**NEEDLE, "digits": 10**9}, "digits (1000000000) must be in [1, 1000]"),
        ({"kind": "ruler", "lengths": [128], "samples": 10**9}, "lengths and samples of task 'ruler' make"),
        ({"kind": "perplexity", "lengths": [128], "samples": 10**9}, "lengths and samples of task 'perplexity' make"),
    ],
)
def test_a_task_of_more_prompts_than_anybody_waits_for_is_refused_at_once(task, words):
    assert words in refusal(lambda: EvalConfig.from_dict({**EVAL, "tasks": [task]}))


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (InferConfig, {**INFER, "system_prompt": "be \ud800 kind"}, "system_prompt"),
        (InferConfig, {**INFER, "prompt": "\udcff"}, "prompt"),
        (InferConfig, {**INFER, "sampling": {"stop": ["\ud800"]}}, "stop"),
        (EvalConfig, {**EVAL, "tasks": [{**NEEDLE, "name": "\ud800"}]}, "name"),
        (EvalConfig, {**EVAL, "tasks": [{"kind": "jsonl", "data": "d", "question": "\ud800"}]}, "question"),
    ],
)
def test_half_a_surrogate_pair_is_named_where_it_stands(kind, values, name):
    said = refusal(lambda: kind.from_dict(values))
    assert said.startswith(f"{name} has half a surrogate pair ('\\u") and said.isascii()


def test_a_name_that_no_file_can_have_is_refused_by_its_field():
    jsonl = {"kind": "jsonl", "data": "a\0", "question": "{q}"}
    for kind, values, name in (
        (InferConfig, {"model": "\0"}, "model"), (InferConfig, {**INFER, "output": "a\0b"}, "output"),
        (InferConfig, {**INFER, "prompts": "\0"}, "prompts"), (EvalConfig, {**EVAL, "output": "\0"}, "output"),
        (EvalConfig, {**EVAL, "tasks": [jsonl]}, "data"), (TrainConfig, {**TRAIN, "output": "\0"}, "output"),
        (TrainConfig, {**TRAIN, "data": {"train": "\0"}}, "data.train"),
    ):  # fmt: skip
        said = refusal(lambda kind=kind, values=values: kind.from_dict(values))
        assert said.startswith(f"{name} ('") and said.endswith("has a null character, which no file's name has")
    assert InferConfig.from_dict({**INFER, "prompt": "a\0b"}).prompt == "a\0b"


def test_the_users_folder_may_be_a_tilde(monkeypatch):
    """A shell leaves it in `output=~/runs`; a name that only has one somewhere is another name."""
    monkeypatch.setenv("HOME", "/home/me")
    run = InferConfig.from_dict({**INFER, "model": "~/m", "output": "~/o", "prompts": "a~/p"})
    assert (run.model, run.output, run.prompts) == ("/home/me/m", "/home/me/o", "a~/p")
    assert EvalConfig.from_dict({**EVAL, "output": "~/o"}).output == "/home/me/o"
    trained = TrainConfig.from_dict({**TRAIN, "output": "~/o", "data": {"train": "~/t"}})
    assert (trained.output, trained.data.train) == ("/home/me/o", "/home/me/t")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "us\ud800er", "content": "hi"}]}, "messages[0].role has half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content has half a surrogate pair"),
        ({"prompt": "a", "stop": "\ud800"}, "stop has half a surrogate pair"),
        ({"prompt": "a", "max_new_tokens": 10**400}, "must be at most 9223372036854775807"),
        ({"prompt": "a", "max_new_tokens": MEGABYTES}, "max_new_tokens ('xxx"),
        ({"prompt": [MEGABYTES]}, "prompt (['xxx"),
        ({MEGABYTES: 1}, "this one has neither prompt nor messages, only xxx"),
        ({"prompt": "a", "id": {MEGABYTES: MEGABYTES}}, "id ({'xxx"),
    ],
)
def test_a_row_is_refused_in_short(row, words):
    found = parse_row(0, json.dumps(row).encode(), 1)
    assert words in found.error and len(found.error) < 600 and found.id == 0


def test_a_row_that_is_nested_too_deeply_is_refused():
    for deep in ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000):
        assert "nested too deeply" in parse_row(0, f'{{"prompt": "a", "other": {deep}}}'.encode(), 1).error
