"""Reading a prompt, or a later turn, into a cache: chunk by chunk, alone or on all ranks that share it.

Shape legend: B rows, T columns (padding included), n columns of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.cache.compress import HELD_AT_MOST
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.cache import ModelCache
from d2o_dist.policy.config import D2OConfig

# Columns that go through a layer at once, where a prompt is read layer by layer and nothing else is said.
TILE = 4096
# Columns that a stream takes in before it evicts, where nothing is said.
STREAM_CHUNK = 2048


def tokens_while_reading(reading: str, d2o: D2OConfig, num_layers: int, tokens: int) -> float:
    """Of how many tokens the cache is in memory at once while a prompt of `tokens` is read.

    Args:
        reading: as it was settled; num_layers: of the model.
    """
    if reading == "whole":
        return tokens
    kept = max(d2o.size.ratio_of(tokens), d2o.budget.min_layer_tokens / tokens)
    kept *= 1 if d2o.knows_budgets else HELD_AT_MOST
    return min(kept + 1 / num_layers, 1.0) * tokens


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
    all_logits: bool = False, is_layerwise: bool = False,
) -> Tensor:  # fmt: skip
    """Read columns that follow what the cache has seen: logits of the last one [B, V].

    Args:
        ids, mask: [B, T] int64, padded on the left; the mask has zeros in padding.
        chunk: columns of one forward; None: all at once.
        all_logits: return those of all columns instead, [B, T, V], of a text read at once by one rank.
        is_layerwise: compress each layer as soon as it has read the columns. Then they go through a layer chunk by
            chunk, before the next layer gets any.
    """
    assert not all_logits or (chunk is None and not cache.ranks.deals_tokens)
    padded, device, seen = not bool(mask.all()), model.device, cache.compressed.num_seen
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if seen:
        positions = positions + torch.tensor(seen, device=device)[:, None]
    whole, before = cache.compressed.columns.mask_with(mask), cache.compressed.num_seen_columns
    expected, ends = int(mask.sum(1).max()), chunk_ends(ids.shape[1], chunk)
    if is_layerwise:
        tiles = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        cache.compressed.announce(expected, len(ends), is_layerwise=True)
        if cache.ranks.deals_tokens:
            ids, positions, tiles = cache.deal_tiles(ids, mask, ends)
        told = whole if padded and not cache.ranks.deals_tokens else None
        logits = model.forward(
            ids, positions, cache, told, all_logits=all_logits, tiles=tiles if len(tiles) > 1 else None
        )
        return _of_last_token(cache, logits) if cache.ranks.deals_tokens else logits
    cache.compressed.announce(expected)
    start = 0
    for end in ends:
        if cache.ranks.deals_tokens:
            logits = model.forward(*cache.deal_tokens(ids[:, start:end], mask[:, start:end]), cache)
            logits = _of_last_token(cache, logits)
        else:
            told = whole[:, : before + end] if padded else None
            parts = (tensor[:, start:end].contiguous() for tensor in (ids, positions))  # some models make views of them
            logits = model.forward(*parts, cache, told, all_logits=all_logits)
        start = end
    return logits


def read_stream(model: ModelAdapter, cache: ModelCache, ids: Tensor, mask: Tensor, chunk: int) -> Tensor:
    """As `read`, with an eviction after every `chunk` columns: what is held does not grow with the text.

    A chunk sees what is left of those before it, so texts differ from those of other readings.
    """
    start = 0
    for end in chunk_ends(ids.shape[1], chunk):
        logits = read(model, cache, ids[:, start:end], mask[:, start:end], is_layerwise=True)
        start = end
    return logits


def _of_last_token(cache: ModelCache, logits: Tensor) -> Tensor:
    """[B, V] of the last token here of a chunk that sequence ranks share -> of each row's last token, on all ranks."""
    ranks, maps = cache.ranks, cache.compressed.dealing.latest.maps
    owners = [one.owner(one.length - 1) if one.length else 0 for one in maps]
    mine = torch.tensor(owners, device=logits.device) == ranks.sp.rank
    with ranks.counter.phase("prefill"):
        # One owner each, the others add zeros: the same bits on all ranks.
        return ranks.sp.all_reduce(torch.where(mine[:, None], logits, 0))
