"""Real programs: a killed run goes on, and `launch/train.py` under torchrun and the DeepSpeed launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from d2o_dist.cli.train import LOCK, main, prepare_ranks
from d2o_dist.engine.lock import OutputLock
from d2o_dist.fields.io import dump_yaml
from tests.ranks import REPO, run_ranks
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
    argv = command([sys.executable], config)
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL) as process:
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = step_losses(config)
    assert 3 <= max(before) < steps
    assert main(argv[2:]) == 0
    after = step_losses(config)
    assert list(range(1, steps + 1)) == sorted(after)
    expected = steps_of(make_config(inputs, **changes), steps)[::2]
    assert [after[step] for step in range(1, steps + 1)] == pytest.approx(expected, rel=1e-6)


def test_a_second_run_is_refused_and_follows_one_that_was_killed(inputs, tmp_path, capsys):
    config = make_config(inputs, str(tmp_path / "out"), steps=2000, save_every=1, global_batch_size=1, **LM)
    log = tmp_path / "out" / "log.jsonl"
    argv = command([sys.executable], config)
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            while not log.exists() or len(log.read_text().splitlines()) < 3:
                assert process.poll() is None
                time.sleep(0.01)
            with pytest.raises(SystemExit) as ended:
                main(argv[2:])
            assert ended.value.code == 2 and process.poll() is None
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
            assert len(said) == 1 and f"{config.output} is written by process {process.pid} on" in said[0]
        finally:
            process.send_signal(signal.SIGKILL)
    assert (tmp_path / "out" / ".lock").exists()
    reached = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("d2o_dist.cli.train.train", lambda run: reached.append(run.state.step) or interrupt())
        main(argv[2:])
    assert reached and reached[0] >= 1 and not (tmp_path / "out" / ".lock").exists()
    steps = [row["step"] for row in records(config)]
    assert steps == list(range(1, reached[0] + 1))


def interrupt():
    raise KeyboardInterrupt


def refused(rank, world, config) -> str:
    with ExitStack() as held, pytest.raises(ValueError) as error:
        prepare_ranks(config, held)
    return str(error.value)


@pytest.mark.multirank
def test_all_ranks_are_refused_while_another_run_writes(inputs, tmp_path):
    config = make_config(inputs, str(tmp_path / "out"), **LM)
    held = OutputLock(config.output, tmp_path / "out" / LOCK)
    try:
        found = run_ranks(2, refused, config, fresh=True)
    finally:
        held.release()
    assert found[0] == found[1] and f"is written by process {os.getpid()} on" in found[0]
    assert not list((tmp_path / "out").iterdir())


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
