"""A prompt goes through each decoder layer of a Hugging Face model in tiles of tokens, before the next layer gets any.

Attention is the cache's, which has all keys of the tiles before; everything else in a layer is done token by token. So
nothing but the hidden states is ever as long as the prompt. They are written in place.

Shape legend: B rows, T columns of the prompt, n of a tile, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from d2o_dist.models.hf.guards import state_counts, text_config

# What a layer may be given, and along which dimension a tile of it is taken; None: it is the same for all tiles.
_DIMENSIONS = {
    "hidden_states": 1, "position_ids": 1, "position_embeddings": -2, "cache_position": 0, "attention_mask": None,
    "past_key_values": None, "use_cache": None, "output_attentions": None,
}  # fmt: skip
# What only models with an encoder are given, or callers of long ago.
_UNUSED = ("encoder_hidden_states", "encoder_attention_mask", "encoder_position_ids", "layer_past", "head_mask",
           "cross_attn_layer_head_mask")  # fmt: skip
# Of models that give what their last layer gave the shape of the whole prompt.
_RESHAPED = ("GPT2Block", "GPTBigCodeBlock")


def tile_refusal(model: nn.Module) -> str | None:
    """Why a prompt cannot go through this model's layers in tiles; None: it can."""
    if any(state_counts(text_config(model.config))):
        return "some of its layers keep a state, and are given the padding of the whole prompt"
    layers = _layers_of(model)
    if not layers:
        return "its decoder layers were not found"
    for layer in layers:
        if type(layer).__name__ in _RESHAPED:
            return f"the output of {type(layer).__name__} is given the shape of the whole prompt"
        for name, parameter in inspect.signature(type(layer).forward).parameters.items():
            known = name == "self" or name in (*_DIMENSIONS, *_UNUSED) or parameter.kind is parameter.VAR_KEYWORD
            if not known:
                return f"{type(layer).__name__} is given {name}, of which a tile is not known"
    return None


@contextmanager
def in_tiles(model: nn.Module, widths: Sequence[int]) -> Iterator[None]:
    """Inside it a forward of the model takes T = sum(widths) columns in tiles; its layers give the last column alone,
    so logits are of that one."""
    layers = _layers_of(model)
    assert layers and tile_refusal(model) is None
    try:
        for layer in layers:
            layer.forward = _tiled(layer.forward, widths, is_last=layer is layers[-1])
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order; none where it is not clear which they are."""
    count = text_config(model.config).num_hidden_layers
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            numbers = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in module]
            is_layer = all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
            if is_layer and numbers == [{number} for number in range(count)]:
                found.append(list(module))
    return found[0] if len(found) == 1 else []


def _tiled(forward: Callable[..., Any], widths: Sequence[int], *, is_last: bool) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)

    def run(hidden_states: Tensor, *others: Any, **given: Any) -> Any:
        given |= dict(zip(names[1:], others, strict=False))
        total, start = sum(widths), 0
        assert hidden_states.shape[1] == total, (hidden_states.shape, widths)
        for width in widths:
            here = {name: _cut(name, value, start, width, total) for name, value in given.items()}
            out = forward(hidden_states.narrow(1, start, width).contiguous(), **here)  # some make a view of it
            is_tuple = isinstance(out, tuple)
            hidden_states.narrow(1, start, width).copy_(out[0] if is_tuple else out)
            start += width
        left = hidden_states[:, -1:] if is_last else hidden_states
        return (left, *out[1:]) if is_tuple else left

    return run


def _cut(name: str, value: Any, start: int, width: int, total: int) -> Any:
    """The tile of one argument."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(name, one, start, width, total) for one in value)
    dimension = _DIMENSIONS.get(name)
    if not isinstance(value, Tensor) or (name in _DIMENSIONS and dimension is None):
        return value
    if dimension is None:
        raise ValueError(f"a prompt cannot be read in tiles: the model gives its layers a tensor {name}. Read it whole")
    return value if value.shape[dimension] == 1 < total else value.narrow(dimension, start, width)
