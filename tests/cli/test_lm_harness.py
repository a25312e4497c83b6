"""The launcher of lm-evaluation-harness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from d2o_dist.cli import lm_harness

REPO = Path(__file__).resolve().parents[2]


def test_the_script_folder_hides_no_package(monkeypatch):
    # `launch/evaluate.py` would be what the harness finds when it imports the package `evaluate`.
    monkeypatch.setattr(sys, "argv", [str(REPO / "launch" / "lm_harness.py"), "run"])
    monkeypatch.setattr(sys, "path", [str(REPO / "launch"), "", *sys.path])
    lm_harness.forget_script_folder()
    assert str(REPO / "launch") not in sys.path and "" in sys.path
    assert not (REPO / "launch" / "lm_eval.py").exists()


def test_without_the_harness_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert lm_harness.main() == 2
    assert "this needs lm-eval (pip install lm-eval)" in capsys.readouterr().err


def test_the_harness_keeps_its_own_models():
    # In a process of its own: another test may have made the harness register them.
    code = (
        "from d2o_dist.eval.lm_eval import register; from lm_eval.api.registry import get_model; "
        "register(); print(get_model('dummy').__name__, get_model('d2o_dist').__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert run.stdout.split() == ["DummyLM", "D2OLM"], run.stderr


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["run", "--model", "d2o_dist", "--tasks", "x"], True),
        (["--model=d2o_dist"], True),
        (["run", "--model", "d2o_dist", "--device", "cuda:1"], False),
        (["run", "--model", "d2o_dist", "--device=cpu"], False),
        (["run", "--config", "x.yaml", "--model", "d2o_dist"], False),
        (["ls", "tasks"], False),
    ],
)
def test_without_cuda_the_device_is_the_cpu_unless_one_is_named(arguments, added, capsys):
    assert lm_harness.with_device(arguments, has_cuda=True) == arguments
    assert capsys.readouterr().err == ""
    assert lm_harness.with_device(arguments, has_cuda=False) == arguments + ["--device", "cpu"] * added
    assert bool(capsys.readouterr().err) == added
