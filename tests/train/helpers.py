"""Shared by the tests of training: tiny models that attend through `d2o_train`, and rows cut into parts."""

from __future__ import annotations

import torch

from d2o_dist.comm import Collectives, Contiguous, ParallelMesh
from d2o_dist.config.distill import DistillConfig
from d2o_dist.train.attention import register
from d2o_dist.train.losses import IGNORED
from d2o_dist.train.objective import Objective, Part
from d2o_dist.train.ulysses import GradientExchange
from tests.models import tiny_model, tokens


def exchange(mesh: ParallelMesh | None = None) -> GradientExchange:
    return GradientExchange(Collectives((mesh or ParallelMesh.local()).axis("sp")))


def tiny_objective(family="llama", mesh=None, distill=None, tile=7, **overrides) -> Objective:
    """A float64 model in training mode, with its losses."""
    register()
    model = tiny_model(family, attention="d2o_train", **overrides).train()
    return Objective(model, exchange(mesh), distill or DistillConfig(), tile)


def parts(batch: int, context: int, length: int, seed: int = 0, rank: int = 0, sp: int = 1) -> tuple[Part, Part]:
    """Context and continuation of random rows, this rank's shard of each."""
    ids = tokens(batch, length, seed)
    return tuple(cut(ids, start, stop, rank, sp) for start, stop in ((0, context), (context, length)))


def cut(ids: torch.Tensor, start: int, stop: int, rank: int = 0, sp: int = 1, positions=None) -> Part:
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    shard = Contiguous(stop - start, sp)
    return Part(*(shard.take(tensor[:, start:stop], rank, 1) for tensor in (ids, positions, targets)))
