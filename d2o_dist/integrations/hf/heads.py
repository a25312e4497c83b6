"""How a model's heads lie on the ranks of a request."""

from __future__ import annotations

from typing import Any

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig

# Set on the configuration of a model whose KV heads were copied, so that every tensor rank has one.
KV_REPLICAS = "d2o_kv_replicas"


def heads_of_tensor_rank(config: Any, tp: int) -> tuple[int, int]:
    """KV heads of each of `tp` tensor ranks, and how many ranks hold the same ones.

    Raises:
        ValueError: the heads cannot be dealt evenly, or there are fewer than ranks and they were not copied.
    """
    replicas = getattr(config, KV_REPLICAS, 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads % tp:
        raise ValueError(f"num_attention_heads ({config.num_attention_heads}) must be divisible by tp ({tp})")
    if kv_heads * replicas % tp:
        raise ValueError(
            f"num_key_value_heads ({kv_heads}, {replicas} copies of each) must be divisible by tp ({tp})"
        )
    return kv_heads * replicas // tp, replicas


def request_ranks(
    config: Any, mesh: ParallelMesh | None, parallel: ParallelConfig | None, counter: TrafficCounter | None
) -> RequestRanks:
    """The ranks that share a request to the model of this configuration.

    Raises:
        ValueError: `parallel` without a mesh, or heads that the ranks cannot share.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    parallel = ParallelConfig(tp=mesh.tp, sp=mesh.sp) if parallel is None else parallel
    kv_heads, replicas = heads_of_tensor_rank(config, mesh.tp)
    return RequestRanks(mesh, parallel, kv_heads, replicas, counter)
