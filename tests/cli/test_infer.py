"""The command line: what it prints where, and its exit status."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from d2o_dist.cli import evaluate, infer
from tests.engine.tiny import make_folder

REPO = Path(__file__).resolve().parents[2]
SMALL = ["d2o.budget.min_layer_tokens=8", "sampling.max_new_tokens=5", "device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "one two"}\n{"id": "b", "prompt": "the lazy dog jumps"}\n')
    return str(path)


def test_rows_to_a_file(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert infer.main(["--model", folder, "--prompts", prompts, "--output", str(out), *SMALL]) == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b"]
    printed = capsys.readouterr()
    assert printed.out == "" and "rows: 2 ok, 0 failed" in printed.err


def test_rows_to_standard_output(folder, prompts, capsys):
    assert infer.main(["--model", folder, "--prompts", prompts, "--local_rank=0", *SMALL]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["id"] for record in records} == {"a", "b"}


def test_one_prompt_is_streamed_with_a_report(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    argv = ["--model", folder, "--prompt", "one two three four five", "--output", str(out), "--keep-ratio=0.5"]
    assert infer.main([*argv, "stream=true", *SMALL]) == 0
    text = json.loads(out.read_text())["text"]
    printed = capsys.readouterr().out
    assert printed.startswith(text + "\n\nkeep ratio: requested 0.5000") and "layer kind" in printed


def test_a_bad_row_is_exit_status_1(folder, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "one two"}\nnope\n')
    assert infer.main(["--model", folder, "--prompts", str(path), *SMALL]) == 1
    printed = capsys.readouterr()
    assert "warning: row 1 (1): line 2: not valid JSON" in printed.err and "rows: 1 ok, 1 failed" in printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "x"], "model is missing"),
        (["--model", "m"], "exactly one of prompts (a file) and prompt (a string) must be given"),
        (["--model", "m", "--prompt", "x", "--keep-ratio", "2"], "keep_ratio (2) must be in (0, 1]"),
        (["--model", "m", "--prompt", "x", "--preset", "d20"], 'no preset "d20". Did you mean "d2o"?'),
        (["--model", "m", "--prompt", "x", "--set", "sampling.top_j=1"], 'SamplingConfig has no field "top_j"'),
        (["--model", "./nowhere", "--prompt", "x"], "model folder ./nowhere does not exist"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["--model", "m", "stray"], 'override "stray" must have the form key=value'),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(argv, message, capsys):
    assert infer.main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("infer.py: error: ") and printed.err.count("\n") == 1
    assert printed.out == ""


def test_an_unknown_flag_is_one_line_and_exit_status_2(capsys):
    assert infer.main(["--modle", "m"]) == 2
    assert capsys.readouterr().err == (
        "infer.py: error: unrecognized arguments: --modle; --help lists what there is\n"
    )


@pytest.mark.parametrize("argv", [["--tp", "3"], ["--modle", "m"], ["--config", "nowhere.yaml"]])
def test_of_many_ranks_one_says_what_is_wrong(argv, monkeypatch, capsys):
    said = []
    for rank in range(2):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert infer.main([*argv, "--model", "m", "--prompt", "x"]) == 2
        said.append(capsys.readouterr().err)
    assert "error: " in said[0] and said[1] == ""
    if argv[0] == "--tp":
        assert said[0] == "infer.py: error: world size (2) must be a multiple of sp (1) x tp (3) = 3\n"


def test_a_rank_without_a_gpu_says_so_itself(monkeypatch, capsys):
    # The first rank of the machine has one, and would not know.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = r"error: local rank (1) must be below the number of visible GPUs (1)"
    assert infer.main(["--model", "m", "--prompt", "x"]) == 2 and said in capsys.readouterr().err
    task = "tasks=[{kind: needle, lengths: [99]}]"
    assert evaluate.main(["--model", "m", "--output", "o", task, "methods=[]"]) == 2
    assert said in capsys.readouterr().err


def test_flags_of_the_mesh(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: m\nprompt: x\nparallel: {tp: 4, tp_engine: transformers}\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--print-config", "--tp=2", "--sp", "3", "--trace", "t"]
    assert infer.main([*argv, "parallel.sp_prefill=ring"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    shown = {name: values["parallel"][name] for name in ("tp", "sp", "dp", "tp_engine", "sp_prefill")}
    assert shown == {"tp": 2, "sp": 3, "dp": None, "tp_engine": "transformers", "sp_prefill": "ring"}
    assert values["trace"] == "t"


@pytest.mark.parametrize("where", ["load_model", "describe"])
def test_an_interruption_is_exit_status_130(folder, monkeypatch, where, capsys):
    from d2o_dist.models import loading

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, where, interrupt)
    assert infer.main(["--model", folder, "--prompt", "x", *SMALL]) == 130


def test_the_printed_configuration_can_be_read_back(folder, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nprompts: p.jsonl\nd2o: {keep_tokens: 64}\nsampling: {seed: 1}\n")
    argv = ["--config", str(file), "--prompt", "1", "--preset", "lean", "--keep-ratio", "0.25", "--print-config"]
    assert infer.main([*argv, "sampling.seed=2", "--set", "max_batch_size=3", "dtype=float32"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert (values["prompt"], values["prompts"], values["max_batch_size"]) == ("1", None, 3)
    d2o = values["d2o"]
    assert (d2o["keep_ratio"], d2o["keep_tokens"], d2o["merge"]["rule"]) == (0.25, None, "mass")
    assert values["sampling"]["seed"] == 2
    file.write_text(text)
    assert infer.main(["--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_the_launcher_is_thin(monkeypatch, capsys):
    launcher = REPO / "launch" / "infer.py"
    assert len([line for line in launcher.read_text().splitlines() if line.strip()]) <= 5
    monkeypatch.setattr(sys, "argv", ["infer.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(launcher), run_name="__main__")
    assert caught.value.code == 0 and "--keep-ratio" in capsys.readouterr().out
