"""Meshes of other libraries as ours, and ours as theirs. Nothing here imports DeepSpeed or Megatron on import.

Their process groups are used as they are; only those that they lack (sp and tp together, say) are made. All functions
are called by every rank at the same point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import Axis, ParallelMesh, assemble, check_world

_NAMES = ("dp", "sp", "tp")


def from_device_mesh(device_mesh: DeviceMesh) -> ParallelMesh:
    """From a DeviceMesh over the whole world whose named dimensions are some of dp, sp, tp, in that order.

    Raises:
        ValueError: on other names or another order, or if the mesh is not the whole world.
    """
    names = tuple(device_mesh.mesh_dim_names or ())
    if not names or names != tuple(name for name in _NAMES if name in names):
        raise ValueError(f"mesh_dim_names {names} must be some of {_NAMES}, in that order")
    sizes = dict(zip(names, device_mesh.mesh.shape, strict=True))
    shape = [sizes.get(name, 1) for name in _NAMES]
    check_world(*shape, dist.get_world_size())
    given = {name: device_mesh.get_group(name) for name in names if sizes[name] > 1}
    return assemble(device_mesh.mesh.cpu().view(shape), given)


def to_device_mesh(mesh: ParallelMesh, axis: str, device_type: str) -> DeviceMesh:
    """One axis as a DeviceMesh of one dimension of that name, on the same process group: what transformers' TP takes.

    Raises:
        ValueError: for an axis of one rank, which has no group.
    """
    group = mesh.axis(axis).group
    if group is None:
        raise ValueError(f"{axis} has size 1: there is nothing to shard over")
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=(axis,))


def from_groups(
    tp: dist.ProcessGroup | None = None, sp: dist.ProcessGroup | None = None, dp: dist.ProcessGroup | None = None
) -> ParallelMesh:
    """From this rank's process groups; None: an axis of one rank. The data axis is what remains of the world.

    Raises:
        ValueError: if tensor and sequence groups of all ranks do not form equal grids, or if `dp` shows that what
            remains is another axis, such as pipeline parallelism.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = Axis("world", rank, tuple(range(world)), dist.group.WORLD if world > 1 else None)
    mine = tuple((rank,) if group is None else tuple(dist.get_process_group_ranks(group)) for group in (tp, sp))
    table = _grid(Collectives(everyone).all_gather_object(mine))
    if dp is not None and len(dist.get_process_group_ranks(dp)) not in (table.shape[0], table.shape[:2].numel()):
        # Either is right: some libraries count the sequence ranks, which hold the same weights, as data parallel.
        raise ValueError(
            f"data parallel size ({len(dist.get_process_group_ranks(dp))}) must be {table.shape[0]} = world size "
            f"({world}) / (sp ({table.shape[1]}) x tp ({table.shape[2]})): pipeline parallelism is not supported"
        )
    given = {name: group for name, group in (("tp", tp), ("sp", sp), ("dp", dp)) if group is not None}
    return assemble(table, _agreed(everyone, given, table))


def from_deepspeed(mpu: Any = None) -> ParallelMesh:
    """From an mpu object, or without one from what DeepSpeed was initialised with (`deepspeed.utils.groups`)."""
    if mpu is None:
        from deepspeed.utils import groups

        return from_groups(
            _ask(groups.get_tensor_model_parallel_group),
            _ask(groups._get_sequence_parallel_group),  # DeepSpeed has no public name for it
            _ask(groups.get_data_parallel_group),
        )
    tensor = ["get_tensor_model_parallel_group", "get_slice_parallel_group"]
    # DeepSpeed's own sequence-parallel mpu, known by this name, calls its sequence group "model parallel".
    if not hasattr(mpu, "initialize_sequence_parallel"):
        tensor.append("get_model_parallel_group")
    names = (tensor, ["get_sequence_parallel_group"], ["get_data_parallel_group"])
    found = [next((getattr(mpu, name) for name in asked if hasattr(mpu, name)), None) for asked in names]
    return from_groups(*(None if method is None else _ask(method) for method in found))


def from_megatron(parallel_state: Any) -> ParallelMesh:
    """From `megatron.core.parallel_state` (or a module like it): tensor, context and data parallel groups."""
    context = getattr(parallel_state, "get_context_parallel_group", None)
    return from_groups(
        _ask(parallel_state.get_tensor_model_parallel_group),
        None if context is None else _ask(context),
        _ask(parallel_state.get_data_parallel_group),
    )


def _ask(method: Callable[[], Any]) -> dist.ProcessGroup | None:
    """A library's group; None where it has not set one up, which each says in its own way."""
    try:
        return method()
    except (AssertionError, KeyError, AttributeError):
        return None


def _grid(groups: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Every rank's (tp ranks, sp ranks) -> the table of global ranks [dp, sp, tp]; replicas by their first rank."""
    replicas: list[Tensor] = []
    placed: set[int] = set()
    for rank, (tp_ranks, _) in enumerate(groups):
        if rank in placed:
            continue
        columns = [groups[member][1] for member in tp_ranks]  # the sequence group of each tensor rank
        if len({len(column) for column in columns}) == 1:
            replicas.append(torch.tensor(columns).T)
            placed |= {member for column in columns for member in column}
    shapes = {tuple(replica.shape) for replica in replicas}
    table = torch.stack(replicas) if len(shapes) == 1 else torch.empty(0, 1, 1, dtype=torch.int64)
    fits = sorted(table.flatten().tolist()) == list(range(len(groups))) and all(
        groups[member] == (tuple(row), tuple(replica[:, place].tolist()))
        for replica in table
        for row in replica.tolist()
        for place, member in enumerate(row)
    )
    if not fits:
        raise ValueError(f"tensor and sequence groups of {len(groups)} ranks must form equal grids: {groups}")
    return table


def _agreed(everyone: Axis, given: dict[str, dist.ProcessGroup], table: Tensor) -> dict[str, dist.ProcessGroup]:
    """Those of the given groups that fit the table on ALL ranks: otherwise some would make a group and others not."""
    rank = everyone.rank
    dp_place, sp_place, tp_place = (table == rank).nonzero()[0].tolist()
    lines = {
        "tp": table[dp_place, sp_place],
        "sp": table[dp_place, :, tp_place],
        "dp": table[:, sp_place, tp_place],
    }
    fits = [name for name, group in given.items() if dist.get_process_group_ranks(group) == lines[name].tolist()]
    common = set.intersection(*map(set, Collectives(everyone).all_gather_object(fits)))
    return {name: group for name, group in given.items() if name in common}
