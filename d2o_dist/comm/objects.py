"""Plain values as they travel between ranks: JSON in a tensor of bytes. What arrives is read, never run.

A pickle that comes over a network could run any program here. JSON cannot, and it says all that ranks tell each other.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def to_bytes(value: Any) -> Tensor:
    """[N] uint8 of None, truth values, numbers, strings, and lists, tuples and dictionaries of them.

    Raises:
        TypeError: anything else is in it.
    """
    return torch.frombuffer(bytearray(json.dumps(_tagged(value)).encode()), dtype=torch.uint8)


def from_bytes(wire: Tensor) -> Any:
    """The value that `to_bytes` was given; a number of NumPy as Python's."""
    return _untagged(json.loads(wire.cpu().numpy().tobytes()))


def _tagged(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_tagged(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_tagged(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[_tagged(key), _tagged(one)] for key, one in value.items()]}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} does not travel between ranks: send plain values, or a tensor by itself")


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_untagged(one) for one in value["tuple"])
    return {_untagged(key): _untagged(one) for key, one in value["dict"]}
