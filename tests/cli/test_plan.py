"""`d2o-dist plan`: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import sizes
from d2o_dist.cli import infer, main, plan
from d2o_dist.config.infer import InferConfig
from tests.cli.speak import speak
from tests.models import tiny_model

REPO = Path(__file__).resolve().parents[2]
ASK = ["--context", "4096", "--gpu", "l40s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(tiny_model(max_position_embeddings=8192).config.to_dict()))
    return path


def test_a_known_model_on_eight_gpus():
    argv = ["--model", "llama-3-8b", "--context", "130000", "--gpu", "h100-80gb", "--gpus", "8"]
    status, out, err = speak(plan.main, argv)
    assert status == 0 and err == ""
    assert out.startswith("mesh (dp x sp x tp)") and "1 x 8 x 1" in out and ", budget.rule dispersion:" in out
    for said in ("weights                                     14.96 GiB", "assumed, not measured: matmul=0.5",
                 "torchrun --nproc-per-node 8 launch/infer.py --config CONFIG", "deepspeed --num_gpus 8"):  # fmt: skip
        assert said in out


def test_four_layers_share_equally(folder):
    status, out, _ = speak(plan.main, ["--model", str(folder), *ASK])
    assert status == 0 and ", budget.rule uniform:" in out


def test_illegal_meshes_are_explained(folder):
    status, out, _ = speak(main.main, ["plan", "--model", str(folder), *ASK, "--gpus", "3", "--preset", "reread"])
    assert status == 0
    assert "1 x 1 x 3: num_attention_heads (4) must be divisible by tp (3)" in out
    assert "1 x 3 x 1: score.rule reread and budget.per_head" in out


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (4, 1), (8, 2)])
def test_what_is_written_can_be_run(folder, tmp_path, gpus, nodes):
    """launch/infer.py reads it, and it is the mesh, the batch and the rules that were planned."""
    file = tmp_path / "plan.yaml"
    argv = ["--model", str(folder / "config.json"), *ASK, "--gpus", str(gpus), "--gpus-per-node", "4", "--batch", "3"]
    rules = ["--preset", "lean", "--keep-ratio", "0.1", "d2o.budget.min_layer_tokens=8", "sampling.max_new_tokens=64"]
    status, out, _ = speak(plan.main, [*argv, *rules, "--write", str(file)])
    assert status == 0
    command = next(line[4:] for line in file.read_text().splitlines() if "launch/infer.py" in line)
    assert command in out and f"--config {file} " in command
    assert ("torchrun" in command, "--nnodes 2" in command) == (gpus > 1, nodes > 1)
    config = InferConfig.load(file)
    assert config.parallel.dp * config.parallel.sp * config.parallel.tp == gpus
    assert (config.model, config.max_batch_size, config.sampling.max_new_tokens) == (str(folder), 3, 64)
    assert config.max_batch_tokens >= 3 * 4096
    assert (config.d2o.keep_ratio, config.d2o.budget.name, config.d2o.budget.min_layer_tokens) == (0.1, "uniform", 8)
    status, printed, _ = speak(infer.main, ["--config", str(file), "--print-config"])
    assert status == 0 and yaml.safe_load(printed) == config.to_dict()
    assert speak(plan.main, [*argv, "--write", str(file)])[0] == 2  # it is there


def test_nothing_fits():
    argv = ["--model", "llama-3-70b", "--context", "131072", "--gpu", "rtx-4090", "--gpus", "2"]
    status, out, err = speak(plan.main, argv)
    assert status == 1 and "(does not fit)" in out and "torchrun" not in out
    assert "no mesh fits: the least that a GPU needs is" in err and "of 21.6 GiB" in err
    assert "above the model's max_position_embeddings (131072)" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "llama-3-8b", "--context", "4096", "--gpu", "h100"], 'gpu (h100) is not known. Did you mean'),
        (["--model", "./missing", *ASK], "model folder ./missing does not exist"),
        (["--model", "llama-3-8b", *ASK, "--assume", "matmull=0.6"], 'Did you mean "matmul"'),
        (["--model", "llama-3-8b", *ASK, "--assume", "matmul=2"], "assume.matmul (2) must be"),
        (["--model", "llama-3-8b", *ASK, "--batch", "0"], "batch (0) must be at least 1"),
        (["--model", "llama-3-8b", *ASK, "--gpus", "1000000000"], "num_gpus (1000000000) must be in [1, 16384]"),
        (["--model", "llama-3-8b", *ASK, "--context", "9" * 400], "must be at most 9223372036854775807"),
        (["--model", "llama-3-8b", *ASK, "--context", "x" * 400], "argument --context: invalid int value: 'xxx"),
        (["--model", "llama-3-8b", *ASK, "--gpus", "3", "parallel.tp=3"], "no mesh of 3 GPUs is legal: 1 x 1 x 3: "),
        (["--model", "llama-3-8b", *ASK, "d2o.keep_ration=0.1"], 'Did you mean "keep_ratio"'),
        (["--model", "llama-3-8b", *ASK, "--gpus", "8", "parallel.dp=3"], "no dp x sp x tp of 8 GPUs has dp 3, sp 1"),
        (["--model", "llama-3-8b", *ASK, "--top", "0"], "top (0) must be at least 1"),
        (["--model", "llama-3-8b", *ASK, "reading=layerwise", "--preset", "reread"], "reads the prompt a second time"),
        (ASK, "model is missing"),
    ],
)
def test_bad_usage(argv, said):
    status, out, err = speak(plan.main, argv)
    assert status == 2 and out == "" and said in err and len(err.splitlines()) == 1 and len(err) < 600


def test_the_pages_hold_what_the_programs_print(capsys):
    page = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = re.findall(r"```sh\nd2o-dist (plan .*)\n```\n\n((?:\|.*\n)+)", page)
    assert len(tables) == 14
    for command, wanted in tables:
        assert speak(main.main, command.split())[1] == wanted, command
    sizes.main()
    assert capsys.readouterr().out in (REPO / "docs" / "memory.md").read_text(encoding="utf-8")


def test_commands():
    assert speak(main.main, [])[0] == 2 and speak(main.main, ["plam"])[0] == 2
    assert speak(main.main, ["--help"]) == (0, "usage: d2o-dist {convert,plan,profile} ...\n", "")


def test_the_program_in_launch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--model", "smollm2-135m", *ASK, "--markdown"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / "launch" / "plan.py"), run_name="__main__")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("|---|") and lines[2].startswith("| 1 x 1 x 1 |") and len(lines) == 3
