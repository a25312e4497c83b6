"""One forward of the model through the cache: where its tokens are, and what each layer is to do with them.

Shape legend: B rows, Hq query heads, Hkv KV heads, n columns of this rank's part of a chunk, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

from torch import Tensor

from d2o_dist.attention.exchange import HeadExchange
from d2o_dist.comm.deal import Deal, Placement
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.layout.places import Places
from d2o_dist.slots.rows import Rows, is_uniform
from d2o_dist.slots.step import BlockStep


class Forward(Protocol):
    """What a forward of any kind can do.

    Attributes:
        places: of its queries.
    """

    places: Places

    def attend(self, index: int, layer, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """Let layer `index` take q [B, Hq, n, D] and k, v [B, Hkv, n, D]; returns [B, Hq, n, D]."""

    def look(self, index: int, layer, q: Tensor, softmax: Softmax, place: int) -> Tensor:
        """Let queries of another layer see what layer `index` has, which took the forward: [B, Hq, m, D], of its last m
        columns. place: which of the layers that see it."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of a prompt of which all tokens of some heads are attended here.

    Attributes:
        rows: the tokens of the whole chunk.
        num_seen: tokens of each row before it; places: of its queries.
        exchange: takes tokens that are spread over ranks to where their heads are, and back; None: they lie here.
        blocks: per row the runs [first, stop) of its tokens in the chunk that attend to all of their run, also to later
            tokens of it (those of an image, say); None: there are none.
    """

    rows: Rows
    num_seen: list[int]
    places: Places
    exchange: HeadExchange | None = None
    blocks: list[list[tuple[int, int]]] | None = None

    @property
    def counts(self) -> list[int]:
        """Tokens of each row, on all ranks together."""
        return self.rows.counts

    def with_blocks(self, numbers: Tensor) -> Chunk:
        """With the tokens of a number attending to each other, both ways.

        Args:
            numbers: [B, n] int64 on the host, -1 for a token that attends to earlier ones only.

        Raises:
            ValueError: tokens of one number with others amid them.
        """
        columns = self.rows.index or [slice(None)] * self.rows.batch
        return replace(self, blocks=[_runs(row[here].tolist()) for row, here in zip(numbers, columns, strict=True)])

    def pieces(self, row: int, start: int = 0) -> list[tuple[int, int, bool]]:
        """What a row's tokens in the chunk are cut into, from the token `start` on: (first, stop, whether they attend
        to all of their piece)."""
        pieces, at = [], 0
        for first, stop in self.blocks[row] if self.blocks is not None else ():
            pieces += [(at, first, False)] * (at < first) + [(first, stop, True)]
            at = stop
        pieces += [(at, self.rows.counts[row], False)] * (at < self.rows.counts[row])
        return [(max(first, start), stop, both) for first, stop, both in pieces if stop > start]

    def attend(self, index: int, layer, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """As `Forward.attend`."""
        if self.exchange is None:
            return layer.prefill(q, k, v, softmax, self)
        mine = softmax.of_heads(self.exchange.my_heads)
        return self.exchange.to_tokens(layer.prefill(*self.exchange.to_heads(q, k, v), mine, self))

    def look(self, index: int, layer, q: Tensor, softmax: Softmax, place: int) -> Tensor:
        """As `Forward.look`."""
        assert self.exchange is None
        return layer.look(q, softmax, self, place)


@dataclass(frozen=True)
class DealtChunk:
    """A chunk whose tokens are spread over ranks, and stay there.

    Attributes:
        deal: of this chunk; placement: of all tokens since the prefill began, this chunk included.
        rows: the tokens among the columns of this rank's part.
        num_seen: tokens of each row before it; places: of the queries here.
    """

    deal: Deal
    placement: Placement
    rows: Rows
    num_seen: list[int]
    places: Places

    @property
    def counts(self) -> list[int]:
        """Tokens of each row, on all ranks together."""
        return list(self.deal.counts)

    @property
    def groups(self) -> list[slice]:
        """Rows that are dealt alike: all together, or one by one."""
        batch = len(self.deal.maps)
        alike = is_uniform(self.deal.counts) and is_uniform(self.placement.counts)
        return [slice(0, batch)] if alike else [slice(row, row + 1) for row in range(batch)]

    def columns(self, row: int) -> slice:
        """This rank's columns that are tokens of a row: the last ones."""
        return slice(self.deal.width - self.deal.local_counts()[row], self.deal.width)

    def tokens(self, row: int) -> Tensor:
        """[columns] int64 on the host: which tokens of the row, by position, this rank got."""
        return self.num_seen[row] + self.deal.maps[row].indices(self.deal.rank)

    def attend(self, index: int, layer, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """As `Forward.attend`."""
        return layer.prefill(q, k, v, softmax, self)


@dataclass(frozen=True)
class SecondReading:
    """A chunk of a prompt that is read a second time, and not kept.

    Attributes:
        rows: the tokens of the whole chunk.
        exchange: takes them to where all tokens of some heads are, and back; None for a chunk that lies here.
        places: of its queries.
    """

    rows: Rows
    exchange: HeadExchange | None
    places: Places

    def attend(self, index: int, layer, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """As `Forward.attend`."""
        if self.exchange is None:
            return layer.reread(q, k, v, softmax, self.rows)
        mine = softmax.of_heads(self.exchange.my_heads)
        return self.exchange.to_tokens(layer.reread(*self.exchange.to_heads(q, k, v), mine, self.rows))


@dataclass(frozen=True)
class Step:
    """A decode step.

    Attributes:
        layers: by layer, the step of each block of it.
        to_heads: the ranks, if each takes its heads only of a token that all of them have; None otherwise.
        places: of its queries.
    """

    layers: list[list[BlockStep]]
    to_heads: RequestRanks | None
    places: Places

    def attend(self, index: int, layer, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """As `Forward.attend`."""
        if self.to_heads is None:
            return layer.decode(q, k, v, softmax, *self.layers[index])
        mine = (self.to_heads.my_heads(tensor) for tensor in (q, k, v))
        of_mine = softmax.of_heads(self.to_heads.my_heads)
        return self.to_heads.join_heads(layer.decode(*mine, of_mine, *self.layers[index]))

    def look(self, index: int, layer, q: Tensor, softmax: Softmax, place: int) -> Tensor:
        """As `Forward.look`."""
        assert self.to_heads is None
        return layer.look_in_step(q, softmax, place, *self.layers[index])


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """[first, stop) of the runs of one number, of two tokens at least; -1 is none."""
    runs, known, at = [], set(), 0
    for number, run in groupby(numbers):
        stop = at + len(list(run))
        if number >= 0:
            if number in known:
                raise ValueError(
                    f"tokens that attend to each other both ways have others amid them (block {number}, again from "
                    f"token {at} of the chunk): a compressed cache takes such a block in one run"
                )
            known.add(number)
            runs += [(at, stop)] * (stop - at > 1)
        at = stop
    return runs


def over_rows(
    rows: Rows, q: Tensor, attend: Callable[[slice, Tensor], Tensor], dim: int, *, alike: bool
) -> Tensor:
    """Attend from the tokens of q [B, Hq, n, D]: all rows at once, or one by one where they differ.

    Args:
        attend: from (rows, their queries [b, Hq, m, D]) to [b, Hq, m, dim]; alike: whether rows without padding may go
            at once.

    Returns:
        [B, Hq, n, dim], zeros at padding.
    """
    if rows.index is None and alike:
        return attend(slice(0, rows.batch), q)
    # The layout that a model's output projection reads without a copy.
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dim).transpose(1, 2)
    for row in range(rows.batch):
        if rows.counts[row]:
            rows.put(out, row, attend(slice(row, row + 1), rows.pick(q, row)))
    return out
