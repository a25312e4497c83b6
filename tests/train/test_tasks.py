"""Evaluation tasks on the model in training: the figures of an evaluation of the exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2o_dist.comm import ParallelMesh, build_mesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.eval.plan import prepare as prepare_evaluation
from d2o_dist.eval.runner import EvalRunner
from d2o_dist.models.loading import load_model
from d2o_dist.train.loop import train
from d2o_dist.train.tasks import run_tasks
from tests.eval.parts import TEXT
from tests.ranks import run_ranks
from tests.train.runs import LM, make_config, make_inputs, records, run_whole, start

KEEP_NOTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ZERO3 = {"name": "deepspeed", "zero_stage": 3, "deepspeed": KEEP_NOTHING}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("tasks"))
    (folder / "text.txt").write_text(TEXT)
    return folder


def tasks(folder: Path) -> list[dict]:
    text = str(folder / "text.txt")
    return [
        {"kind": "needle", "lengths": [180], "depths": 2, "max_new_tokens": 4, "haystack": text},
        {"kind": "fidelity", "lengths": [100], "num_scored": 20, "samples": 2, "text": text},
    ]


def config_of(folder: Path, output: str, **changes):
    return make_config(folder, output, **{"eval_tasks": tasks(folder), "eval_every": 2, "steps": 2, **changes})


def evaluated(folder: Path, model: Path) -> dict[str, float]:
    """The same tasks by an evaluation of a model folder."""
    config = config_of(folder, "unused")
    plan = prepare_evaluation(
        EvalConfig.from_dict(
            {"model": str(model), "output": str(folder / "nowhere"), "tasks": tasks(folder), "dtype": "float32",
             "methods": [{"name": "d2o", "budget": {"min_layers": 0, "min_layer_tokens": 8}}], "keep_ratios": [0.3],
             "chat_template": "never", "device": "cpu"}
        ),
        {},
    )  # fmt: skip
    runner, found = EvalRunner(plan, load_model(plan.config.infer()), ParallelMesh.local()), {}
    primary = {task.name: task.primary for task in plan.tasks}
    for job in plan.jobs:
        for [record] in runner.run_batch([(job, tuple(plan.methods))]):
            assert record["error"] is None
            name = f"{record['task']} {record['method'] if record['method'] == 'full' else 'd2o@30%'}"
            found.setdefault(name, []).append(record["scores"][primary[record["task"]]])
    assert config.eval_ratios == (0.3,)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("plain", {}), ("lora", {"lora": {"rank": 2}, "activation_checkpointing": True}), ("lm", LM)],
    ids=["plain", "lora", "lm"],
)
def test_figures_are_those_of_the_exported_model(inputs, name, changes):
    config = config_of(inputs, name, **changes)
    last = [record for record in run_whole(config) if record["kind"] == "eval"][-1]
    assert last["step"] == 2
    wanted = evaluated(inputs, Path(config.output) / "model")
    assert set(wanted) == {"needle full", "needle d2o@30%", "fidelity full", "fidelity d2o@30%"}
    assert wanted["fidelity d2o@30%"] > 1e-4 > abs(wanted["fidelity full"])
    # Exported, LoRA is merged into the weights: other rounding, by which another token of a tiny text may be kept.
    bound = 0.05 if name == "lora" else 1e-4
    for label, value in wanted.items():
        assert last[label] == pytest.approx(value, rel=bound, abs=1e-5)


def test_figures_of_merged_lora_are_exactly_those_of_the_export(inputs):
    """With the additions merged as the export merges them there is no other rounding, and no other figure."""
    config = config_of(inputs, "merged", lora={"rank": 2}, eval_every=10)
    run = start(config)
    train(run)
    run.engine.objective.model.merge_adapter()
    wanted = evaluated(inputs, run.output / "model")
    assert run_tasks(run.engine, run.tasks) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_in_bfloat16_they_are_read_as_steps_are(inputs):
    config = config_of(inputs, "bfloat16", dtype="bfloat16")
    run = start(config)
    found = run_tasks(run.engine, run.tasks)
    wanted = evaluated(inputs, inputs / "model")
    assert set(found) == set(wanted) and found["fidelity full"] == pytest.approx(0, abs=1e-5)
    # Autocast, against float32.
    assert found["fidelity d2o@30%"] == pytest.approx(wanted["fidelity d2o@30%"], rel=0.3)


def test_without_held_out_rows(inputs):
    """Tasks alone are measured, and training goes on as without them."""
    data = {"train": str(inputs / "train.jsonl")}
    with_tasks = run_whole(config_of(inputs, "alone", data=data, steps=3))
    without = run_whole(make_config(inputs, "none", data=data, steps=3))
    assert [r["step"] for r in with_tasks if r["kind"] == "eval"] == [0, 2, 3]
    losses = [[r["loss"] for r in run if r["kind"] == "train"] for run in (with_tasks, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert records(config_of(inputs, "alone", data=data, steps=3)) == with_tasks


def on_rank(rank: int, world: int, folder: str, engine: dict | None) -> dict[str, float]:
    config = config_of(Path(folder), f"ranks-{world}-{engine is not None}", **({"engine": engine} if engine else {}))
    run = start(config, build_mesh(dp=world))
    assert torch.is_grad_enabled()
    return run_tasks(run.engine, run.tasks)


@pytest.mark.multirank
def test_ranks_that_share_the_weights(inputs):
    """ZeRO-3: the figures of one process, on every rank."""
    run = start(config_of(inputs, "one"))
    wanted = run_tasks(run.engine, run.tasks)
    for found in run_ranks(2, on_rank, str(inputs), ZERO3, fresh=True, timeout_s=120):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_refusals(inputs):
    with pytest.raises(ValueError, match="eval_tasks has 2 tasks, but eval_every is null"):
        config_of(inputs, "bad", eval_every=None)
    with pytest.raises(ValueError, match=r"task kind \('nedle'\).*needle"):
        config_of(inputs, "bad", eval_tasks=[{"kind": "nedle"}])
    with pytest.raises(ValueError, match=r"eval_tasks \('needle'\) must be a list"):
        config_of(inputs, "bad", eval_tasks="needle")
    with pytest.raises(ValueError, match="nowhere.txt"):
        start(config_of(inputs, "bad", eval_tasks=[{**tasks(inputs)[0], "haystack": "nowhere.txt"}]))


def test_a_figure_that_is_no_number_is_an_error(inputs):
    """Not 0, and not the best checkpoint of all."""
    run = start(config_of(inputs, "broken", eval_every=10))
    run.engine.objective.model.lm_head.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(RuntimeError, match="task needle, row 180-0-0: the logits of new token 1, right after"):
        run_tasks(run.engine, run.tasks)
    plan = replace(run.tasks, jobs=[job for job in run.tasks.jobs if job.task.name == "fidelity"])
    with pytest.raises(RuntimeError, match="task fidelity, row 100-0: the logits of token 1 of the continuation are"):
        run_tasks(run.engine, plan)
