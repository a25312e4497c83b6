"""The kinds of layers of a cache, and which of them a model needs."""

from __future__ import annotations

from collections.abc import Sequence

from d2o_dist.cache.headwise import HeadwiseLayer
from d2o_dist.cache.layer import FullLayer
from d2o_dist.cache.sharded import ShardedLayer
from d2o_dist.cache.sharded_window import ShardedWindowLayer
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.policy.config import D2OConfig

# Those that are compressed, and all.
CompressedLayer = FullLayer | HeadwiseLayer | ShardedLayer
Layer = CompressedLayer | WindowLayer | ShardedWindowLayer


def make_layers(
    windows: Sequence[int | None], batch: int, config: D2OConfig, ranks: RequestRanks, *, by_sequence: bool
) -> list[Layer]:
    """Empty layers for `batch` rows.

    Args:
        windows: per layer None (compressed) or its sliding window.
        by_sequence: whether every sequence rank holds some slots of all heads, not all slots of some.
    """

    def make(window: int | None) -> Layer:
        if by_sequence:
            if window is not None:
                return ShardedWindowLayer(batch, window, ranks)
            return ShardedLayer(batch, config, ranks)
        return FullLayer(batch, config, ranks) if window is None else WindowLayer(batch, window)

    return [make(window) for window in windows]


def spread_layers(layers: list[Layer], num_seen: list[int], ranks: RequestRanks) -> None:
    """Replace finalized layers, one after the other: from all slots of some heads to some slots of all heads.

    Args:
        num_seen: tokens seen by each row.
    """
    for index in range(len(layers)):
        if isinstance(layers[index], WindowLayer):
            layers[index] = ShardedWindowLayer.from_heads(layers[index], ranks)
        else:
            layers[index] = ShardedLayer.from_heads(layers[index], num_seen, ranks)
