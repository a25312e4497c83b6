"""Megatron's process groups over the ranks of our mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state

from d2o_dist.comm.launch import DEFAULT_TIMEOUT_S
from d2o_dist.comm.mesh import ParallelMesh


def join(mesh: ParallelMesh, timeout_s: float) -> None:
    """Initialise `parallel_state` with tensor and context groups of the ranks of `tp` and `sp`, if it is not yet.

    Every rank of the mesh calls it together. Megatron needs a process group, so one process by itself gets one.

    Raises:
        ValueError: it was initialised with other sizes.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            mesh.tp, context_parallel_size=mesh.sp, distributed_timeout_minutes=timeout_s / 60
        )
    check_sizes(mesh)
    for axis, group in (
        ("tp", parallel_state.get_tensor_model_parallel_group()), ("sp", parallel_state.get_context_parallel_group())
    ):  # fmt: skip
        assert tuple(dist.get_process_group_ranks(group)) == mesh.axis(axis).ranks, axis


@contextmanager
def alone() -> Iterator[None]:
    """A block in which Megatron has groups of this one process; what was made for it is gone afterwards.

    Raises:
        ValueError: Megatron has groups of several.
    """
    makes_world, makes_groups = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    join(ParallelMesh.local(), DEFAULT_TIMEOUT_S)
    try:
        yield
    finally:
        if makes_groups:
            parallel_state.destroy_model_parallel()
        if makes_world:
            dist.destroy_process_group()


def check_sizes(mesh: ParallelMesh | None) -> None:
    """Refuse a mesh of other sizes than Megatron's; None: one process.

    Raises:
        ValueError: names both, or the pipeline stages.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    cp = parallel_state.get_context_parallel_world_size()
    found = (1, 1) if mesh is None else (mesh.tp, mesh.sp)
    if found != (tp, cp):
        raise ValueError(
            f"tp ({found[0]}) and sp ({found[1]}) of the mesh must be tensor_model_parallel_size ({tp}) and "
            f"context_parallel_size ({cp}): take the mesh of from_megatron(parallel_state)"
        )
