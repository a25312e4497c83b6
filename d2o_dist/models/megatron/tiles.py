"""A prompt goes through each layer of a Megatron model in tiles of tokens, before the next layer gets any.

As `models/hf/tiles.py`: attention is the cache's, everything else in a layer is done token by token, and the hidden
states are written in place.

Shape legend: B rows, n columns of the prompt, H hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# What a layer is given of which every column has its own, along dimension 0.
_CUT = ("hidden_states", "rotary_pos_emb")


@contextmanager
def in_tiles(model: Any, widths: Sequence[int]) -> Iterator[None]:
    """Inside it a forward over a cache takes n = sum(widths) columns in tiles; the last layer gives the last column
    alone, so logits are of that one."""
    layers = list(model.decoder.layers)
    try:
        for layer in layers:
            layer.forward = _tiled(layer, layer.forward, widths, is_last=layer is layers[-1])
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _tiled(layer: Any, forward: Callable[..., Any], widths: Sequence[int], *, is_last: bool) -> Callable[..., Any]:
    core = layer.self_attention.core_attention

    def run(hidden_states: Tensor, **given: Any) -> Any:
        """hidden_states [n, B, H]; what is None, or of all tiles, is handed on."""
        assert len(hidden_states) == sum(widths), (hidden_states.shape, widths)
        whole, start, given = core.running, 0, {**given, "hidden_states": hidden_states}
        for width in widths:
            here = {
                name: value.narrow(0, start, width) if name in _CUT and value is not None else value
                for name, value in given.items()
            }
            core.running = whole._replace(positions=whole.positions.narrow(1, start, width))
            out, *others = forward(**here)
            hidden_states.narrow(0, start, width).copy_(out)
            start += width
        return (hidden_states[-1:] if is_last else hidden_states, *others)

    return run
