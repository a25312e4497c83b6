"""The only caller of torch.distributed's collectives: one object an axis, every call counted, every failure named.

Rules that hold for all methods:
- Inputs are never written. Results carry no gradient. At size 1 nothing is sent, torch.distributed need not be
  initialised, and the result may BE the input: so do not write into results either.
- Every rank of the axis calls the same methods in the same order; shapes agree except where a method takes sizes.
- Any dtype can be moved: what the backend lacks, bool and fp8 among it, travels as bytes. What no backend can add up is
  refused, at size 1 too.
- A peer that dies or a timeout raises `CollectiveError` (gloo), or the watchdog aborts the process with a message
  (NCCL, where errors are asynchronous). The timeout is the group's: `init_distributed(timeout_s=...)`, that is
  `init_process_group(timeout=...)`, which groups made by `build_mesh` inherit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2o_dist.comm.mesh import Axis
from d2o_dist.comm.objects import from_bytes, to_bytes
from d2o_dist.comm.traffic import TrafficCounter
from d2o_dist.comm.wire import accumulator, check_reducible, from_wire, reducible, to_wire, wire_empty

# torch 2.13 renamed these two; the old names warn there, and older versions lack the new ones.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class CollectiveError(RuntimeError):
    """A collective failed on this rank, most often because a peer died or came too late; `__cause__` says how."""


# What gloo says of a peer that is gone, or does not come.
_LEFT = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited|timed out", re.I)


def is_left_alone(error: BaseException) -> bool:
    """Whether an error, of ours or of an engine's collective, says only that a peer is gone or did not come."""
    return isinstance(error, CollectiveError) or (isinstance(error, RuntimeError) and bool(_LEFT.search(str(error))))


def in_one_line(error: BaseException) -> str:
    """What an error says, without line breaks, places in PyTorch's C++ files, and gloo's advice."""
    return re.sub(r"\[/\S+:\d+\] |\. This is typically caused by .*", "", " ".join(str(error).split()))


class Pending:
    """A collective under way. `wait()` gives its result, however often it is called."""

    def __init__(self, finish: Callable[[], Any]):
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def wait(self) -> Any:
        """Block until done. Raises CollectiveError like the blocking call."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result


class Collectives:
    """Collectives over one axis of a mesh.

    Attributes:
        axis: the ranks that take part (`mesh.axis("sp")`).
        counter: where traffic is counted; a private one by default.
    """

    def __init__(self, axis: Axis, counter: TrafficCounter | None = None):
        self.axis = axis
        self.counter = TrafficCounter() if counter is None else counter

    @property
    def size(self) -> int:
        """Number of ranks, n."""
        return self.axis.size

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return self.axis.rank

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Elementwise "sum", "max" or "min": same shape and dtype, the same bits on all ranks.

        The order of a float sum is the backend's: it may change with size, shape and backend (`sum_in_rank_order` does
        not), and gloo rounds 16-bit sums at every step. What max and min make of NaN is undefined.
        """
        if op not in _OPS:
            raise ValueError(f"op ({op!r}) must be one of {sorted(_OPS)}")
        check_reducible(tensor.dtype, op)
        if self.size == 1 or tensor.numel() == 0:
            return tensor.detach()
        buffer = reducible(tensor)
        with self._call("all_reduce", 2 * (self.size - 1) * _nbytes(buffer) // self.size):
            dist.all_reduce(buffer, op=_OPS[op], group=self.axis.group)
        return buffer.to(tensor.dtype)

    def sum_in_rank_order(self, tensor: Tensor) -> Tensor:
        """((t_0 + t_1) + t_2) + ...: bits that depend on nothing but the terms. An all_gather, then a local sum.

        16-bit floats are added in float32 and rounded once. For small tensors: (n - 1) x tensor bytes are sent.
        """
        check_reducible(tensor.dtype, "sum")
        if self.size == 1:
            return tensor.detach()
        return _ordered_sum(self.all_gather(tensor.unsqueeze(0), 0).unbind(0), tensor.dtype)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Equal shapes, concatenated along `dim` in rank order."""
        return self.all_gather_async(tensor, dim).wait()

    def all_gather_async(self, tensor: Tensor, dim: int) -> Pending:
        """As `all_gather`, while this rank goes on computing; do not write into `tensor` before `wait()`."""
        if self.size == 1 or tensor.numel() == 0:
            parts = [tensor.detach()] * self.size
            return Pending(lambda: parts[0] if len(parts) == 1 else torch.cat(parts, dim))
        wire = to_wire(tensor)
        out = wire_empty((self.size, *tensor.shape), tensor)
        with self._call("all_gather", (self.size - 1) * _nbytes(wire)):
            work = _ALL_GATHER(out, wire, group=self.axis.group, async_op=True)

        def finish() -> Tensor:
            with self._guard("all_gather"):
                work.wait()
            gathered = from_wire(out, (self.size, *tensor.shape), tensor.dtype)
            return gathered.flatten(0, 1) if dim % tensor.dim() == 0 else torch.cat(gathered.unbind(0), dim)

        return Pending(finish)

    def all_gather_uneven(self, tensor: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Shapes that differ along `dim` only, empty ones too, concatenated in rank order.

        Args:
            tensor: this rank's part.
            dim: the dimension that differs.
            sizes: every rank's `shape[dim]`, known on all ranks; None: exchanged first (one more small all_gather).
        """
        have = tensor.shape[dim]
        if sizes is None:
            mine = torch.tensor([have], dtype=torch.int64, device=tensor.device)
            sizes = self.all_gather(mine, 0).tolist()
        self._check_count("sizes", sizes)
        if sizes[self.rank] != have:
            raise ValueError(f"sizes[{self.rank}] ({sizes[self.rank]}) must be this rank's shape[{dim}] ({have})")
        # Padded to the longest: gloo has no uneven gather, and shards are level to a token in practice.
        longest = max(sizes)
        if longest == have and min(sizes) == have:
            return self.all_gather(tensor, dim)
        padded = _pad(tensor.detach(), dim, longest)
        parts = self.all_gather(padded.unsqueeze(0), 0).unbind(0)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)

    def reduce_scatter(
        self, tensor: Tensor, dim: int, sizes: Sequence[int] | None = None, *, in_rank_order: bool = False
    ) -> Tensor:
        """The sum over ranks, of which each rank keeps its chunk along `dim`.

        Args:
            tensor: same shape on all ranks.
            dim: what is cut.
            sizes: chunk lengths by rank, summing to `shape[dim]`; None: equal chunks.
            in_rank_order: add terms by rank, as `sum_in_rank_order` does: an all_to_all of the same bytes, which also
                sends uneven chunks without padding. Otherwise the order is the backend's.
        """
        check_reducible(tensor.dtype, "sum")
        sizes = self._split_sizes(tensor, dim, sizes)
        if self.size == 1 or tensor.numel() == 0:
            return tensor.detach().narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])
        chunks = tensor.detach().split(list(sizes), dim)
        if in_rank_order:
            terms = self.all_to_all_list(chunks, [chunks[self.rank].shape] * self.size)
            return _ordered_sum(terms, tensor.dtype)
        longest = max(sizes)
        buffer = torch.stack([_pad(chunk, dim, longest) for chunk in chunks])
        out = torch.empty_like(buffer[0])
        with self._call("reduce_scatter", (self.size - 1) * _nbytes(buffer) // self.size):
            _REDUCE_SCATTER(out.view(-1), buffer.view(-1), group=self.axis.group)
        return out.narrow(dim, 0, sizes[self.rank])

    def all_to_all(
        self,
        tensor: Tensor,
        split_dim: int,
        concat_dim: int,
        split_sizes: Sequence[int] | None = None,
        concat_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Ulysses: cut along `split_dim`, send chunk r to rank r, concatenate what arrives along `concat_dim`.

        Args:
            tensor: this rank's shard.
            split_dim, concat_dim: two different dimensions.
            split_sizes: chunk lengths by rank; None: equal.
            concat_sizes: every rank's `shape[concat_dim]`; None: all as here.
        """
        split_dim, concat_dim = split_dim % tensor.dim(), concat_dim % tensor.dim()
        if split_dim == concat_dim:
            raise ValueError(f"split_dim ({split_dim}) and concat_dim ({concat_dim}) must differ")
        split_sizes = self._split_sizes(tensor, split_dim, split_sizes)
        concat_sizes = [tensor.shape[concat_dim]] * self.size if concat_sizes is None else list(concat_sizes)
        self._check_count("concat_sizes", concat_sizes)
        if concat_sizes[self.rank] != tensor.shape[concat_dim]:
            raise ValueError(
                f"concat_sizes[{self.rank}] ({concat_sizes[self.rank]}) must be this rank's "
                f"shape[{concat_dim}] ({tensor.shape[concat_dim]})"
            )
        shapes = []
        for size in concat_sizes:
            shape = list(tensor.shape)
            shape[split_dim], shape[concat_dim] = split_sizes[self.rank], size
            shapes.append(shape)
        return torch.cat(self.all_to_all_list(tensor.split(list(split_sizes), split_dim), shapes), concat_dim)

    def all_to_all_list(self, chunks: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send `chunks[r]` to rank r; what rank r sends here has `shapes[r]`. One dtype; empty chunks are legal."""
        self._check_count("chunks", chunks)
        self._check_count("shapes", shapes)
        if self.size == 1:
            if tuple(chunks[0].shape) != tuple(shapes[0]):
                raise ValueError(f"shapes[0] {tuple(shapes[0])} must be that of chunks[0] {tuple(chunks[0].shape)}")
            return [chunks[0].detach()]
        wires = [to_wire(chunk) for chunk in chunks]
        buffers = [wire_empty(shape, chunks[0]) for shape in shapes]
        counts = [buffer.numel() for buffer in buffers]
        out = buffers[0].new_empty(sum(counts))
        sent = sum(_nbytes(wire) for rank, wire in enumerate(wires) if rank != self.rank)
        with self._call("all_to_all", sent):
            dist.all_to_all_single(out, torch.cat(wires), counts, [w.numel() for w in wires], group=self.axis.group)
        pieces = zip(out.split(counts), shapes, strict=True)
        return [from_wire(piece, shape, chunks[0].dtype) for piece, shape in pieces]

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """`tensor` of rank `src` (its place on the axis); elsewhere `tensor` gives shape, dtype and device."""
        if not 0 <= src < self.size:
            raise ValueError(f"src ({src}) must be in [0, size ({self.size}))")
        if self.size == 1 or tensor.numel() == 0:
            return tensor.detach()
        wire = to_wire(tensor) if self.rank == src else wire_empty(tensor.shape, tensor)
        with self._call("broadcast", (self.size - 1) * _nbytes(wire) // self.size):
            dist.broadcast(wire, src=self.axis.ranks[src], group=self.axis.group)
        return tensor.detach() if self.rank == src else from_wire(wire, tensor.shape, tensor.dtype)

    def ring_shift(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None) -> Pending:
        """Hand tensors to the next rank and take the previous rank's; `wait()` gives them as a list.

        All sends and receives of a shift are posted together, so no order of ranks can block.

        Args:
            tensors: not to be written before `wait()`; empty ones are legal and send nothing.
            shapes: of what arrives, where shards differ; None: as what is sent. Dtypes are those sent.
        """
        shapes = [tensor.shape for tensor in tensors] if shapes is None else shapes
        if len(shapes) != len(tensors):
            raise ValueError(f"shapes ({len(shapes)}) must be as many as tensors ({len(tensors)})")
        if self.size == 1:
            same = [tensor.detach() for tensor in tensors]
            return Pending(lambda: same)
        wires = [to_wire(tensor) for tensor in tensors]
        buffers = [wire_empty(shape, tensor) for shape, tensor in zip(shapes, tensors, strict=True)]
        to, by = self.axis.ranks[(self.rank + 1) % self.size], self.axis.ranks[self.rank - 1]
        ops = []
        for tag, (wire, buffer) in enumerate(zip(wires, buffers, strict=True)):
            if wire.numel():
                ops.append(dist.P2POp(dist.isend, wire, to, self.axis.group, tag))
            if buffer.numel():
                ops.append(dist.P2POp(dist.irecv, buffer, by, self.axis.group, tag))
        with self._call("ring_shift", sum(_nbytes(wire) for wire in wires)):
            works = dist.batch_isend_irecv(ops) if ops else []

        def finish() -> list[Tensor]:
            with self._guard("ring_shift"):
                for work in works:
                    work.wait()
            # `wires` is named here so that what is being sent stays alive until it has left.
            arrived = zip(buffers, shapes, tensors, wires, strict=True)
            return [from_wire(buffer, shape, tensor.dtype) for buffer, shape, tensor, _ in arrived]

        return Pending(finish)

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """The plain value of rank `src` (see `comm.objects`); what other ranks pass is ignored.

        Two broadcasts: size, then bytes.
        """
        payload = to_bytes(value if self.rank == src else None).to(self._device())
        if self.size == 1:
            return value
        size = self.broadcast(torch.tensor([payload.numel()], device=payload.device), src)
        if self.rank != src:
            payload = payload.new_empty(int(size))
        return from_bytes(self.broadcast(payload, src))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's plain value (see `comm.objects`), in rank order. Two all_gathers: sizes, then bytes."""
        payload = to_bytes(value).to(self._device())
        if self.size == 1:
            return [value]
        sizes = self.all_gather(torch.tensor([payload.numel()], device=payload.device), 0).tolist()
        arrived = self.all_gather_uneven(payload, 0, sizes).cpu().split(sizes)
        return [from_bytes(part) for part in arrived]

    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""
        if self.size > 1:
            with self._call("barrier", 0):
                ids = [torch.cuda.current_device()] if self._device().type == "cuda" else None
                dist.barrier(group=self.axis.group, device_ids=ids)

    def _device(self) -> torch.device:
        """Where this axis's backend keeps small tensors of its own."""
        if self.size == 1:
            return torch.device("cpu")
        return torch.device("cuda" if "nccl" in str(dist.get_backend(self.axis.group)) else "cpu")

    def _split_sizes(self, tensor: Tensor, dim: int, sizes: Sequence[int] | None) -> list[int]:
        total = tensor.shape[dim]
        if sizes is None:
            if total % self.size:
                raise ValueError(f"shape[{dim}] ({total}) must be divisible by {self.axis.name} ({self.size})")
            return [total // self.size] * self.size
        self._check_count("sizes", sizes)
        if sum(sizes) != total:
            raise ValueError(f"sizes {list(sizes)} add up to {sum(sizes)} and must add up to shape[{dim}] ({total})")
        return list(sizes)

    def _check_count(self, name: str, values: Sequence) -> None:
        if len(values) != self.size:
            raise ValueError(f"{name} ({len(values)}) must have one entry a rank of {self.axis.name} ({self.size})")

    @contextmanager
    def _call(self, kind: str, num_bytes: int) -> Iterator[None]:
        self.counter.add(self.axis.name, kind, num_bytes)
        # Named in profiler traces, so that a trace shows which axis waits.
        with torch.profiler.record_function(f"comm::{self.axis.name}::{kind}"), self._guard(kind):
            yield

    @contextmanager
    def _guard(self, kind: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            where = f"{kind} over {self.axis.name} failed on its rank {self.rank} of {self.size}"
            why = f"(a peer may have stopped, or come too late): {in_one_line(error)}"
            raise CollectiveError(f"{where} {why}") from error


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pad(tensor: Tensor, dim: int, length: int) -> Tensor:
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _ordered_sum(terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total = terms[0].to(accumulator(dtype), copy=True)
    for term in terms[1:]:
        total += term
    return total.to(dtype)
