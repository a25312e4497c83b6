"""What the attention over sequence shards works on: one group of rows of equal length, dealt alike.

Keys and values stay where they are. A rank's slots of a row are, in this order: `past` slots that it held when the
prefill began (of any positions, all of them visible to every query, with a bias; none in a first prefill) and the
tokens of this prefill that it got, ascending. All ranks' slots side by side, W a rank, are the columns that `order` and
`home` point into.

Shape legend: b rows, Hq query heads, Hkv KV heads, n queries here, W slots of a rank, C past slots of a rank, T tokens
of this prefill on all ranks, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardView:
    """The slots of a group of rows, on this rank and by reference on the others.

    Attributes:
        keys, values: [b, Hkv, W, D] of this rank; what is beyond its slots is never read.
        bias: [b, Hkv, C] of this rank's past slots, added to their logits, -inf on an unused one; None if C = 0.
        tokens: per rank the tokens that it holds, ascending, in slots C, C + 1, ...
        segments: the runs [start, stop) of tokens that this rank's queries are, ascending.
        rank: this rank.
        latent: elements of a key, the first ones, that are its value too, and travel once; None: none are.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    tokens: list[Tensor]
    segments: list[tuple[int, int]]
    rank: int
    latent: int | None = None

    @property
    def vectors(self) -> list[Tensor]:
        """What other ranks must get of the slots: keys and values, [b, Hkv, W, X] each."""
        return [self.keys, self.values] if self.latent is None else [self.keys]

    def keys_values(self, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values in the `vectors` of any rank."""
        keys = vectors[0]
        return keys, vectors[1] if self.latent is None else keys[..., : self.latent]

    @property
    def width(self) -> int:
        """W."""
        return self.keys.shape[2]

    @property
    def past(self) -> int:
        """C."""
        return 0 if self.bias is None else self.bias.shape[2]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.tokens)

    @cached_property
    def order(self) -> Tensor:
        """[world x C + T]: all ranks' past slots, then the tokens in order, as columns of all slots side by side."""
        count = sum(len(tokens) for tokens in self.tokens)
        order = torch.empty(self.world * self.past + count, dtype=torch.int64)
        for rank, tokens in enumerate(self.tokens):
            order[rank * self.past : (rank + 1) * self.past] = rank * self.width + torch.arange(self.past)
            places = rank * self.width + self.past + torch.arange(len(tokens))
            order[self.world * self.past + tokens] = places
        return order.to(self.keys.device)

    @cached_property
    def home(self) -> Tensor:
        """[world x W]: the inverse of `order`; its length where a column holds nothing."""
        home = torch.full((self.world * self.width,), len(self.order), dtype=torch.int64, device=self.order.device)
        home[self.order] = torch.arange(len(self.order), device=self.order.device)
        return home

    def queries(self, q: Tensor) -> list[tuple[int, int, Tensor]]:
        """(start, stop, queries [b, Hq, stop - start, D]) of each segment of this rank's q [b, Hq, n, D]."""
        parts, at = [], 0
        for start, stop in self.segments:
            parts.append((start, stop, q[:, :, at : at + stop - start]))
            at += stop - start
        return parts
