"""A checkpoint that lacks weights, or says what no model has: one line, status 2, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from d2o_dist.cli import evaluate, infer, lm_harness, plan, train
from launch.demo import __main__ as demo
from tests.engine.tiny import make_folder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    path = make_folder(folder / "model", max_position_embeddings=1024) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    (folder / "p.jsonl").write_text('{"prompt": "one two three"}\n')
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return folder


def harness() -> int:
    pytest.importorskip("lm_eval")
    sys.argv[1:] = ["run", "--model", "d2o_dist", "--include_path", str(REPO / "configs" / "lm_eval"), "--tasks",
                    "gsm8k_local", "--model_args", "pretrained=model", "--device", "cpu"]  # fmt: skip
    return lm_harness.main()


TASK = "tasks=[{kind: fidelity, lengths: [64], num_scored: 8, samples: 2, text: text.txt}]"
PROGRAMS = {
    "infer.py": lambda: infer.main(["--model=model", "--prompts=p.jsonl", "--output=out.jsonl", "device=cpu"]),
    "evaluate.py": lambda: evaluate.main(["--model=model", "--output=out", "device=cpu", "methods=[]", TASK]),
    "train.py": lambda: train.main(
        ["--model=model", "--output=out", "device=cpu", "data.train=text.txt", "steps=1", "objective=lm",
         "sequence_length=64"]
    ),
    "demo": lambda: demo.main(["--tokens=300"]),
    "lm_harness.py": harness,
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_that_are_missing(job, name, monkeypatch, capsys):
    monkeypatch.chdir(job)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(demo, "prepare_model", lambda: "model")
    monkeypatch.setattr(demo, "essays", lambda: (job / "text.txt").read_text())
    try:
        status = PROGRAMS[name]()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    wrong = [line for line in printed.err.splitlines() if "error" in line]
    assert (status, printed.out) == (2, "") and len(wrong) == 1, printed.err
    assert wrong[0].startswith(f"{name}: error: the weights of model do not fit its config.json: of their keys 9 are ")
    assert "LOAD REPORT" not in printed.err
    assert not (job / "out.jsonl").exists() and not list(job.rglob("predictions*")) and not (job / "out/model").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers (1000000000) in {config} must be at most 10000"),
        ("num_hidden_layers", "x", "TypeError: Field 'num_hidden_layers' expected int, got str"),
        ("head_dim", 0, "0.0 cannot be raised to a negative power"),
        ("intermediate_size", -4, "Trying to create tensor with negative dimension -4"),
        ("hidden_act", "nope", "KeyError 'nope'"),
    ],
)
def test_a_configuration_that_describes_no_model(tmp_path, capsys, field, value, message):
    config = make_folder(tmp_path / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    model = f"--model={config.parent}"
    assert infer.main([model, "--prompt=x", f"--output={tmp_path / 'out.jsonl'}", "device=cpu"]) == 2
    assert plan.main([model, "--context=100", "--gpu=h100-80gb"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 2 and all(message.format(config=config) in line and len(line) < 600 for line in said), said
    assert not (tmp_path / "out.jsonl").exists()
