"""Autocast, switched off: what is computed in float32 here would be multiplied in 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast() -> AbstractContextManager:
    """A context in which tensors are multiplied in the dtypes they have, on any device."""
    enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not enabled:
        return _NOTHING
    stack = ExitStack()
    for device in enabled:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
