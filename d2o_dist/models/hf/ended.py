"""Rows of a batch that `generate` has ended: what it feeds them from then on is padding, which no cache should hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from d2o_dist.cache.sequence import CompressedCache


class EndedRows(StoppingCriteria):
    """Tells a cache which rows have ended; stops nothing. See `D2OCache.ended_rows`.

    Raises:
        ValueError: when called: rows other than the cache's (beam search), or a row that goes on after its end.
    """

    def __init__(self, cache: CompressedCache, eos_token_id: int | Sequence[int], pad_token_id: int) -> None:
        # Not under the name `eos_token_id`: `generate` would take it for the criterion that ends rows.
        self._cache, self._pad_id = cache, pad_token_id
        self._eos_ids = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
        self._ended: frozenset[int] = frozenset()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: [B, T], with the tokens just chosen, which are fed next -> [B] bool, all false."""
        newest, held = input_ids[:, -1].tolist(), len(self._cache.num_seen)
        if len(newest) != held:
            raise ValueError(f"ended_rows is for the rows of the cache ({held}), not {len(newest)}: no beam search")
        for row in self._ended:
            if newest[row] != self._pad_id:
                raise ValueError(
                    f"row {row} goes on with token {newest[row]} after one of eos_token_id {sorted(self._eos_ids)}; "
                    f"generate would feed it pad_token_id {self._pad_id}: give ended_rows the ids that generate uses"
                )
        self._cache.leave_out(self._ended)
        self._ended |= {row for row, token in enumerate(newest) if token in self._eos_ids}
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
