"""Ulysses: token shards of all heads become all tokens of some heads, and back, by one all-to-all each way.

Shape legend: B rows, H heads of the tensor rank, h of this sequence rank, n columns of a part, T tokens of the longest
row of the chunk, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.comm.deal import Deal
from d2o_dist.comm.request import RequestRanks


class HeadExchange:
    """The exchanges of one chunk; index maps are made once for all layers."""

    def __init__(self, ranks: RequestRanks, deal: Deal) -> None:
        self._ranks, self._deal = ranks, deal
        self._restore = deal.restore_index()
        self._parts = [deal.part_index(rank) for rank in range(deal.world)]

    def my_heads(self, tensor: Tensor) -> Tensor:
        """[B, H, ...] -> [B, h, ...], of what all ranks have."""
        return self._ranks.my_heads(tensor)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, n, D] of this rank's tokens -> [B, h, T, D]: a row's tokens first, then repeats of its first one."""
        ranks = self._ranks
        sizes = [ranks.sizes(tensor.shape[1]) for tensor in (q, k, v)]
        batch, _, width, dim = q.shape
        # Of values that are shorter zeros travel too, of those that are longer the others bring zeros.
        wide = max(dim, v.shape[3])
        even = [pad(tensor, (0, wide - tensor.shape[3])) for tensor in (q, k, v)]
        split = [tensor.split(size, 1) for tensor, size in zip(even, sizes, strict=True)]
        packed = [torch.cat(parts, 1) for parts in zip(*split, strict=True)]
        mine = [size[ranks.sp.rank] for size in sizes]
        arrived = ranks.sp.all_to_all_list(packed, [(batch, sum(mine), width, wide)] * ranks.sp.size)
        heads = _take(torch.cat(arrived, 2), self._restore).split(mine, 1)
        return tuple(one[..., : tensor.shape[3]] for one, tensor in zip(heads, (q, k, v), strict=True))

    def to_tokens(self, out: Tensor) -> Tensor:
        """[B, h, T, D] of this rank's query heads -> [B, H, n, D] of its tokens; what is in padding means nothing."""
        ranks, width = self._ranks, self._deal.width
        parts = [_take(out, index) for index in self._parts]
        batch, heads, _, dim = out.shape
        scale = heads // ranks.kv_sizes[ranks.sp.rank]
        shapes = [(batch, scale * size, width, dim) for size in ranks.kv_sizes]
        return torch.cat(ranks.sp.all_to_all_list(parts, shapes), 1)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [B, m] of [B, H, m', D]: [B, H, m, D]."""
    if bool((index == index[:1]).all()):
        return tensor.index_select(2, index[0].to(tensor.device))
    wide = index.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, wide)
