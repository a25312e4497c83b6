"""Ranks: where this one stands (mesh), what it says to others (collectives), who holds which token (shard)."""

from d2o_dist.comm.adapters import from_deepspeed, from_device_mesh, from_groups, from_megatron, to_device_mesh
from d2o_dist.comm.collectives import CollectiveError, Collectives, Pending
from d2o_dist.comm.launch import Launch, RankError, destroy, init_distributed, read_environment, run_guarded
from d2o_dist.comm.mesh import Axis, ParallelMesh, build_mesh, check_world
from d2o_dist.comm.mpu import Mpu
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.comm.shard import BlockStriped, Contiguous, ShardMap, Zigzag
from d2o_dist.comm.traffic import Traffic, TrafficCounter

__all__ = [
    "Axis",
    "BlockStriped",
    "CollectiveError",
    "Collectives",
    "Contiguous",
    "Launch",
    "Mpu",
    "ParallelMesh",
    "Pending",
    "RankError",
    "ShardMap",
    "Traffic",
    "TrafficCounter",
    "WorkQueue",
    "Zigzag",
    "build_mesh",
    "check_world",
    "destroy",
    "from_deepspeed",
    "from_device_mesh",
    "from_groups",
    "from_megatron",
    "init_distributed",
    "read_environment",
    "run_guarded",
    "to_device_mesh",
]
