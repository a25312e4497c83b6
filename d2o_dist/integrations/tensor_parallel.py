"""A loaded model cut into the heads of this rank, by either engine, with KV heads copied where ranks are more."""

from __future__ import annotations

from typing import Any

import torch

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.integrations.deepspeed import check_installed, shard_with_deepspeed
from d2o_dist.integrations.hf.guards import text_config
from d2o_dist.integrations.hf.tensor_parallel import (
    REPLICAS,
    check_separate_projections,
    kv_replicas,
    num_kv_heads,
    repeat_kv_heads,
    shard_with_transformers,
)


def check_tensor_parallel(config: Any, parallel: ParallelConfig) -> int:
    """KV heads that a tensor rank will hold; all of them without tensor parallelism. Needs no weights.

    Raises:
        ValueError: head counts that do not divide, packed projections, or an engine that is not installed.
    """
    if parallel.tp == 1:
        return num_kv_heads(config)
    replicas = kv_replicas(config, parallel.tp)
    check_separate_projections(config)
    if parallel.tp_engine == "deepspeed":
        check_installed()
    return num_kv_heads(config) * replicas // parallel.tp


def shard_model(model: Any, mesh: ParallelMesh, parallel: ParallelConfig, device: torch.device) -> Any:
    """The model with this rank's shard of its weights. Every rank of the world calls it together.

    Args:
        model: loaded on the CPU; device: where it goes, on this rank.

    Its configuration still counts the KV heads of the whole model; `d2o_kv_replicas` says how many ranks share each.
    """
    if mesh.tp == 1:
        return model.to(device)
    check_tensor_parallel(model.config, parallel)
    config = text_config(model.config)
    replicas, heads = kv_replicas(config, mesh.tp), num_kv_heads(config)
    if replicas > 1:
        repeat_kv_heads(model, replicas)
    engine = shard_with_deepspeed if parallel.tp_engine == "deepspeed" else shard_with_transformers
    try:
        model = engine(model, mesh, device)
    finally:
        config.num_key_value_heads = heads
    setattr(config, REPLICAS, replicas)
    return model
