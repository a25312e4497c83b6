"""Which tokens each sequence rank has: of one chunk (`Deal`), and since a prefill began (`Placement`).

Every row of a batch is dealt by itself, over its own tokens: padding is dealt to nobody, and short rows are spread as
evenly as long ones. All of it follows from lengths that every rank knows; nothing is communicated.

Shape legend: B rows, n columns of a rank's part of a chunk (`width`; a row's tokens are its last columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from d2o_dist.comm.shard import ShardMap


@dataclass(frozen=True)
class Deal:
    """One chunk of a prompt, dealt to `world` ranks.

    Attributes:
        maps: per row the map over its tokens of this chunk.
        rank: this rank.
    """

    maps: tuple[ShardMap, ...]
    rank: int

    @classmethod
    def of(cls, counts: Sequence[int], rule: type[ShardMap], world: int, rank: int) -> Deal:
        """Rows of `counts` tokens, by one rule."""
        made = {count: rule(count, world) for count in set(counts)}
        return cls(tuple(made[count] for count in counts), rank)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.maps[0].world

    @property
    def counts(self) -> list[int]:
        """Tokens of each row, on all ranks together."""
        return [one.length for one in self.maps]

    @cached_property
    def shards(self) -> list[list[int]]:
        """[B][world]: tokens of each row on each rank."""
        known = {id(one): one.lengths() for one in self.maps}
        return [known[id(one)] for one in self.maps]

    @cached_property
    def width(self) -> int:
        """Columns of every rank's part, at least 1."""
        return max(1, *(max(lengths) for lengths in self.shards))

    def local_counts(self) -> list[int]:
        """Tokens of each row on this rank."""
        return [lengths[self.rank] for lengths in self.shards]

    def mask(self) -> Tensor:
        """[B, n] int64: 1 where a column of this rank's part is a token."""
        counts = torch.tensor(self.local_counts())
        return (torch.arange(self.width) >= self.width - counts[:, None]).long()

    def columns(self, row: int, rank: int) -> Tensor:
        """Where the row's tokens lie in all parts side by side, [world x n]: index of each token of one rank."""
        count = self.shards[row][rank]
        return rank * self.width + torch.arange(self.width - count, self.width)

    def restore_index(self) -> Tensor:
        """[B, max(counts)] int64: for each token of a row, in order, its column in all parts side by side; then 0s."""
        index = torch.zeros(len(self.maps), max(self.counts), dtype=torch.int64)
        for row, one in enumerate(self.maps):
            for rank in range(self.world):
                index[row, one.indices(rank)] = self.columns(row, rank)
        return index

    def part_index(self, rank: int) -> Tensor:
        """[B, n] int64: for each column of a rank's part the row's token there; 0 where it is padding."""
        index = torch.zeros(len(self.maps), self.width, dtype=torch.int64)
        for row, one in enumerate(self.maps):
            index[row, self.width - self.shards[row][rank] :] = one.indices(rank)
        return index


class Placement:
    """Where the tokens of the running prefill lie. Token i of a row is its i-th since the prefill began.

    Attributes:
        counts: [B][world] tokens of each row that each rank holds.
    """

    def __init__(self, batch: int, world: int) -> None:
        self.counts = [[0] * world for _ in range(batch)]
        self._owner = [torch.zeros(0, dtype=torch.int64)] * batch

    def with_chunk(self, deal: Deal) -> Placement:
        """With the tokens of one more chunk; forwards of earlier ones keep this one."""
        after = Placement(0, deal.world)
        for row, one in enumerate(deal.maps):
            after._owner.append(torch.cat([self._owner[row], one.owner(torch.arange(one.length))]))
            after.counts.append([old + new for old, new in zip(self.counts[row], deal.shards[row], strict=True)])
        return after

    @property
    def width(self) -> int:
        """Most tokens of a row on a rank."""
        return max(max(row) for row in self.counts)

    def num_tokens(self, row: int) -> int:
        """Tokens of a row since the prefill began, on all ranks."""
        return len(self._owner[row])

    def tokens(self, row: int, rank: int) -> Tensor:
        """[counts[row][rank]]: which tokens a rank holds, ascending."""
        return (self._owner[row] == rank).nonzero().flatten()

    def segments(self, row: int, deal: Deal) -> list[tuple[int, int]]:
        """The runs [start, stop) of tokens that this rank got in the newest chunk, ascending."""
        before = self.num_tokens(row) - deal.maps[row].length
        return [(before + start, before + stop) for start, stop in deal.maps[row].segments(deal.rank)]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        self.counts = [list(self.counts[row]) for row in rows]
        self._owner = [self._owner[row] for row in rows]
