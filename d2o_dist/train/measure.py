"""Held-out measures: how far the compressed cache is from the full one, and how good both are."""

from __future__ import annotations

import torch

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.config.train import TrainConfig
from d2o_dist.train.batches import make_batch
from d2o_dist.train.engine import Engine
from d2o_dist.train.rows import PackedRows, WindowRows


def measure(
    engine: Engine, rows: PackedRows | WindowRows, config: TrainConfig, mesh: ParallelMesh, device: torch.device
) -> dict[str, float]:
    """Means over the targets of the first rows, in nats a token; the same on all ranks, called by all of them.

    `lm` for the objective `lm`. Otherwise `full_lm` over the full cache and, at each ratio of `eval_ratios`, `kl@0.1`
    (KL of the compressed from the full cache) and `lm@0.1`.
    """
    count = min(len(rows), config.data.max_validation_rows)
    sums: dict[str, float] = {}
    targets = 0.0
    # Every replica takes as many turns as the others, or their collectives would not meet: spare turns count nothing.
    turns = -(-count // mesh.dp)
    with engine.evaluating():
        for turn in range(turns):
            number = turn * mesh.dp + mesh.dp_rank
            batch = make_batch([rows[min(number, count - 1)]], config.context_length, mesh.sp_rank, mesh.sp, device)
            weight = 1.0 if number < count else 0.0
            if config.objective == "lm":
                found = engine.objective.plain(**batch.arguments).sums
            else:
                d2o = [config.d2o_at(ratio) for ratio in config.eval_ratios]
                found = {}
                for ratio, one in zip(
                    config.eval_ratios, engine.objective.measure(**batch.arguments, configs=d2o), strict=True
                ):
                    found |= {"full_lm": one["full_lm"], f"kl@{ratio:g}": one["kl"], f"lm@{ratio:g}": one["lm"]}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + weight * float(value)
            targets += weight * batch.counts["row" if config.objective == "lm" else "continuation"]
    flat = torch.tensor([*sums.values(), targets], dtype=torch.float64)
    total = Collectives(mesh.axis("world")).all_reduce(flat.to(device)).tolist()
    return {name: value / max(total[-1], 1.0) for name, value in zip(sums, total, strict=False)}


def headline(measures: dict[str, float], config: TrainConfig) -> float:
    """The one number by which checkpoints are compared, lower is better: the mean over ratios of what is trained."""
    name = {"lm": "lm", "d2o_lm": "lm@", "d2o_distill": "kl@"}[config.objective]
    values = [value for key, value in measures.items() if key.startswith(name)]
    return sum(values) / len(values)
