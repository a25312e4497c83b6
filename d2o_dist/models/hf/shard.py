"""A loaded model cut into the heads of this rank, by either engine, with KV heads copied where ranks are more."""

from __future__ import annotations

from typing import Any

import torch

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.hf.deepspeed import check_installed, shard_with_deepspeed
from d2o_dist.models.hf.guards import latent_dim, text_config
from d2o_dist.models.hf.shape import KV_REPLICAS, layer_heads
from d2o_dist.models.hf.tensor_parallel import (
    check_engine,
    check_not_quantised,
    check_separate_projections,
    check_version,
    kv_replicas,
    repeat_kv_heads,
    shard_with_transformers,
)


def mark_replicas(config: Any, parallel: ParallelConfig) -> int:
    """Note on a model's configuration how many tensor ranks will share each KV head, where `D2OCache` looks for it.

    Needs no weights: it refuses what could not be sharded.

    Raises:
        ValueError: quantised weights, head counts that do not divide, packed projections, or an engine that is not
            there.
    """
    if parallel.tp == 1:
        return 1
    check_not_quantised(config, parallel.tp)
    replicas = kv_replicas(config, parallel.tp)
    check_separate_projections(config)
    check_engine(config, parallel.tp_engine)
    if parallel.tp_engine == "deepspeed":
        check_installed()
    else:
        check_version()
    setattr(text_config(config), KV_REPLICAS, replicas)
    return replicas


def shard_model(model: Any, mesh: ParallelMesh, parallel: ParallelConfig, device: torch.device) -> Any:
    """The model with this rank's shard of its weights. Every rank of the world calls it together.

    Args:
        model: loaded on the CPU; device: where it goes, on this rank.

    Its configuration still counts the KV heads of the whole model; `d2o_kv_replicas` says how many ranks share each.
    """
    if mesh.tp == 1:
        return model.to(device)
    replicas = mark_replicas(model.config, parallel)
    config, (_, kv_heads) = text_config(model.config), layer_heads(model.config)[0]
    are_copied = replicas > 1 and latent_dim(config) is None
    if are_copied:
        repeat_kv_heads(model, replicas)
    engine = shard_with_deepspeed if parallel.tp_engine == "deepspeed" else shard_with_transformers
    try:
        return engine(model, mesh, device)
    finally:
        if are_copied:
            config.num_key_value_heads = kv_heads
