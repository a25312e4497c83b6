"""Where this rank stands: one mesh of dp x sp x tp ranks, made once and handed down.

    dp  data: replicas that work on different requests
    sp  sequence: shards of the tokens of one request (others say context parallel)
    tp  tensor: shards of the heads

Ranks are laid out with tp innermost, so that its ranks, which talk most, are neighbours on one node:
rank = (dp_rank * sp + sp_rank) * tp + tp_rank.

An axis of one rank has no process group and costs nothing; `ParallelMesh.local()` is the mesh of one process and needs
no torch.distributed. Meshes of other libraries: see `adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from d2o_dist.comm.groups import new_group

# Name -> the dimensions of the rank table [dp, sp, tp] that it spans.
AXES: dict[str, tuple[int, ...]] = {
    "dp": (0,),
    "sp": (1,),
    "tp": (2,),
    "request": (1, 2),  # the ranks that hold one request, sp-major
    "dp_sp": (0, 1),  # the ranks that hold the same weights: what ZeRO shards over
    "world": (0, 1, 2),
}
_BY_PARTS = {("sp", "tp"): "request", ("dp", "sp"): "dp_sp", ("dp", "sp", "tp"): "world"}


@dataclass
class Axis:
    """The ranks along one axis that this rank belongs to.

    Attributes:
        name: a key of AXES.
        rank: this rank's place, in [0, size).
        ranks: global ranks, ascending; place is index.
        group: their process group; None when there is one rank. Another one once `Recovery` has connected them anew.
    """

    name: str
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelMesh:
    """The sizes of the axes, this rank, and its groups. Build it with `build_mesh`, `local` or an adapter.

    Attributes:
        dp, sp, tp: sizes.
        rank: global rank.
        axes: name (a key of AXES) -> Axis.
    """

    dp: int
    sp: int
    tp: int
    rank: int
    axes: Mapping[str, Axis]

    @classmethod
    def local(cls) -> ParallelMesh:
        """One process by itself, whether or not torch.distributed is initialised."""
        return cls(1, 1, 1, 0, {name: Axis(name) for name in AXES})

    def axis(self, name: str | tuple[str, ...]) -> Axis:
        """"dp", "sp", "tp", "request" or ("sp", "tp"), "dp_sp" or ("dp", "sp"), "world"."""
        key = _BY_PARTS.get(name) if isinstance(name, tuple) else name
        if key not in self.axes:
            raise KeyError(f"no axis {name!r}; there are {', '.join(AXES)}")
        return self.axes[key]

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp * self.sp * self.tp

    @property
    def dp_rank(self) -> int:
        """Which replica."""
        return self.axes["dp"].rank

    @property
    def sp_rank(self) -> int:
        """Which token shard."""
        return self.axes["sp"].rank

    @property
    def tp_rank(self) -> int:
        """Which head shard."""
        return self.axes["tp"].rank

    @property
    def leads_request(self) -> bool:
        """Whether this is the first of the ranks that hold one request: the one that writes its records."""
        return self.axes["request"].rank == 0

    def __str__(self) -> str:
        places = (f"{name} {self.axes[name].rank} of {self.axes[name].size}" for name in ("dp", "sp", "tp"))
        return f"rank {self.rank} ({', '.join(places)})"


def check_world(dp: int, sp: int, tp: int, world_size: int) -> None:
    """Raises ValueError, naming the numbers, unless world_size = dp x sp x tp and all are at least 1."""
    for name, size in (("dp", dp), ("sp", sp), ("tp", tp)):
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    need = dp * sp * tp
    if need != world_size:
        hint = f"start {need} ranks (torchrun --nproc-per-node {need}, deepspeed --num_gpus {need})"
        if world_size % (sp * tp) == 0:
            hint += f", or set dp to {world_size // (sp * tp)}"
        raise ValueError(f"world size ({world_size}) must equal dp ({dp}) x sp ({sp}) x tp ({tp}) = {need}: {hint}")


def build_mesh(dp: int = 1, sp: int = 1, tp: int = 1) -> ParallelMesh:
    """The mesh of an initialised default process group; the local one where there is none and all sizes are 1.

    Every rank must call it at the same point: process groups are made, on all ranks in the same order.

    Raises:
        ValueError: if dp x sp x tp is not the world size (1 without a process group).
    """
    initialised = dist.is_available() and dist.is_initialized()
    check_world(dp, sp, tp, dist.get_world_size() if initialised else 1)
    if not initialised:
        return ParallelMesh.local()
    return assemble(torch.arange(dp * sp * tp).view(dp, sp, tp))


def assemble(table: Tensor, given: Mapping[str, dist.ProcessGroup] | None = None) -> ParallelMesh:
    """The mesh of a table of global ranks [dp, sp, tp], the same on every rank; called by all of them together.

    Args:
        table: every rank of the world once, ascending along each axis.
        given: groups of this rank that exist already, by axis name; used where their ranks are those of the table. The
            ranks must agree on which axes are given and fit.

    Raises:
        ValueError: if ranks do not ascend: collectives order their results by global rank.
    """
    rank, world, given = dist.get_rank(), dist.get_world_size(), dict(given or {})
    known: dict[tuple[int, ...], dist.ProcessGroup] = {}
    axes = {}
    for name, dims in AXES.items():
        sets = _rank_sets(table, dims)
        if any(list(ranks) != sorted(ranks) for ranks in sets):
            raise ValueError(f"global ranks must ascend along {name}: {sets}")
        mine = next(ranks for ranks in sets if rank in ranks)
        if len(mine) > 1 and mine not in known:
            if len(mine) == world:
                known[mine] = dist.group.WORLD
            elif name in given and tuple(dist.get_process_group_ranks(given[name])) == mine:
                known[mine] = given[name]
            else:
                for ranks in sets:  # all of them, on all ranks: new_group is collective
                    group = new_group(list(ranks))
                    if ranks == mine:
                        known[mine] = group
        axes[name] = Axis(name, mine.index(rank), mine, known.get(mine))
    dp, sp, tp = table.shape
    return ParallelMesh(dp, sp, tp, rank, axes)


def _rank_sets(table: Tensor, dims: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The rank table cut into the sets that an axis spanning `dims` joins."""
    rest = [dim for dim in range(3) if dim not in dims]
    size = 1
    for dim in dims:
        size *= table.shape[dim]
    return [tuple(ranks) for ranks in table.permute(*rest, *dims).reshape(-1, size).tolist()]
