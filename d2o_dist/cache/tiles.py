"""A forward of the model as its layers see it: one after the other, each with all tiles of the prompt."""

from __future__ import annotations

from collections.abc import Callable

from d2o_dist.layout.forward import Forward


class Tiles:
    """Where a forward is.

    A prompt may go through a layer in tiles of tokens, before the next layer gets any. What each of them is, is settled
    at the first layer.

    Args:
        count: tiles of the forward; is_layerwise: whether each layer is compressed when it has read all of them.

    Attributes:
        forwards: of the tiles that the first layer has had.
        layer: that comes next, or is at work.
    """

    def __init__(self, count: int = 1, *, is_layerwise: bool = False) -> None:
        assert count > 0
        self.count, self.is_layerwise = count, is_layerwise
        self.forwards: list[Forward] = []
        self.layer = self._tile = 0

    @property
    def has_begun(self) -> bool:
        """Whether a tile went through a layer."""
        return (self.layer, self._tile) != (0, 0)

    @property
    def counts_at_once(self) -> bool:
        """Whether tokens count as seen after the first layer, since other tiles follow or layers are compressed."""
        return self.count > 1 or self.is_layerwise

    def take(self, layer: int, make: Callable[[], Forward]) -> Forward:
        """The tile that comes to a layer; `make` makes those of the first layer.

        Raises:
            ValueError: a layer out of order.
        """
        if layer != self.layer:
            raise ValueError(
                f"layer {layer} attends, but layer {self.layer} was expected: a forward was broken off, or the model's "
                "layers do not all use this cache. Make a new cache"
            )
        if layer == 0:
            self.forwards[self._tile :] = [make()]
        return self.forwards[self._tile]

    def done(self) -> bool:
        """A tile went through a layer; whether it was the last one of the layer."""
        self._tile += 1
        if self._tile < self.count:
            return False
        self.layer, self._tile = self.layer + 1, 0
        return True
