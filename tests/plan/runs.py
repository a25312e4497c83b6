"""A real run of a tiny model, and what the planner says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.presets import preset_of_many
from d2o_dist.comm import TrafficCounter, build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf import D2OCache
from d2o_dist.models.hf.shard import shard_model
from d2o_dist.plan.meshes import Share, share_of
from d2o_dist.plan.model_size import ModelSize, size_of
from d2o_dist.policy import D2OConfig
from tests.models import tiny_model, tokens
from tests.ranks import run_ranks

STEPS = 48


@dataclass(frozen=True)
class Case:
    """What is run, on sp x tp ranks."""

    preset: str = "d2o"
    family: str = "llama"
    length: int = 600
    batch: int = 1
    steps: int = 0
    chunk: int | None = None
    reading: str = "whole"
    parallel: ParallelConfig = ParallelConfig()
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=dict)
    d2o: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> D2OConfig:
        small = {} if self.preset == "full" else {"keep_ratio": 0.3, "budget": {"min_layer_tokens": 8}}
        return preset_of_many(self.preset, **{**small, **self.d2o})

    def make(self) -> Any:
        return tiny_model(self.family, **{"vocab_size": 96, "intermediate_size": 128, **self.model}).to(self.dtype)

    @property
    def shape(self) -> ModelSize:
        return size_of(self.make().config)

    def share(self, shape: ModelSize) -> Share:
        return share_of(shape, self.config, self.parallel)


@torch.no_grad()
def measure(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Bytes of weights, and of the cache when the prompt is read and when it is compressed; what was sent."""
    parallel, model, counter = case.parallel, case.make(), TrafficCounter()
    mesh = build_mesh(sp=parallel.sp, tp=parallel.tp)
    model = shard_model(model, mesh, parallel, torch.device("cpu"))
    session, read = Session(model, case.config, mesh, parallel, counter, reading=case.reading), []
    finalize = D2OCache.finalize

    def watched(cache: D2OCache) -> None:
        read.append(cache.report().allocated_bytes)
        finalize(cache)

    ids = tokens(case.batch, case.length)
    with patch.object(D2OCache, "finalize", watched):
        session.prefill(ids, torch.ones_like(ids), case.chunk)
    kept = session.cache.report().allocated_bytes
    for step in range(case.steps):
        session.decode([3 + step % 7] * case.batch)
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return {
        "weights": sum(p.numel() * p.element_size() for p in local),
        "prompt": read[0],
        "kept": kept,
        "traffic": counter.to_dict(),
    }


def measure_all(case: Case) -> list[dict[str, Any]]:
    """Of every rank."""
    world = case.parallel.sp * case.parallel.tp
    if world == 1:
        return [measure(0, 1, case)]
    return run_ranks(world, measure, case, fresh=case.parallel.tp > 1)
