"""Runs on several ranks: DeepSpeed ZeRO 0 to 3, replicas and token shards, all equal to one process.

One group of workers does many runs, because DeepSpeed takes seconds to start.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2o_dist.comm import build_mesh
from d2o_dist.train.checkpoints import RunState
from d2o_dist.train.export import export_model
from d2o_dist.train.loop import take_step
from d2o_dist.train.measure import measure
from tests.ranks import run_ranks
from tests.train.runs import LM, make_config, make_inputs, start, steps_of

STEPS = 3
DISTILL: dict = {}
ZERO = [{"name": "deepspeed", "zero_stage": stage} for stage in range(4)]
# Otherwise weights as small as these are never sharded.
ZERO[3]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return str(make_inputs(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(scope="module")
def expected(inputs) -> dict[str, list[float]]:
    """Losses and gradient norms of one process, by objective."""
    return {name: steps_of(make_config(inputs, **kind), STEPS) for name, kind in KINDS.items()}


KINDS = {"lm": LM, "distill": DISTILL}


def several(rank, world, inputs, jobs):
    """Each job `(objective, sp, changes)`: the losses of its first steps."""
    found = []
    for name, sp, changes in jobs:
        mesh = build_mesh(dp=world // sp, sp=sp)
        found.append(steps_of(make_config(inputs, sp=sp, **KINDS[name], **changes), STEPS, mesh))
    return found


def check(world, inputs, expected, jobs, rel=2e-4):
    for found in run_ranks(world, several, inputs, jobs, fresh=True, timeout_s=400):
        for (name, sp, changes), values in zip(jobs, found, strict=True):
            assert values == pytest.approx(expected[name], rel=rel), (name, sp, changes)


@pytest.mark.multirank
def test_replicas_and_token_shards_equal_one_process(inputs, expected):
    jobs = [(name, sp, {}) for name in KINDS for sp in (1, 2, 4)]
    check(4, inputs, expected, jobs)


@pytest.mark.multirank
def test_zero_stages_equal_one_process(inputs, expected):
    pytest.importorskip("deepspeed")
    jobs = [(name, 1, {"engine": engine}) for name in KINDS for engine in ZERO]
    jobs += [("distill", 2, {"engine": engine}) for engine in (ZERO[2], ZERO[3])]
    jobs += [("distill", 2, {"engine": ZERO[3], "activation_checkpointing": True})]
    check(2, inputs, expected, jobs)


@pytest.mark.multirank
def test_bfloat16_under_zero_is_near_float32(inputs, expected):
    pytest.importorskip("deepspeed")
    jobs = [("distill", 2, {"engine": ZERO[stage], "dtype": "bfloat16"}) for stage in (1, 3)]
    check(2, inputs, expected, jobs, rel=0.05)


def save_after_two(rank, world, inputs, jobs):
    """Each job `(folder, changes)`: two steps and a checkpoint."""
    for folder, changes in jobs:
        run = start(make_config(inputs, folder, steps=STEPS, **changes), build_mesh(dp=world))
        for step in range(2):
            take_step(run, step)
        run.checkpoints.save(RunState(2, facts=run.state.facts), run.engine.save, is_best=False)


def go_on(rank, world, inputs, jobs, sp=1):
    """The third step of each job, from its checkpoint."""
    found = []
    for folder, changes in jobs:
        config = make_config(inputs, folder, steps=STEPS, sp=sp, **changes)
        run = start(config, build_mesh(dp=world // sp, sp=sp))
        assert run.state.step == 2
        record = take_step(run, 2)
        found.append([record["loss"], record["grad_norm"]])
        export_model(run.engine, run.tokenizer, Path(config.output) / f"model-{world}", "float32", run.world)
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("stages", [(2, 3), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_as_many_ranks_and_with_others(inputs, expected, tmp_path, stages):
    """Checkpoints of two ranks, read by two, by one, and by two that share the tokens of a row."""
    pytest.importorskip("deepspeed")
    jobs = [(str(tmp_path / f"zero{stage}"), {"engine": ZERO[stage]}) for stage in stages]
    jobs.append((str(tmp_path / "torch"), {}))
    run_ranks(2, save_after_two, inputs, jobs, fresh=True, timeout_s=400)
    for world, sp in ((2, 1), (2, 2), (1, 1)):
        for found in run_ranks(world, go_on, inputs, jobs, sp, fresh=True, timeout_s=400):
            for (folder, _), values in zip(jobs, found, strict=True):
                assert values == pytest.approx(expected["distill"][-2:], rel=2e-4), (folder, world, sp)
    # What the higher stage exports on two ranks is what one process exports.
    weights = [load_file(Path(folder) / f"model-{world}" / "model.safetensors")
               for folder, world in ((jobs[1][0], 2), (jobs[2][0], 1))]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-4)


def save_two(rank, world, inputs, folder, changes):
    """Checkpoints after one step, the best one, and after two."""
    run = start(make_config(inputs, folder, steps=STEPS, **changes), build_mesh(dp=world))
    for step in range(2):
        take_step(run, step)
        state = RunState(step + 1, measured=float(step), facts=run.state.facts)
        run.checkpoints.save(state, run.engine.save, is_best=step == 0)


def second_step(rank, world, inputs, folder, changes):
    run = start(make_config(inputs, folder, steps=STEPS, **changes), build_mesh(dp=world))
    assert run.state.step == 1
    record = take_step(run, 1)
    return [record["loss"], record["grad_norm"]]


@pytest.mark.multirank
def test_a_damaged_shard_is_passed_over_and_a_damaged_conversion_is_made_again(inputs, expected, tmp_path):
    pytest.importorskip("deepspeed")
    job = (str(tmp_path / "out"), {"engine": ZERO[2]})
    run_ranks(2, save_two, inputs, *job, fresh=True, timeout_s=400)
    first, last = (tmp_path / "out" / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    (shard,) = last.glob("deepspeed/*rank_1*optim_states.pt")
    shard.unlink()
    for world in (2, 1, 1):
        for values in run_ranks(world, second_step, inputs, *job, fresh=True, timeout_s=400):
            assert values == pytest.approx(expected["distill"][2:4], rel=2e-4), world
        if world == 1:  # written by one rank out of the shards of two
            for part in (first / "universal").rglob("*.pt"):
                part.write_bytes(part.read_bytes()[:10])


@pytest.mark.multirank
def test_lora_under_zero_goes_on_and_is_exported(inputs, tmp_path):
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")
    changes = {"lora": {"rank": 4}, "distill": {"teacher": "base", "context_lm_weight": 0.5}}
    expected = steps_of(make_config(inputs, **changes), STEPS)[-2:]
    jobs = [(str(tmp_path / f"lora{stage}"), {**changes, "engine": ZERO[stage]}) for stage in (2, 3)]
    run_ranks(2, save_after_two, inputs, jobs, fresh=True, timeout_s=400)
    (found,) = run_ranks(1, go_on, inputs, jobs, fresh=True, timeout_s=400)
    for (folder, _), values in zip(jobs, found, strict=True):
        assert values == pytest.approx(expected, rel=2e-4), folder


def measured(rank, world, inputs):
    sp = min(world, 2)
    mesh = build_mesh(dp=world // sp, sp=sp)
    config = make_config(inputs, sp=sp, eval_ratios=[0.2, 0.4])
    run = start(config, mesh)
    return measure(run.engine, run.validation, config, mesh, run.device)


@pytest.mark.multirank
def test_held_out_measures_equal_one_process(inputs):
    """Two replicas of two ranks each; three held-out rows do not divide among two replicas."""
    alone = measured(0, 1, inputs)
    assert set(alone) == {"full_lm", "kl@0.2", "lm@0.2", "kl@0.4", "lm@0.4"}
    for four in run_ranks(4, measured, inputs, timeout_s=400):
        assert four == pytest.approx(alone, rel=1e-5)
