"""Autocast, switched off: what is computed in float32 here would be multiplied in 16 bits."""

from __future__ import annotations

from contextlib import ExitStack

import torch


def without_autocast() -> ExitStack:
    """A context in which tensors are multiplied in the dtypes they have, on any device."""
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
