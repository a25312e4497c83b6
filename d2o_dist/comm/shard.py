"""Which rank holds which token: maps between global token indices and (rank, local index).

Shards are cut from chunks of consecutive tokens, dealt to ranks by a rule. A shard is always in ascending global order,
so a local causal mask stays a comparison of global indices. Lengths that do not divide are legal, and so are empty
shards (`length` < `world`). A map is a value: two ranks that know (rule, length, world) know all of it, and nothing is
communicated.

    tokens 0..15, world 2:  Contiguous     00000000 11111111
                            Zigzag         0000 1111 1111 0000     equal causal work: early and late queries paired
                            BlockStriped   00 11 00 11 00 11 00 11 (block 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardMap:
    """A dealing of `length` tokens to `world` ranks. Subclasses say where chunks begin and who owns them.

    Attributes:
        length: number of tokens, >= 0.
        world: number of ranks, >= 1.
    """

    length: int
    world: int

    def __post_init__(self):
        if self.length < 0:
            raise ValueError(f"length ({self.length}) must be at least 0")
        if self.world < 1:
            raise ValueError(f"world ({self.world}) must be at least 1")

    def _sizes(self) -> Tensor:
        """[C] int64: tokens of each chunk, in global order; zeros are legal."""
        raise NotImplementedError

    def _owners(self) -> Tensor:
        """[C] int64: the rank that holds each chunk."""
        raise NotImplementedError

    @cached_property
    def _chunks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(first global index, size, owner, first local index in the owner's shard) of the chunks that hold tokens."""
        size, owner = self._sizes(), self._owners()
        start = size.cumsum(0) - size
        keep = size > 0
        start, size, owner = start[keep], size[keep], owner[keep]
        offset = torch.empty_like(start)
        for rank in range(self.world):
            mine = owner == rank
            offset[mine] = size[mine].cumsum(0) - size[mine]
        return start, size, owner, offset

    def segments(self, rank: int) -> list[tuple[int, int]]:
        """Contiguous global ranges [start, stop) of a shard, ascending; neighbours joined; [] for an empty shard."""
        start, size, owner, _ = self._chunks
        mine = owner == self._checked(rank)
        joined: list[tuple[int, int]] = []
        for first, count in zip(start[mine].tolist(), size[mine].tolist(), strict=True):
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], first + count)
            else:
                joined.append((first, first + count))
        return joined

    def indices(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """[lengths()[rank]] int64: global indices of a shard, ascending."""
        start, size, owner, offset = self._chunks
        mine = owner == self._checked(rank)
        # Token j of the shard lies in some chunk, at that chunk's start + (j - the chunk's offset in the shard).
        shift = (start[mine] - offset[mine]).repeat_interleave(size[mine])
        return (torch.arange(len(shift)) + shift).to(device or "cpu")

    def lengths(self) -> list[int]:
        """Tokens of each rank; their sum is `length`."""
        _, size, owner, _ = self._chunks
        return torch.zeros(self.world, dtype=torch.int64).index_add_(0, owner, size).tolist()

    def owner(self, index: int | Tensor) -> int | Tensor:
        """The rank that holds each global index (an int for an int, else int64 of the same shape)."""
        chunk, flat = self._find(index)
        return self._like(index, self._chunks[2].to(flat.device)[chunk])

    def to_local(self, index: int | Tensor) -> int | Tensor:
        """Place of each global index in its owner's shard."""
        chunk, flat = self._find(index)
        start, offset = self._chunks[0].to(flat.device), self._chunks[3].to(flat.device)
        return self._like(index, flat - start[chunk] + offset[chunk])

    def take(self, tensor: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's shard of a tensor that holds all tokens along `dim`."""
        if tensor.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} of the tensor ({tensor.shape[dim]}) must be the length ({self.length})")
        return tensor.index_select(dim, self.indices(rank, tensor.device))

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world:
            raise IndexError(f"rank ({rank}) must be in [0, world ({self.world}))")
        return rank

    def _find(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.as_tensor(index, dtype=torch.int64)
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= self.length):
            wrong = int(flat.min()) if int(flat.min()) < 0 else int(flat.max())
            raise IndexError(f"token index ({wrong}) must be in [0, length ({self.length}))")
        return torch.searchsorted(self._chunks[0].to(flat.device), flat, right=True) - 1, flat

    @staticmethod
    def _like(given: int | Tensor, found: Tensor) -> int | Tensor:
        return found if isinstance(given, Tensor) else int(found)


@dataclass(frozen=True)
class Contiguous(ShardMap):
    """One run of tokens a rank; where they do not divide, the first ranks hold one more."""

    def _sizes(self) -> Tensor:
        return _even(self.length, self.world)

    def _owners(self) -> Tensor:
        return torch.arange(self.world)


@dataclass(frozen=True)
class Zigzag(ShardMap):
    """2 x world chunks; rank r holds chunks r and 2 x world - 1 - r.

    Causal work is equal on all ranks when 2 x world divides the length; shard lengths differ by at most one always.
    """

    def _sizes(self) -> Tensor:
        return _even(self.length, 2 * self.world)

    def _owners(self) -> Tensor:
        ranks = torch.arange(self.world)
        return torch.cat([ranks, ranks.flip(0)])


@dataclass(frozen=True)
class BlockStriped(ShardMap):
    """Blocks of `block` tokens dealt in turn: rank = (index // block) % world. The last block may be short."""

    block: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block ({self.block}) must be at least 1")

    def _sizes(self) -> Tensor:
        return (self.length - torch.arange(0, self.length, self.block)).clamp(max=self.block)

    def _owners(self) -> Tensor:
        return torch.arange(-(-self.length // self.block)) % self.world


def _even(length: int, parts: int) -> Tensor:
    """`length` in `parts` that differ by at most one, the longer first."""
    return torch.full((parts,), length // parts).add_((torch.arange(parts) < length % parts).long())
