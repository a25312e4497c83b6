"""The ranks that hold one request: which heads each of them has, and the collectives by which they decide as one.

Heads are dealt twice. Tensor rank t of tp owns block t of the model's KV heads; within it, where the cache is laid out
by heads, sequence rank s of sp owns sub-block s (the first ranks one head more where they do not divide). The global
order of heads is therefore tp-major. Where a model has fewer KV heads than tensor ranks, R = `kv_replicas` neighbouring
tensor ranks hold a copy of the same head and different query heads of its group.

Shape legend: B rows, h KV heads (or query heads) at hand, H all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.shard import Contiguous
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.config.parallel import ParallelConfig


class RequestRanks:
    """One rank's view of the ranks that share a request.

    Args:
        mesh: where this rank stands.
        parallel: how the request is spread; its `tp` and `sp` must be the mesh's.
        num_kv_heads: KV heads of one tensor rank.
        kv_replicas: tensor ranks that hold the same KV head.
        counter: where traffic is counted.

    Attributes:
        parallel: with `auto` settled.
        may_ring: whether a prompt that is too long to gather may travel around a ring: `sp_prefill` was `auto`.
        tp, sp, request: collectives over the two axes, and over all ranks of the request.
        kv_sizes: KV heads of each sequence rank in the layout by heads.

    Raises:
        ValueError: the mesh is of another size, or the heads do not fit (see `ParallelConfig.resolve`).
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        parallel: ParallelConfig,
        num_kv_heads: int,
        kv_replicas: int = 1,
        counter: TrafficCounter | None = None,
    ) -> None:
        for name in ("tp", "sp"):
            if getattr(mesh, name) != getattr(parallel, name):
                raise ValueError(f"{name} of the mesh ({getattr(mesh, name)}) must be {getattr(parallel, name)}")
        self.parallel = parallel.resolve(num_kv_heads)
        self.may_ring = parallel.sp_prefill == "auto"
        self.counter = TrafficCounter() if counter is None else counter
        self.tp = Collectives(mesh.axis("tp"), self.counter)
        self.sp = Collectives(mesh.axis("sp"), self.counter)
        self.request = Collectives(mesh.axis("request"), self.counter)
        self.kv_replicas = kv_replicas
        self.kv_sizes = Contiguous(num_kv_heads, self.sp.size).lengths()

    @classmethod
    def alone(cls) -> RequestRanks:
        """One process that holds everything."""
        return cls(ParallelMesh.local(), ParallelConfig(), 1)

    def __deepcopy__(self, memo: dict) -> RequestRanks:
        """Itself: a copy of a cache is held by the same ranks, and process groups cannot be copied."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Of one process; process groups cannot be pickled.

        Raises:
            ValueError: ranks share the request.
        """
        if self.is_shared:
            raise ValueError(
                f"a cache that ranks share (tp {self.tp.size}, sp {self.sp.size}) cannot be pickled: use "
                "cache.save(folder), on all of them"
            )
        return vars(self)

    @property
    def is_shared(self) -> bool:
        """Whether several ranks share the request."""
        return self.sp.size * self.tp.size > 1

    @property
    def deals_tokens(self) -> bool:
        """Whether the tokens of a prompt are spread over ranks."""
        return self.sp.size > 1

    @property
    def by_heads(self) -> bool:
        """Whether decoding finds every slot of a KV head on one rank (always so without sequence ranks)."""
        return self.parallel.cache_layout == "heads"

    @property
    def replica_group(self) -> range:
        """The tensor ranks that hold the same KV heads as this one."""
        first = self.tp.rank // self.kv_replicas * self.kv_replicas
        return range(first, first + self.kv_replicas)

    @property
    def is_first_copy(self) -> bool:
        """Whether this is the first of the tensor ranks that hold the same KV heads: the one that decides for them."""
        return self.tp.rank == self.replica_group.start

    def from_first(self, tensor: Tensor) -> Tensor:
        """`tensor` of the first rank of the request, on all of them. One collective.

        For what must be decided alike and rests on numbers that ranks computed apart, down to the last bit.
        """
        return self.request.broadcast(tensor, 0)

    # ---- heads ---------------------------------------------------------------------------------------------------

    def sizes(self, num_heads: int) -> list[int]:
        """Of `num_heads` (query or KV) heads of this tensor rank, how many each sequence rank has by heads."""
        scale = num_heads // sum(self.kv_sizes)
        return [scale * size for size in self.kv_sizes]

    def kv_heads(self, num_here: int, *, spread: bool) -> range:
        """Which KV heads of a layer of the whole model the `num_here` at hand are."""
        dealt = self.deals_tokens and not spread
        block = sum(self.kv_sizes) if dealt else num_here
        first = self.tp.rank // self.kv_replicas * block + (sum(self.kv_sizes[: self.sp.rank]) if dealt else 0)
        return range(first, first + num_here)

    @property
    def copied_heads(self) -> slice | None:
        """Which of the heads that `gather_kv_heads` gives are those at hand, as the first of the ranks that hold copies
        of them has them; None where there are no copies."""
        mine = self.tp.rank // self.kv_replicas
        return None if self.kv_replicas == 1 else slice(mine, mine + 1)

    def my_heads(self, tensor: Tensor) -> Tensor:
        """[B, heads of the tensor rank, ...] -> those of this sequence rank."""
        sizes = self.sizes(tensor.shape[1])
        return tensor.narrow(1, sum(sizes[: self.sp.rank]), sizes[self.sp.rank])

    def join_heads(self, tensor: Tensor) -> Tensor:
        """The inverse of `my_heads`: [B, h, ...] of each sequence rank -> [B, heads of the tensor rank, ...]."""
        if self.sp.size == 1:
            return tensor
        scale = tensor.shape[1] // self.kv_sizes[self.sp.rank]
        return self.sp.all_gather_uneven(tensor, 1, [scale * size for size in self.kv_sizes])

    def gather_query_heads(self, tensor: Tensor) -> Tensor:
        """[B, query heads of the tensor rank, ...] -> [B, H, ...] of all tensor ranks, the same on each."""
        return self.tp.all_gather(tensor, 1)

    def gather_kv_heads(self, tensor: Tensor) -> Tensor:
        """[B, KV heads of the tensor rank, ...] -> [B, H, ...] of all tensor ranks, copies counted once."""
        return self.tp.all_gather(tensor, 1)[:, :: self.kv_replicas]

    @property
    def total_of_replicas(self) -> Callable[[Tensor], Tensor] | None:
        """`sum_replicas`; None where KV heads have no copies."""
        return None if self.kv_replicas == 1 else self.sum_replicas

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """The sum over the tensor ranks that hold copies of the same KV head, the same bits on all of them.

        Each copy sees the attention of its own query heads only; what a slot received is the sum.
        """
        if self.kv_replicas == 1:
            return tensor
        first, *others = self._of_replicas(tensor)
        total = first.clone()
        for part in others:
            total += part
        return total

    def max_replicas(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the tensor ranks that hold copies of the same KV head."""
        if self.kv_replicas == 1:
            return tensor
        return torch.stack(self._of_replicas(tensor)).amax(0)

    def from_first_copy(self, tensor: Tensor) -> Tensor:
        """`tensor` of the first of the ranks that hold copies of the same KV head, on all of them: of the same shape.

        All tensor ranks call it together. Those with other KV heads may have another shape, or nothing, to send.
        """
        if self.kv_replicas == 1:
            return tensor
        group, nothing = self.replica_group, tensor[:0]
        others = [rank in group and rank != group.start for rank in range(self.tp.size)]
        chunks = [tensor if self.is_first_copy and other else nothing for other in others]
        shapes = [nothing.shape] * self.tp.size
        if not self.is_first_copy:
            shapes[group.start] = tensor.shape
        arrived = self.tp.all_to_all_list(chunks, shapes)
        return tensor if self.is_first_copy else arrived[group.start]

    def _of_replicas(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all copies, in rank order. Ranks with other KV heads may have another shape at hand."""
        nothing = tensor[:0]
        inside = [rank in self.replica_group for rank in range(self.tp.size)]
        chunks = [tensor if mine else nothing for mine in inside]
        arrived = self.tp.all_to_all_list(chunks, [chunk.shape for chunk in chunks])
        return arrived[self.replica_group.start : self.replica_group.stop]

    def heads_of_replicas(self, tensor: Tensor) -> tuple[Tensor, int]:
        """[B, h, n, X] of this rank's query heads -> [B, R x h, m, X] of the query heads of all copies, in their order,
        for this rank's part of the n queries, which may be empty; and which query that part begins with.

        For what is not a sum over query heads: each copy works on all heads of its group, for its own queries.
        """
        if self.kv_replicas == 1:
            return tensor, 0
        group, (batch, heads, count, width) = self.replica_group, tensor.shape
        lengths = Contiguous(count, self.kv_replicas).lengths()
        part = dict(zip(group, tensor.split(lengths, 2), strict=True))
        mine = self.tp.rank - group.start
        nothing = tensor[:, :, :0]
        chunks = [part.get(rank, nothing) for rank in range(self.tp.size)]
        shapes = [(batch, heads, lengths[mine] if rank in group else 0, width) for rank in range(self.tp.size)]
        arrived = self.tp.all_to_all_list(chunks, shapes)
        return torch.cat(arrived[group.start : group.stop], 1), sum(lengths[:mine])

    # ---- tokens --------------------------------------------------------------------------------------------------

    def max_with_position(self, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise over sequence ranks: the largest value, and of equal ones the lowest position. One collective.

        Args:
            value: float32 or float64, no NaN; position: int64 in [0, 2^31), any shape, the same for both.
        """
        if self.sp.size == 1:
            return value, position
        if value.dtype == torch.float32:
            # Floats order like integers once the bits of negative ones are flipped; the position decides ties. Adding
            # 0 makes -0 a +0: they are equal, and their bits must be.
            bits = (value + 0.0).view(torch.int32)
            ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
            best = self.sp.all_reduce((ordered << 32) | (0x7FFFFFFF - position), "max")
            bits = (best >> 32).int()
            found = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
            return found, 0x7FFFFFFF - (best & 0xFFFFFFFF)
        both = self.sp.all_gather(torch.stack([value, position.to(value.dtype)]).unsqueeze(0), 0)
        values, positions = both[:, 0], both[:, 1].long()
        top = values.amax(0)
        return top, torch.where(values == top, positions, torch.iinfo(torch.int64).max).amin(0)
