"""Where the queries of a forward are in the text, for models that make them accordingly. Made only where asked for.

Shape legend: B rows, n columns of a chunk, or of this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2o_dist.comm.deal import Deal
from d2o_dist.slots.rows import Rows

# [1 or B, n] int64 on a device; anything at padding.
Places = Callable[[torch.device], Tensor]
# Queries [B, Hq, n, D], and their places -> queries.
Tune = Callable[[Tensor, Tensor], Tensor]


def in_columns(first: int, length: int) -> Places:
    """Columns of the batch, padding counted: alike for all rows."""
    return lambda device: torch.arange(first, first + length, device=device)[None]


def in_rows(rows: Rows, num_seen: Sequence[int]) -> Places:
    """Of each row's tokens, after so many that it has seen."""

    def places(device: torch.device) -> Tensor:
        made = torch.arange(rows.length).repeat(rows.batch, 1)
        for row, columns in enumerate(rows.index or ()):
            made[row, columns] = torch.arange(len(columns))
        return (made + torch.tensor(list(num_seen))[:, None]).to(device)

    return places


def in_deal(deal: Deal, num_seen: Sequence[int]) -> Places:
    """Of the tokens that this rank got, each row's in its last columns."""

    def places(device: torch.device) -> Tensor:
        made = torch.zeros(len(deal.maps), deal.width, dtype=torch.int64)
        for row, one in enumerate(deal.maps):
            mine = one.indices(deal.rank)
            made[row, deal.width - len(mine) :] = num_seen[row] + mine
        return made.to(device)

    return places
