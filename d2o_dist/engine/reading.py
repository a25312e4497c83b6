"""Reading a prompt, or a later turn, into a cache: chunk by chunk, alone or on all ranks that share it.

Shape legend: B rows, T columns (padding included), n columns of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.cache import ModelCache


def chunk_ends(length: int, chunk: int | None) -> list[int]:
    """Where the chunks of a prompt of `length` columns end.

    The last chunk takes one column more rather than leave a chunk of one: the cache takes that for a decode step.
    """
    if chunk is None or length <= chunk + 1:
        return [length]
    ends = list(range(chunk, length, chunk)) + [length]
    if ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


def read(
    model: ModelAdapter, cache: ModelCache, ids: Tensor, mask: Tensor, chunk: int | None = None, *,
    all_logits: bool = False,
) -> Tensor:  # fmt: skip
    """Read columns that follow what the cache has seen: logits of the last one [B, V].

    Args:
        ids, mask: [B, T] int64, padded on the left; the mask has zeros in padding.
        chunk: columns of one forward; None: all at once.
        all_logits: return those of all columns instead, [B, T, V], of a text read at once by one rank.
    """
    assert not all_logits or (chunk is None and not cache.ranks.deals_tokens)
    padded, device, seen = not bool(mask.all()), model.device, cache.compressed.num_seen
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if seen:
        positions = positions + torch.tensor(seen, device=device)[:, None]
    whole, before = cache.compressed.columns.mask_with(mask), cache.compressed.num_seen_columns
    cache.compressed.expected = int(mask.sum(1).max())
    start = 0
    for end in chunk_ends(ids.shape[1], chunk):
        if cache.ranks.deals_tokens:
            logits = _read_shared(model, cache, ids[:, start:end], mask[:, start:end])
        else:
            told = whole[:, : before + end] if padded else None
            logits = model.forward(
                ids[:, start:end], positions[:, start:end], cache, told, all_logits=all_logits
            )  # fmt: skip
        start = end
    return logits


def _read_shared(model: ModelAdapter, cache: ModelCache, ids: Tensor, mask: Tensor) -> Tensor:
    """A chunk that the sequence ranks share: [B, n] -> the logits of each row's last token [B, V], on all ranks."""
    logits = model.forward(*cache.deal_tokens(ids, mask), cache)
    ranks, maps = cache.ranks, cache.compressed.dealing.latest.maps
    owners = [one.owner(one.length - 1) if one.length else 0 for one in maps]
    mine = torch.tensor(owners, device=logits.device) == ranks.sp.rank
    with ranks.counter.phase("prefill"):
        # One owner each, the others add zeros: the same bits on all ranks.
        return ranks.sp.all_reduce(torch.where(mine[:, None], logits, 0))
