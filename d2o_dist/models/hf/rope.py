"""Rotary embeddings that turn a text's tokens otherwise once it is long: what is held was turned for the shorter text.

`longrope` (Phi-3, Phi-4) has two sets of factors, and takes the second for a whole forward if one position in it lies
beyond `original_max_position_embeddings`. transformers lets go of a cache there, and reads the text again.
"""

from __future__ import annotations

from typing import Any

from d2o_dist.models.hf.guards import rope_types, text_config
from d2o_dist.models.shape import BORDER


def rope_border(model_config: Any) -> int | None:
    """Tokens of the longest text that `longrope` turns by its first factors; None for models without it."""
    config = text_config(model_config)
    if "longrope" not in rope_types(config):
        return None
    return getattr(config, BORDER, None) or config.rope_parameters[BORDER]


def is_let_go_of(model_config: Any) -> bool:
    """Whether the model's `generate` may let go of a cache that is true, at the border: it asks `if past_key_values`,
    and of the configuration only whether it has a border, whatever the kind of its embedding."""
    return any(hasattr(config, BORDER) for config in (model_config, text_config(model_config)))
