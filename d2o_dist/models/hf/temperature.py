"""Llama 4 makes queries of layers without rope larger, the further on in the text they are. It goes by the columns of
the batch, which it asks the cache for; where ranks share a prompt, or rows come and go, they say nothing of that.

Shape legend: B rows, Hq query heads, n queries, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Nowhere:
    """In place of a number of tokens seen: a model that adds it to the numbers of its queries gets -1 for each, and
    leaves them as they are."""

    def __radd__(self, numbers: Tensor) -> Tensor:
        return torch.full_like(numbers, -1)


def tuned_layers(config: Any) -> frozenset[int]:
    """Layers of a decoder whose queries depend so on where they are."""
    if not getattr(config, "attn_temperature_tuning", False):
        return frozenset()
    ropes = getattr(config, "no_rope_layers", None) or ()  # 1: it has one
    return frozenset(index for index, has_rope in enumerate(ropes) if not has_rope)


def tuned(module: nn.Module, query: Tensor, places: Tensor) -> Tensor:
    """query [B, Hq, n, D] as the attention module of such a layer makes it of queries at places [1 or B, n] int64."""
    scales = torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
    return (query * scales[:, None, :, None]).to(query.dtype)
