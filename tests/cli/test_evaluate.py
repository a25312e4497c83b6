"""The command line of an evaluation: what it prints where, and its exit status."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from d2o_dist.cli import evaluate
from d2o_dist.fields.io import dump_yaml
from tests.engine.tiny import make_folder
from tests.eval.parts import TEXT

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model"), template=False))


@pytest.fixture
def config(tmp_path, folder):
    (tmp_path / "text.txt").write_text(TEXT)
    values = {
        "model": folder, "output": str(tmp_path / "out"), "device": "cpu", "keep_ratios": [0.5],
        "methods": [{"name": "h2o", "preset": "h2o", "budget": {"min_layer_tokens": 8}}],
        "tasks": [
            {"kind": "fidelity", "lengths": [64], "num_scored": 8, "samples": 2, "text": str(tmp_path / "text.txt")}
        ],
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(values))
    return str(path)


def test_a_run(config, tmp_path, capsys):
    assert evaluate.main(["--config", config, "--local_rank=0"]) == 0
    printed = capsys.readouterr().out
    assert "| full | 100% | 1.0000 |" in printed and f"results in {tmp_path / 'out'}: 4 done, 0 missing" in printed
    assert (tmp_path / "out" / "table.md").read_text() in printed


def test_a_dry_run_needs_no_weights(config, folder, tmp_path, capsys):
    assert evaluate.main(["--config", config, "--dry-run", "keep_ratios=[0.5,0.1]"]) == 0
    assert capsys.readouterr().out == (
        "fidelity: 2 rows, prompts of 64 to 64 tokens\n3 methods and budgets, 6 results\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_configuration_is_printed_with_flags_and_overrides(config, capsys):
    argv = ["--config", config, "--question", "hidden", "--output", "elsewhere", "batch_size=3", "--print-config"]
    assert evaluate.main(argv) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["question"], values["output"], values["batch_size"]) == ("hidden", "elsewhere", 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["keep_ratios=[2]"], "method h2o at 200%: keep_ratio (2) must be in (0, 1]"),
        (["--model", "/no/such/folder"], "model folder /no/such/folder does not exist"),
        (["parallel.tp=2"], "continuation (chunk) needs a request on one rank, but tp is 2 and sp 1"),
        (["parallel.dp=3"], "world size (1) must equal dp (3)"),
        (["nonsense"], "must have the form key=value"),
    ],
)
def test_bad_usage_is_exit_status_2(config, argv, words, capsys):
    assert evaluate.main(["--config", config, *argv]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_missing_results_are_exit_status_1(config, monkeypatch, capsys):
    monkeypatch.setattr("d2o_dist.eval.runner.compare", lambda *args: 1 / 0)
    assert evaluate.main(["--config", config]) == 1
    printed = capsys.readouterr()
    assert "0 done, 4 missing" in printed.out and "ZeroDivisionError" in printed.err


def test_the_launcher(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", config, "--print-config"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "launch" / "evaluate.py"), run_name="__main__")
    assert end.value.code == 0 and "keep_ratios:" in capsys.readouterr().out
