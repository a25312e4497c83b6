"""What `overwrite=true` and output folders must never touch: what the run reads, and what is somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from d2o_dist.cli import evaluate, infer, train
from d2o_dist.engine import lock as locking
from d2o_dist.fields.io import dump_yaml
from d2o_dist.models import loading
from d2o_dist.train import model as train_model
from tests.engine.tiny import make_folder

ROWS = '{"id": "a", "prompt": "one two"}\n{"id": "b", "prompt": "the lazy dog"}\n'
RECORD = '{"id": "old", "index": 0}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    """A folder of the user's, in which the programs run; none of them may load weights."""
    monkeypatch.setattr(locking, "_GRACE_S", 0.1)
    for module in (loading, train_model):
        monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loaded"))
    (tmp_path / "model").mkdir()
    for path in model.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "p.jsonl").write_text(ROWS)
    (tmp_path / "c.yaml").write_text(dump_yaml({"model": "model", "device": "cpu", "prompts": "p.jsonl"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refused(main, argv, capsys, *words) -> None:
    """Status 2, one line with these words, and every file as it was."""
    before = content(Path.cwd())
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.out == "", printed.err
    for word in words:
        assert word in printed.err
    assert content(Path.cwd()) == before


def infer_to(output, *more) -> list[str]:
    return ["--config", "c.yaml", "--output", str(output), "overwrite=true", "sampling.max_new_tokens=3", *more]


@pytest.mark.parametrize("name", ["p.jsonl", "./model/../p.jsonl", "absolute", "symlink", "hard link"])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_the_prompts_are_not_the_output(here, capsys, name, overwrite):
    output = {"absolute": here / "p.jsonl", "symlink": "s.jsonl", "hard link": "h.jsonl"}.get(name, name)
    (here / "s.jsonl").symlink_to("p.jsonl")
    (here / "h.jsonl").hardlink_to(here / "p.jsonl")
    words = [f"output {Path(output)} and p.jsonl, the prompts, are one file: name another output"]
    refused(infer.main, infer_to(output, f"overwrite={overwrite}"), capsys, *words)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("c.yaml", "output c.yaml and c.yaml, the configuration, are one file"),
        ("model/config.json", "output model/config.json and model/config.json, a file of the model, are one file"),
        ("model/model.safetensors", "model/model.safetensors, a file of the model, are one file"),
        ("model/tokenizer.json", "model/tokenizer.json, a file of the model, are one file"),
    ],
)
def test_no_other_input_is_the_output(here, capsys, output, words):
    refused(infer.main, infer_to(output), capsys, words)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_followed(here, capsys, there):
    if there:
        (here / "precious.jsonl").write_text("precious\n")
    (here / "o.jsonl").symlink_to("precious.jsonl")
    words = f"output o.jsonl is a symbolic link to {here / 'precious.jsonl'}: name that file itself"
    refused(infer.main, infer_to("o.jsonl"), capsys, words)


@pytest.mark.parametrize("name", ["o.jsonl.part-0", "o.jsonl.part-7", "o.jsonl.part-1-2"])
@pytest.mark.parametrize("text", ["my notes\n", RECORD + "and notes\n", "link"])
def test_a_file_that_is_only_named_like_a_part_stays(here, capsys, name, text):
    if text == "link":
        (here / "records").write_text(RECORD)
        (here / name).symlink_to("records")
    else:
        (here / name).write_text(text)
    refused(infer.main, infer_to("o.jsonl"), capsys, f"{name} is named like a part file of o.jsonl, but does not hold")


def test_somebodys_lock_file_stays(here, capsys):
    (here / "notes.lock").write_text("my notes\n")
    words = "notes.lock is no lock that a run has left: move it away, or name another output than notes"
    refused(infer.main, infer_to("notes"), capsys, words)


def test_what_is_replaced_and_what_stays(here, monkeypatch, capsys):
    """Own part files go, whole or cut off; names that only look alike are nobody's business."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "o.jsonl").write_text(RECORD)
    (here / "other-name.jsonl").hardlink_to(here / "o.jsonl")
    own = {"o.jsonl.part-0": RECORD * 2 + '{"id": "cut', "o.jsonl.part-1": "", "o.jsonl.part-1-1": '{"i'}
    others = ["o.jsonl.part-mine", "o.jsonl.part-0.bak", "o.jsonl.sorting", "o.jsonl.probe-0", "o.jsonl.parts"]
    for name, text in {**own, **dict.fromkeys(others, "mine")}.items():
        (here / name).write_text(text)
    assert infer.main(infer_to("o.jsonl")) == 0, capsys.readouterr().err
    assert [json.loads(line)["id"] for line in (here / "o.jsonl").read_text().splitlines()] == ["a", "b"]
    assert not [name for name in own if (here / name).exists()]
    assert all((here / name).read_text() == "mine" for name in others)
    assert (here / "other-name.jsonl").read_text() == RECORD  # the other name of what was there


TASK = "tasks=[{kind: fidelity, lengths: [64], num_scored: 8, samples: 1, text: text.txt}]"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("out/table.md", "mine", "out/table.md would be replaced, and out holds no records of an evaluation"),
        ("out/heatmap-mine.png", "mine", "out/heatmap-mine.png would be replaced, and out holds no records"),
        ("out/predictions.jsonl", "mine\n", "out/predictions.jsonl is not a file of an evaluation's records"),
        ("out/predictions.rank0003.jsonl", "mine\n", "out/predictions.rank0003.jsonl is not a file of an evaluation's"),
        ("out/.lock", "mine\n", "out/.lock is no lock that a run has left"),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_an_evaluation_replaces_nothing_of_others(here, capsys, name, text, words, link):
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (here / "out").mkdir()
    (here / "mine").write_text(text)
    if link:
        (here / name).symlink_to("../mine")
        words = words if name == "out/.lock" else f"{name} is not a regular file, and an evaluation writes it"
    else:
        (here / name).write_text(text)
    refused(evaluate.main, ["--model=model", "--output=out", "device=cpu", "methods=[]", TASK], capsys, words)


@pytest.mark.parametrize("source", ["config", "data"])
def test_an_evaluation_does_not_write_over_what_it_reads(here, capsys, source):
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    values = {"model": "model", "output": ".", "device": "cpu", "methods": [],
              "tasks": [{"kind": "fidelity", "lengths": [64], "num_scored": 8, "text": "text.txt"}]}  # fmt: skip
    if source == "data":
        (here / "table.md").hardlink_to(here / "text.txt")
    name = {"config": "config.yaml", "data": "c2.yaml"}[source]
    (here / name).write_text(dump_yaml(values))
    words = {"config": "output config.yaml and config.yaml, the configuration, are one file",
             "data": "output table.md and text.txt, text of task fidelity, are one file"}[source]  # fmt: skip
    refused(evaluate.main, ["--config", name], capsys, words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model=run/model", "--output=run"], "lies in run/model, which the run replaces: name another output"),
        (["--model=s", "--output=run"], "lies in run/model, which the run replaces: name another output"),
        (["--model=model", "--output=run", "data.train=run/checkpoints/t.txt"],
         "run/checkpoints/t.txt, the data, lies in run/checkpoints, which the run replaces"),
        (["--model=model", "--output=run", "data.train=run/log.jsonl"],
         "output run/log.jsonl and run/log.jsonl, the data, are one file"),
        (["--model=model", "--output=run", "data.validation=~/run/checkpoints/t.txt"],
         "run/checkpoints/t.txt, the data, lies in run/checkpoints, which the run replaces"),
        (["--model=model", "--output=run", "eval_every=1",
          "eval_tasks=[{kind: fidelity, lengths: [64], num_scored: 8, text: run/model-best/t.txt}]"],
         "run/model-best/t.txt, text of task fidelity, lies in run/model-best, which the run replaces"),
        (["--model=model", "--output=run"], "run/model would be replaced, and no run wrote it"),
    ],
)  # fmt: skip
def test_training_does_not_replace_what_it_reads(here, capsys, monkeypatch, argv, words):
    monkeypatch.setenv("HOME", str(here))
    (here / "run").mkdir()
    (here / "run" / "model-best").mkdir()
    (here / "run" / "model-best" / "t.txt").write_text("a text")
    (here / "model").rename(here / "run" / "model")
    (here / "s").symlink_to("run/model")
    (here / "model").symlink_to("elsewhere")
    refused(train.main, ["device=cpu", "data.train=p.jsonl", *argv], capsys, words)
