"""The command line of training: what ranks say, the exit status, and the device of a rank."""

from __future__ import annotations

import runpy
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from d2o_dist.cli import train
from d2o_dist.comm import ParallelMesh
from d2o_dist.fields.io import dump_yaml
from d2o_dist.train import model as train_model
from tests.train.runs import LM, make_config, make_inputs
from tests.train.test_launch import TORCHRUN, environment

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank: int, world: int = 2) -> None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml({"model": "m", "output": "o", "data": {"train": "t.txt"}}))
    return ["--config", str(path)]


@pytest.mark.parametrize("argv", [["steps=0"], ["--modle", "m"], ["--print-config"]])
def test_of_many_ranks_one_speaks(config, argv, as_rank, capsys):
    said = []
    for rank in range(2):
        as_rank(rank)
        status = train.main([*config, *argv])
        printed = capsys.readouterr()
        said.append(printed.out + printed.err)
    assert status == (0 if argv == ["--print-config"] else 2)
    assert said[0] and said[1] == ""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_rank_trains_on_a_gpu_of_its_own(tmp_path, as_rank, monkeypatch, device):
    config = make_config(tmp_path, device=device)
    as_rank(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "init_distributed", lambda backend, timeout_s: train.read_environment())
    monkeypatch.setattr(train, "build_mesh", lambda **sizes: ParallelMesh.local())
    found = []
    monkeypatch.setattr(train, "prepare", lambda config, mesh, device, texts: found.append(device))
    with ExitStack() as held:
        train.prepare_ranks(config, held)
    assert found == [torch.device("cuda", 1)]
    # Where the weights are loaded, the device is chosen once more.
    loaded = []
    monkeypatch.setattr(train_model, "load_model", lambda infer: loaded.append(infer) or torch.nn.Linear(1, 1))
    with pytest.raises(AttributeError):  # a linear layer is no adapter
        train_model.load_trainable(config, found[0])
    assert train.pick_device(loaded[0].device) == found[0]


def test_what_fails_in_a_step_is_no_bad_usage(config, monkeypatch):
    def fails(run):
        raise ValueError("in a step")

    monkeypatch.setattr(train, "prepare_ranks", lambda config, held: None)
    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(ValueError, match="in a step"):
        train.main(config)


@pytest.mark.multirank
def test_what_ranks_cannot_do_is_said_in_one_line(tmp_path):
    config = make_config(make_inputs(tmp_path), global_batch_size=3, **LM)
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config.to_dict()))
    command = [*TORCHRUN, str(REPO / "launch" / "train.py"), "--config", str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    message = "train.py: error: global_batch_size (3) must be a multiple of micro_batch_size (1) x dp (2)"
    assert done.returncode == 1 and done.stderr.count(message) == 1
    assert "[rank" not in done.stderr and "SystemExit" not in done.stderr


def test_a_status_is_returned_by_the_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith("nowhere.yaml does not exist")
