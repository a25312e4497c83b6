"""Which rows a step works on, and the tensors of one forward on one rank.

The order depends on the seed and the number of rows alone, not on ranks: a step's rows are the same however many
replicas share them, and going on from step s needs no more than s.

Shape legend: B rows, T tokens of a row, t tokens of them at this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2o_dist.comm import Contiguous
from d2o_dist.train.losses import IGNORED
from d2o_dist.train.objective import Part
from d2o_dist.train.rows import Row


@dataclass(frozen=True)
class StepOrder:
    """Rows of each step: every epoch is a permutation of its own.

    Attributes:
        num_rows: of the data; seed: of the permutations.
        global_batch_size, micro_batch_size: rows of a step, and of one forward on one replica.
        dp, dp_rank: replicas, and which one this is.
    """

    num_rows: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp: int = 1
    dp_rank: int = 0

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError("the data give no row: documents are shorter than sequence_length, or have no targets")

    def rows(self, step: int) -> list[list[int]]:
        """The rows of this replica in one step (from 0), forward by forward."""
        first = step * self.global_batch_size
        mine = [self._row(first + place) for place in range(self.global_batch_size)][self.dp_rank :: self.dp]
        size = self.micro_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, self.num_rows)
        return int(_permutation(self.seed, epoch, self.num_rows)[place])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch; a step may touch two."""
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


@dataclass(frozen=True)
class Batch:
    """What one forward is given on one rank.

    Attributes:
        arguments: of `Objective.forward`, besides the kind and the compression.
        num_tokens: tokens read on this rank.
        counts: targets counted on this rank, by part: `row`, or `context` and `continuation`.
    """

    arguments: dict[str, Any]
    num_tokens: int
    counts: dict[str, int] = field(default_factory=dict)


def make_batch(
    rows: Sequence[Row], context_length: int | None, sp_rank: int, sp: int, device: torch.device | str
) -> Batch:
    """Rows of equal length as the tensors of this rank: whole, or cut into context and continuation."""
    whole = [torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
             for name in ("input_ids", "position_ids", "targets")]  # fmt: skip

    def part(start: int, stop: int) -> Part:
        shard = Contiguous(stop - start, sp)
        tensors: list[Tensor] = [shard.take(tensor[:, start:stop], sp_rank, 1).to(device) for tensor in whole]
        return Part(*tensors)

    length = whole[0].shape[1]
    if context_length is None:
        packed = any(len(row.documents) > 1 for row in rows)
        documents = [list(row.documents) for row in rows] if packed else None
        parts = {"row": part(0, length)}
        extra: dict[str, Any] = {"documents": documents}
    else:
        parts = {"context": part(0, context_length), "continuation": part(context_length, length)}
        extra = {}
    counts = {name: int((one.targets != IGNORED).sum()) for name, one in parts.items()}
    return Batch(parts | extra, sum(one.input_ids.numel() for one in parts.values()), counts)
