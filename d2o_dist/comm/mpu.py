"""Our mesh as the `mpu` object that `deepspeed.initialize` and `init_inference` take."""

from __future__ import annotations

import torch.distributed as dist

from d2o_dist.comm.groups import new_group
from d2o_dist.comm.mesh import Axis, ParallelMesh


class Mpu:
    """Model-parallel unit: groups, ranks and sizes under the names that DeepSpeed and Megatron look up.

    "Model parallel" is tensor parallel here, as ZeRO reduces norms over it. ZeRO shards over `sequence_data` where an
    mpu has it: the ranks with the same weights. DeepSpeed reads None as the whole world, so that here even an axis of
    one rank needs a group: made on construction, which every rank must come to at the same point.
    """

    def __init__(self, mesh: ParallelMesh):
        self._mesh = mesh
        self._alone = None
        if dist.is_available() and dist.is_initialized() and any(axis.size == 1 for axis in mesh.axes.values()):
            for rank in range(dist.get_world_size()):
                group = new_group([rank])
                if rank == dist.get_rank():
                    self._alone = group

    def _axis(self, name: str) -> Axis:
        return self._mesh.axis(name)

    def _group(self, name: str) -> dist.ProcessGroup | None:
        return self._axis(name).group or self._alone

    def get_model_parallel_group(self):
        """The tensor-parallel group."""
        return self._group("tp")

    def get_model_parallel_rank(self) -> int:
        """Place on tp."""
        return self._axis("tp").rank

    def get_model_parallel_world_size(self) -> int:
        """Size of tp."""
        return self._axis("tp").size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first on tp."""
        return self._global("tp")[0]

    def get_data_parallel_group(self):
        """Replicas of this rank's shard."""
        return self._group("dp")

    def get_data_parallel_rank(self) -> int:
        """Place on dp."""
        return self._axis("dp").rank

    def get_data_parallel_world_size(self) -> int:
        """Size of dp."""
        return self._axis("dp").size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks on dp."""
        return self._global("dp")

    def get_sequence_parallel_group(self):
        """Token shards of one request, for this rank's heads."""
        return self._group("sp")

    def get_sequence_parallel_rank(self) -> int:
        """Place on sp."""
        return self._axis("sp").rank

    def get_sequence_parallel_world_size(self) -> int:
        """Size of sp."""
        return self._axis("sp").size

    def get_sequence_data_parallel_group(self):
        """The ranks that hold the same weights."""
        return self._group("dp_sp")

    def get_sequence_data_parallel_rank(self) -> int:
        """Place among the ranks with the same weights."""
        return self._axis("dp_sp").rank

    def get_sequence_data_parallel_world_size(self) -> int:
        """Number of ranks with the same weights."""
        return self._axis("dp_sp").size

    def _global(self, name: str) -> list[int]:
        return list(self._axis(name).ranks)
