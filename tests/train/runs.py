"""Tiny runs: data, model folder and configuration for the tests of whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from d2o_dist.comm import ParallelMesh
from d2o_dist.config.train import TrainConfig
from d2o_dist.train.loop import Run, prepare, take_step, train
from tests.engine.tiny import LINES, make_folder


def make_inputs(folder: Path, **model) -> Path:
    """`folder/model` (float32 when loaded), `train.jsonl` and `validation.jsonl`."""
    make_folder(folder / "model", **{"num_attention_heads": 8, "num_key_value_heads": 4, **model})
    generator = random.Random(0)
    for name, rows in (("train", 30), ("validation", 5)):
        texts = [" ".join(generator.choices(LINES, k=generator.randint(1, 12))) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def make_config(folder: Path | str, output: str = "out", **changes) -> TrainConfig:
    folder = Path(folder)
    values = {
        "model": str(folder / "model"),
        "output": str(folder / output),
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
                 "max_validation_rows": 3},
        "objective": "d2o_distill",
        "sequence_length": 96,
        "context_length": 64,
        "keep_ratio": [0.2, 0.4],
        "eval_ratios": [0.3],
        "d2o": {"budget": {"min_layers": 0, "min_layer_tokens": 8}},
        "distill": {"context_lm_weight": 0.5},
        "steps": 5,
        "global_batch_size": 4,
        "device": "cpu",
        "loss_tile": 50,
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    }  # fmt: skip
    return TrainConfig.from_dict({**values, **changes})


LM = {"objective": "lm", "context_length": None, "distill": None}
D2O_LM = {"objective": "d2o_lm", "distill": None}


def start(config: TrainConfig, mesh: ParallelMesh | None = None) -> Run:
    return prepare(config, mesh or ParallelMesh.local(), torch.device("cpu"))


def run_whole(config: TrainConfig, mesh: ParallelMesh | None = None) -> list[dict]:
    """Train to the end; the records of the log (of the first rank)."""
    train(start(config, mesh))
    return records(config)


def records(config: TrainConfig) -> list[dict]:
    lines = (Path(config.output) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of(config: TrainConfig, count: int, mesh: ParallelMesh | None = None) -> list[float]:
    """Loss and gradient norm of the first steps, one after the other, without saving anything."""
    run = start(config, mesh)
    return [value for step in range(count) for value in map(take_step(run, step).get, ("loss", "grad_norm"))]
