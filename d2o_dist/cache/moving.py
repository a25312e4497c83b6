"""Blocks of heads move into the arena in which they stay while decoding, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.cache.block import HeadBlock
from d2o_dist.comm.request import RequestRanks
from d2o_dist.evict.arena import ArenaEvictions
from d2o_dist.evict.exchange import BySequence, Exchange
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.arena import Arena, Block
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.store import SlotStore


class Move:
    """A move of some blocks.

    Args:
        budgets: per block the slots of each row; heads: KV heads of each block.
        like: of some block, before the move.
        least: slots of a segment that a block needs at least, where its slots are spread over ranks.
    """

    def __init__(
        self, budgets: Sequence[Sequence[int]], heads: Sequence[int], config: D2OConfig,
        like: SlotStore, ranks: RequestRanks, least: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._config, self._ranks, self._is_spread = config, ranks, least is not None
        rooms = [[slots + config.eviction_interval for slots in rows] for rows in budgets]
        if least is not None:
            parts = [max(-(-max(room) // ranks.sp.size), most) for room, most in zip(rooms, least, strict=True)]
            rooms = [[part] * len(room) for part, room in zip(parts, rooms, strict=True)]
        blocks = [Block(count, max(room), tuple(room)) for count, room in zip(heads, rooms, strict=True)]
        both = like.keys_values
        codec = Codec(config.storage, tuple(one.shape[-1] for one in both), like.dtype, like.latent)
        self._arena = Arena(blocks, codec, both[0].device)
        self._recent = [max(config.split(slots)[1] for slots in rows) for rows in budgets]
        self._moved: list[HeadBlock] = []
        self._newest: list[Tensor] = []
        self._num_free = 1

    @classmethod
    def of(cls, blocks: Sequence[HeadBlock], config: D2OConfig, ranks: RequestRanks) -> Move:
        """Of blocks that are evicted to their budgets."""
        spread = blocks[0].layout.is_spread
        return cls(
            [block.slot_budgets for block in blocks], [block.store.shape[0] for block in blocks], config,
            blocks[0].store, ranks, [block.store.capacity for block in blocks] if spread else None,
        )  # fmt: skip

    def enter(self, block: HeadBlock) -> None:
        """The next block."""
        number, view = len(self._moved), self._arena.view(len(self._moved))
        room = self._arena.blocks[number].room
        free = room if self._is_spread else [most - held for most, held in zip(room, block.kv_len, strict=True)]
        self._num_free = max(self._num_free, *free)
        self._newest.append(block.layout.newest(self._recent[number]).flatten(0, 1))
        block.layout.enter(view, self._arena.codec, room)
        self._moved.append(block)

    def end(self, num_seen: Sequence[int], exchange: Exchange) -> ArenaEvictions:
        """All blocks have moved."""
        arena, width = self._arena, max(1, *self._recent)
        assert len(self._moved) == len(arena.blocks)
        newest = torch.cat([pad(one, (width - one.shape[1], 0), value=-1) for one in self._newest])
        shares = None
        if self._is_spread:
            shares = torch.cat([block.layout.shares.held.flatten(0, 1) for block in self._moved])
            exchange = BySequence(self._ranks)
        arena.settle(self._num_free, shares, self._ranks.sp.rank)
        seen = torch.tensor(list(num_seen), device=arena.start.device)
        return ArenaEvictions(arena, self._config, newest, seen, nearest_kept, exchange)
