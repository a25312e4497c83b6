"""Nearest kept key by blocked matmuls: torch ops only, any device.

Ties. Two kept keys with the same bits must give the same cosine bits, or the lowest index does not win: a BLAS may
sum the last few columns of a matrix in another order than the rest (MKL does, when their number is odd). So kept
blocks are always a multiple of 64 columns, padded with rows that are no target; with that, equal keys gave equal
cosines in every shape tried. Within a block the first of several maxima is looked for; across blocks only a strictly
larger cosine replaces the one found before.
"""

import math

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype

TILE = 64  # columns whose maximum is taken first; where it lies is then looked for in 1/64 of the block
BLOCK_ROWS, BLOCK_COLS = 512, 1024  # evicted x kept; 2 MiB in float32
BLOCK_ELEMENTS = BLOCK_ROWS * BLOCK_COLS
COMPACT_BELOW = 0.75  # share of kept keys that are targets, under which copying the targets pays


@torch.no_grad()
def blocked_nearest_kept(evicted: Tensor, kept: Tensor, target_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `nearest_kept`: evicted [..., E, D], kept [..., K, D], target_mask [..., K] -> two [..., E]."""
    lead, acc = evicted.shape[:-2], acc_dtype(evicted.dtype)
    num_evicted, num_kept = evicted.shape[-2], kept.shape[-2]
    similarity = torch.full((*lead, num_evicted), -torch.inf, dtype=acc, device=evicted.device)
    index = torch.zeros((*lead, num_evicted), dtype=torch.int64, device=evicted.device)
    if similarity.numel() == 0 or num_kept == 0:
        return similarity, index
    rows = lead.numel()
    evicted, kept = evicted.reshape(rows, num_evicted, -1), kept.reshape(rows, num_kept, -1)
    similarity, index = similarity.view(rows, num_evicted), index.view(rows, num_evicted)
    original = None
    if target_mask is not None:
        target_mask = target_mask.reshape(rows, num_kept)
        most = int(target_mask.sum(1).max())
        if most == 0:
            return similarity.view(*lead, num_evicted), index.view(*lead, num_evicted)
        if most < COMPACT_BELOW * num_kept:
            kept, target_mask, original = compact_targets(kept, target_mask, most)
        if bool(target_mask.all()):  # nothing is hidden then, which would take as long as the products
            target_mask = None
    _search(evicted, kept, target_mask, similarity, index)
    if original is not None:
        index.copy_(original.gather(1, index))
        index.masked_fill_(similarity == -torch.inf, 0)
    return similarity.view(*lead, num_evicted), index.view(*lead, num_evicted)


def compact_targets(kept: Tensor, target_mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets first, in index order, cut to the longest row: with few targets (a tail) the search is that much shorter.

    kept [N, K, D], target_mask [N, K], at most M a row -> (kept [N, M, D], target_mask [N, M], original index [N, M]).
    """
    order = torch.sort(target_mask.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :most]
    compact = kept.gather(1, order.unsqueeze(-1).expand(-1, -1, kept.shape[-1]))
    return compact, target_mask.gather(1, order), order


def _search(evicted: Tensor, kept: Tensor, mask: Tensor | None, similarity: Tensor, index: Tensor) -> None:
    """Fills similarity and index [N, E], which come as -inf and 0; evicted [N, E, D], kept [N, K, D], mask [N, K]."""
    num_rows, num_evicted, head_dim = evicted.shape
    num_kept, acc = kept.shape[1], similarity.dtype
    cols = min(BLOCK_COLS, -(-num_kept // TILE) * TILE)
    block_rows = min(BLOCK_ROWS, num_evicted)
    heads = min(num_rows, max(1, BLOCK_ELEMENTS // (cols * max(block_rows, head_dim))))
    block = similarity.new_empty(heads * block_rows * cols)  # one for all: a new one each time is new pages each time
    for n0 in range(0, num_rows, heads):
        n1 = min(n0 + heads, num_rows)
        for j0 in range(0, num_kept, cols):
            j1 = min(j0 + cols, num_kept)
            targets = _unit_columns(kept[n0:n1, j0:j1], None if mask is None else mask[n0:n1, j0:j1], acc)
            hidden = None if mask is None else ~mask[n0:n1, j0:j1]
            for i0 in range(0, num_evicted, block_rows):
                i1 = min(i0 + block_rows, num_evicted)
                shape = (n1 - n0, i1 - i0, targets.shape[1])  # a multiple of TILE
                cosines = block[: math.prod(shape)].view(shape)
                torch.bmm(_unit(evicted[n0:n1, i0:i1].to(acc)), targets.mT, out=cosines)
                cosines[:, :, j1 - j0 :] = -torch.inf
                if hidden is not None:
                    cosines[:, :, : j1 - j0].masked_fill_(hidden.unsqueeze(1), -torch.inf)
                best, where = _first_max(cosines)
                found = similarity[n0:n1, i0:i1]
                wins = best > found
                found.copy_(torch.where(wins, best, found))
                index[n0:n1, i0:i1] = torch.where(wins, where + j0, index[n0:n1, i0:i1])


def _unit(keys: Tensor) -> Tensor:
    """keys / norm, zero where the norm is 0."""
    return keys / _norms(keys)


def _norms(keys: Tensor) -> Tensor:
    """[..., 1], inf instead of 0: a quotient by it is 0."""
    norm = keys.norm(dim=-1, keepdim=True)
    return norm.masked_fill_(norm == 0, torch.inf)


def _unit_columns(kept: Tensor, mask: Tensor | None, acc: torch.dtype) -> Tensor:
    """Unit keys in acc dtype, rows that are no target zeroed, padded with zeros to a multiple of TILE rows."""
    padded = kept.new_empty(kept.shape[0], -(-kept.shape[1] // TILE) * TILE, kept.shape[2], dtype=acc)
    padded[:, kept.shape[1] :] = 0
    keys, unit = kept.to(acc), padded[:, : kept.shape[1]]
    torch.div(keys, _norms(keys), out=unit)
    if mask is not None:
        unit.masked_fill_(~mask.unsqueeze(-1), 0)
    return padded


def _first_max(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, first index of it) over the last dim [n, rows, tiles * TILE], by tiles."""
    tiles = cosines.unflatten(2, (-1, TILE))
    tile_max = tiles.amax(-1)  # [n, rows, tiles]
    best = tile_max.amax(-1)
    tile = _first_of(tile_max, best)
    place = torch.arange(tile.numel(), device=tile.device) * tile_max.shape[-1] + tile.flatten()
    winner = tiles.flatten(0, 2).index_select(0, place).view(*tile.shape, TILE)
    return best, tile * TILE + _first_of(winner, best)


def _first_of(values: Tensor, best: Tensor) -> Tensor:
    """Where in the last dim of [n, rows, X] the maximum [n, rows] comes first; anything where it is no number or -inf.

    Not by `argmax`, nor by comparing: both take an element at a time, and so longer than these passes together.
    """
    size = values.shape[-1]
    back = torch.arange(size, 0, -1, dtype=values.dtype, device=values.device)
    # 0 where the maximum is, below the least of `back` elsewhere.
    below = (values - best.unsqueeze(-1)).sign_().mul_(size)
    return (size - below.add_(back).amax(-1)).long()
