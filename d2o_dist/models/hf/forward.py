"""The one call into a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def run_model(
    model: Any, ids: Tensor, positions: Tensor | None, cache: Any, mask: Tensor | None = None, *,
    all_logits: bool = False,
) -> Tensor:  # fmt: skip
    """See `ModelAdapter.forward`; the cache may also be one of transformers' own."""
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=0 if all_logits else 1,
    ).logits  # fmt: skip
    return logits if all_logits else logits[:, -1]
