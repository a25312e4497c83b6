"""What a cache does once its prompt is compressed: steps of one token a row, and evictions between them.

It lives from the end of a prompt to the first chunk of the next turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2o_dist.cache.block import HeadBlock
from d2o_dist.cache.evictions import Evictions
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.moving import Move
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.evict.arena import ArenaEvictions
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.step import BlockStep, DecodeStep

# On a CPU so many rows are attended one by one. SmolLM2-135M, 205 and 102 slots: a step then takes 0.93 of the time
# with one row, as long with 4, 1.28 times as long with 16.
_FEW_ROWS = 2


class Decoding:
    """Steps over layers that were evicted to their budgets.

    Args:
        layers: of the model, in order; num_seen: tokens seen by each row.
        move: into the arena, where the layers have moved already.

    Attributes:
        step: what steps read and advance on the device; None before the first one, and after rows were selected.
    """

    def __init__(
        self, layers: Sequence[Layer | WindowLayer], config: D2OConfig, ranks: RequestRanks, num_seen: Sequence[int],
        move: Move | None = None,
    ) -> None:  # fmt: skip
        self._layers, self._config, self._ranks = list(layers), config, ranks
        self.step: DecodeStep | None = None
        in_arena = config.eviction_interval is not None
        self._arena_evictions = self._evictions(num_seen).in_arena(move) if in_arena else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are other buffers: the next step of theirs is a new one."""
        return {**vars(self), "step": None}

    @property
    def _full(self) -> dict[int, Layer]:
        """Layers that attend to everything, by their index."""
        return {index: layer for index, layer in enumerate(self._layers) if isinstance(layer, Layer)}

    def _evictions(self, num_seen: Sequence[int]) -> Evictions:
        return Evictions(self._full, self._config, self._ranks, num_seen)

    @property
    def _blocks(self) -> list[HeadBlock | WindowLayer]:
        """All that holds slots of its own."""
        return [block for layer in self._layers for block in layer.blocks]

    def open(self, num_seen: Sequence[int], present: Sequence[bool] | None) -> DecodeStep:
        """Before a step: do what the host must. Until slots move the step stays the same object.

        Args:
            num_seen: before it; present: rows that take a token; None: all of them.
        """
        blocks = self._blocks
        for block in blocks:
            if not block.store.in_arena:
                block.make_room()
        if present is not None and all(present):
            present = None
        held = [block.held for block in blocks]
        if self.step is None or not self.step.fits(held, present):
            arena = None if self._arena_evictions is None else self._arena_evictions.arena
            self.step = DecodeStep(num_seen, held, present, arena, self._config.statistics.rate_window)
            for layer in self._full.values():
                layer.prepare()
        self.step.choose(present)
        return self.step

    def places(self, device: torch.device) -> Tensor:
        """[B, 1] int64 of the tokens of a step that was opened, in their rows."""
        return self.step.positions[:, None]

    def begin(self, is_steady: bool) -> list[list[BlockStep]]:
        """On the device: the part of each block of each layer, which writes and attends before `step.end`.

        Args:
            is_steady: each row attends over its own slots alone, however many rows there are.
        """
        few = len(self.step.counts) <= _FEW_ROWS
        steps = iter(self.step.begin([
            # Those of an arena never change: a step may be recorded.
            block.widths if is_steady or few and block.store.in_arena else None for block in self._blocks
        ]))  # fmt: skip
        return [[next(steps) for _ in layer.blocks] for layer in self._layers]

    def close(self, num_seen: Sequence[int]) -> None:
        """After a step: count its tokens on the host, and evict what is due; num_seen: with them."""
        counts = self.step.counts
        moved = [layer.advance(counts) for layer in self._layers]
        if self._config.eviction_interval is not None:
            with self._ranks.counter.phase("evict"):
                moved.append(self._evictions(num_seen).while_decoding(self.step.positions, self._arena_evictions))
        if any(moved):
            self.step.hold([block.store.kv_len for block in self._blocks])

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated, of layers of which they were selected."""
        if self._arena_evictions is None:
            return
        self._move(self._arena_evictions.select_rows(index))

    def join(self, others: Sequence[Decoding]) -> None:
        """Go on with the rows of others too, after those that are here, of layers that were joined."""
        self.step = None
        if self._arena_evictions is not None:
            self._move(self._arena_evictions.join([other._arena_evictions for other in others]))

    def _move(self, evictions: ArenaEvictions) -> None:
        """Hold the slots in another arena, in which they lie already."""
        self._arena_evictions, arena = evictions, evictions.arena
        for number, block in enumerate(block for block in self._blocks if block.store.in_arena):
            block.layout.rebase(arena.view(number), arena.blocks[number].room)
        self._evictions(()).hold_shares(arena)
