"""Evaluation tasks on the model in training: needles, fidelity and the like, at the steps that are measured.

Every rank runs every row by itself, so that ranks that share weights (ZeRO-3) call the same forwards. Keep tasks small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import fsum
from typing import Any

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.train import TrainConfig
from d2o_dist.eval.plan import EvalPlan, prepare
from d2o_dist.eval.runner import EvalRunner, batches
from d2o_dist.models.hf.guards import ATTENTION_NAME
from d2o_dist.train.attention import TRAINING_ATTENTION
from d2o_dist.train.engine import Engine

# What the rule of the run is called in results, beside `full`.
METHOD = "d2o"


def plan_tasks(config: TrainConfig, named_texts: Mapping[str, Callable[[], str]]) -> EvalPlan | None:
    """The rows of `eval_tasks`, under the run's own rule at each of `eval_ratios`, and `full`; None without tasks.

    Args:
        named_texts: texts that tasks may name instead of a path.

    Raises:
        ValueError: data that is missing, or rows that do not fit the model.
    """
    if not config.eval_tasks:
        return None
    rule = {name: value for name, value in config.d2o.to_dict().items() if name not in ("keep_ratio", "keep_tokens")}
    return prepare(
        EvalConfig(
            model=config.model, tokenizer=config.tokenizer, revision=config.revision, dtype="float32",
            trust_remote_code=config.trust_remote_code, output=config.output, tasks=config.eval_tasks,
            methods=({"name": METHOD, **rule},), keep_ratios=config.eval_ratios, chat_template="never",
            seed=config.seed,
        ),
        named_texts,
    )  # fmt: skip


def run_tasks(engine: Engine, plan: EvalPlan) -> dict[str, float]:
    """`TASK full` and `TASK d2o@10%`: the mean of each task's primary metric over its rows. Called by all ranks.

    Raises:
        RuntimeError: a row failed.
    """
    todo = [(job, tuple(plan.methods)) for job in plan.jobs]
    scores: dict[str, list[float]] = {}
    primary = {task.name: task.primary for task in plan.tasks}
    with engine.evaluating(), _inference_attention(engine.objective.model) as model:
        runner = EvalRunner(plan, model, ParallelMesh.local())
        for batch in batches(todo, plan.config.batch_size, plan.config.max_batch_tokens, plan.border):
            for record in (record for records in runner.run_batch(batch) for record in records):
                if record["error"] is not None:
                    raise RuntimeError(f"task {record['task']}, row {record['row']}: {record['error']}")
                label = "full" if record["method"] == "full" else f"{record['method']}@{record['budget']}"
                score = record["scores"][primary[record["task"]]]
                scores.setdefault(f"{record['task']} {label}", []).append(score)
    return {name: fsum(values) / len(values) for name, values in scores.items()}


@contextmanager
def _inference_attention(model: Any) -> Iterator[Any]:
    """The model as inference has it, with whatever wraps it (LoRA)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(ATTENTION_NAME)
    try:
        yield model
    finally:
        base.set_attn_implementation(TRAINING_ATTENTION)
