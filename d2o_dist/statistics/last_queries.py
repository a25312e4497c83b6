"""The last queries of a running prefill, from which rates are measured when it ends.

Shape legend: B rows, b rows of a group, Hq query heads, n queries, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d2o_dist.comm.collectives import Collectives
from d2o_dist.core.softmax import Softmax


class LastQueries:
    """Per row the last `size` queries, their lse, and the last token that each of them sees: itself, or the end of the
    run of tokens that attend to each other both ways.

    Attributes:
        queries, lse, tokens: B tensors each, [Hq, <= size, D], [Hq, <= size] and [<= size] int64, oldest first.
        softmax: what makes their logits; sinks are in the lse.
    """

    def __init__(self, batch: int, size: int, q: Tensor, lse: Tensor, softmax: Softmax) -> None:
        self.size, self.softmax = size, replace(softmax, sinks=None)
        self.queries: list[Tensor] = [q.new_empty(q.shape[1], 0, q.shape[3])] * batch
        self.lse: list[Tensor] = [lse[0, :, :0]] * batch
        self.tokens: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * batch

    def add(self, rows: range, q: Tensor, lse: Tensor, tokens: Sequence[Tensor]) -> None:
        """A group's newest queries; copies, so that the chunk itself can be freed.

        Args:
            rows: which rows of the batch the group is; q: [b, Hq, n, D]; lse: [b, Hq, n]; tokens: b of [n].
        """
        last = self.size
        for local, row in enumerate(rows):
            self.queries[row] = torch.cat([self.queries[row], q[local, :, -last:]], 1)[:, -last:].clone()
            self.lse[row] = torch.cat([self.lse[row], lse[local, :, -last:]], 1)[:, -last:].clone()
            self.tokens[row] = torch.cat([self.tokens[row], tokens[local][-last:]])[-last:]

    def gather(self, sp: Collectives, like: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The last `size` queries of each row, over the ranks among which the prompt was dealt. One exchange for all.

        Args:
            like: whose dtype and device the result has.

        Returns:
            Per row queries [Hq, m, D], lse [Hq, m] and tokens [m] int64 on the host, which ascend; m <= size, as many
            as there are.
        """
        batch, (heads, _, dim), last = len(self.queries), self.queries[0].shape, self.size
        # Queries, their lse and their positions, -1 where a rank has fewer than `last`.
        packed = torch.zeros(batch, heads, last, dim + 2, dtype=like.dtype, device=like.device)
        packed[..., -1] = -1
        for row in range(batch):
            count = self.queries[row].shape[1]
            packed[row, :, :count, :dim] = self.queries[row].to(packed)
            packed[row, :, :count, dim] = self.lse[row]
            packed[row, :, :count, dim + 1] = self.tokens[row].to(packed)
        gathered = []
        for row in sp.all_gather(packed, 2):
            positions = row[0, :, -1].long()
            order = positions.argsort(descending=True)[:last]
            order = order[positions[order] >= 0].flip(0)
            gathered.append((row[:, order, :dim], row[:, order, dim], positions[order].cpu()))
        return gathered

    def shrink(self, size: int) -> None:
        """Keep fewer of them."""
        self.size = size
        self.queries = [queries[:, -size:] for queries in self.queries]
        self.lse = [lse[:, -size:] for lse in self.lse]
        self.tokens = [tokens[-size:] for tokens in self.tokens]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        self.queries = [self.queries[row] for row in rows]
        self.lse = [self.lse[row] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]
