"""Calls in and out of `torch.inference_mode`. What is made in it cannot be written outside of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def in_own_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a cache that writes its tensors. Once one was called in inference mode, all work in it ever after.

    The cache has an attribute `in_inference`, false at first. A tensor that is returned where the caller is not in
    inference mode is an ordinary one.
    """

    @wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            self.in_inference = True
        elif self.in_inference:
            with torch.inference_mode():
                result = method(self, *args, **kwargs)
            return result.clone() if isinstance(result, Tensor) else result
        return method(self, *args, **kwargs)

    return run
