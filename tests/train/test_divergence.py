"""What is not finite ends a run: on all ranks, with the step named, and with the checkpoints as they were."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from d2o_dist.cli.train import main
from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.train import compress, loop
from d2o_dist.train.manifest import fault
from tests.ranks import run_ranks
from tests.train.runs import LM, make_config, make_inputs, start
from tests.train.test_runs import command

AT = 2  # the first step, from 0, in which something goes wrong


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def loss(run) -> None:
    """The next forward's loss is not finite."""

    def odd(module, args, kwargs, losses):
        losses.total.data.fill_(torch.nan)

    run.engine.objective.register_forward_hook(odd, with_kwargs=True)


def gradient(run) -> None:
    """The loss is finite, a gradient is not."""
    parameter = [p for p in run.engine.objective.parameters() if p.requires_grad][-1]
    parameter.register_hook(lambda grad: grad * torch.inf)


def attention(run) -> None:
    """The attention of the next prompt is not finite."""
    patch.object(compress, "_slot_budgets", lambda *args: None).start()


def weight(run) -> None:
    """Loss and gradients are finite, and the weights that come of them are not."""
    update = run.engine.update

    def odd(lr):
        norm = update(lr)
        next(run.engine.objective.parameters()).data.view(-1)[0] = torch.inf
        return norm

    run.engine.update = odd


def measured(run) -> None:
    """What is measured after the step is not finite."""
    patch.object(loop, "measure", lambda *args: {"lm": torch.nan, "kl@0.3": torch.nan}).start()


SAID = {
    loss: "a loss is not finite (",
    gradient: "the norm of the gradients is not finite: ",
    attention: "the attention of a prompt is not finite: ",
    weight: "a weight is not finite: ",
    measured: "what is measured is not finite (lm nan, kl@0.3 nan): ",
}


def diverge(config, mesh, break_it) -> str:
    """Train; before step `AT` this rank is broken. What ended the run."""
    run = start(config, mesh)
    take_step = loop.take_step

    def odd(run, step):
        if step == AT and break_it is not None:
            break_it(run)
        return take_step(run, step)

    with patch.object(loop, "take_step", odd):
        try:
            loop.train(run)
        except FloatingPointError as error:
            return str(error)
        finally:
            patch.stopall()
    return "trained to the end"


def check(config, said: str, what) -> None:
    """The run ended in its third step; its checkpoints are those of the first two."""
    folder = Path(config.output) / "checkpoints"
    assert said.startswith(f"step {AT + 1}: {SAID[what]}") and said.endswith(str(folder / f"step-{AT:08d}"))
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {f"step-{step:08d}" for step in range(1, AT + 1)}
    assert (folder / "last").read_text() == f"step-{AT:08d}\n"
    assert all(fault(folder / name) is None for name in names)
    assert not (Path(config.output) / "model").exists()


@pytest.mark.parametrize("what", SAID, ids=lambda what: what.__name__)
def test_one_process_ends_with_its_checkpoints_as_they_were(inputs, tmp_path, what):
    config = make_config(inputs, str(tmp_path / "out"), save_every=1, eval_every=1)
    check(config, diverge(config, ParallelMesh.local(), what), what)


def ranks_diverge(rank, world, inputs, jobs):
    """Each job `(folder, what, changes)`; only the last rank is broken."""
    said = []
    for folder, what, changes in jobs:
        sp = changes.get("sp", 1)
        config = make_config(inputs, folder, save_every=1, **changes)
        mesh = build_mesh(dp=world // sp, sp=sp)
        said.append(diverge(config, mesh, what if rank == world - 1 else None))
    return said


@pytest.mark.multirank
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_what_one_rank_has_ends_all_of_them(inputs, tmp_path, engine):
    engines = [{"engine": {"name": "torch"}}]
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
        engines = [{"engine": {"name": "deepspeed", "zero_stage": stage}} for stage in (0, 2, 3)]
        engines += [{"engine": {"name": "deepspeed", "zero_stage": 2}, "dtype": "bfloat16"}]
    # Under ZeRO-3 a rank holds a shard of its own, which is not what the test writes to.
    jobs = [
        (str(tmp_path / f"{number}-{what.__name__}"), what, changes)
        for number, changes in enumerate(engines)
        for what in (loss, gradient, attention, weight)
        if not (what is weight and changes["engine"].get("zero_stage") == 3)
    ]
    found = run_ranks(2, ranks_diverge, str(inputs), jobs, fresh=True, timeout_s=400)
    assert found[0] == found[1]
    for (folder, what, changes), said in zip(jobs, found[0], strict=True):
        check(make_config(inputs, folder, **changes), said, what)


def test_the_command_says_the_step_in_one_line_and_fails(inputs, tmp_path, capsys):
    """Nothing is broken on purpose: the learning rate is far too high."""
    config = make_config(inputs, str(tmp_path / "out"), save_every=1, optimizer={"lr": 1e30, "warmup_steps": 0}, **LM)
    assert main(command(config)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert len(said) == 1 and "step 2: a loss is not finite" in said[0] and "step-00000001" in said[0]
