"""Slots that are spread over sequence ranks: how many each rank holds, and which takes the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Shares:
    """The same on all ranks, for it follows from counts that all of them know.

    Attributes:
        held: [..., world] int64 slots of each rank.
        rank: this one.
    """

    held: Tensor
    rank: int

    @property
    def taker(self) -> Tensor:
        """[...] int64: the rank with most room, which takes the next token; of equal ones the lowest."""
        return self.held.argmin(-1)

    def add(self, taker: Tensor, present: Tensor | None) -> None:
        """The token of each unit is stored where it was to be; present: [...] bool, those that took one; None: all."""
        new = torch.ones_like(taker) if present is None else present.expand_as(taker).long()
        self.held.scatter_add_(-1, taker.unsqueeze(-1), new.unsqueeze(-1))


def count_held(owner: Tensor, valid: Tensor, world: int) -> Tensor:
    """[..., world] int64: how many of the valid slots [..., K] each rank owns."""
    held = torch.zeros(*owner.shape[:-1], world, dtype=torch.int64, device=owner.device)
    return held.scatter_add_(-1, owner, valid.expand_as(owner).long())
