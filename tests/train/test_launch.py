"""Real programs: a killed run goes on, and `launch/train.py` under torchrun and the DeepSpeed launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2o_dist.fields.io import dump_yaml
from tests.ranks import REPO
from tests.train.runs import LM, make_config, make_inputs, records, steps_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


def environment():
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return env | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def command(launcher, config) -> list[str]:
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(dump_yaml(config.to_dict()))
    return [*launcher, str(REPO / "launch" / "train.py"), "--config", str(path)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def step_losses(config):
    return {row["step"]: row["loss"] for row in records(config) if row["kind"] == "train"}


def test_a_run_that_was_killed_goes_on_to_the_same_losses(inputs, tmp_path):
    steps = 15
    changes = dict(steps=steps, save_every=1, global_batch_size=2, micro_batch_size=2)
    config = make_config(inputs, str(tmp_path / "killed"), **changes)
    log = Path(config.output) / "log.jsonl"
    with subprocess.Popen(command([sys.executable], config), env=environment(), stderr=subprocess.DEVNULL) as process:
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = step_losses(config)
    assert 3 <= max(before) < steps
    done = subprocess.run(
        command([sys.executable], make_config(inputs, str(tmp_path / "killed"), **changes)),
        env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = step_losses(config)
    assert list(range(1, steps + 1)) == sorted(after)
    expected = steps_of(make_config(inputs, **changes), steps)[::2]
    assert [after[step] for step in range(1, steps + 1)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launchers_give_the_losses_of_one_process(inputs, tmp_path, launcher):
    pytest.importorskip("deepspeed")
    engine = {"name": "deepspeed", "zero_stage": 2}
    config = make_config(inputs, str(tmp_path / "out"), steps=2, sp=2, engine=engine, **LM)
    done = subprocess.run(command(launcher, config), env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = steps_of(make_config(inputs, steps=2, **LM), 2)[::2]
    assert list(step_losses(config).values()) == pytest.approx(expected, rel=2e-4)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.multirank
def test_a_rank_that_cannot_start_ends_the_job(inputs, tmp_path):
    config = make_config(inputs, str(tmp_path / "out"), data={"train": str(tmp_path / "nowhere.txt")}, **LM)
    done = subprocess.run(command(TORCHRUN, config), env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert "nowhere.txt cannot be read: there is no such file or folder" in done.stderr
