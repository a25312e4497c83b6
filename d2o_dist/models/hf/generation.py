"""Hugging Face's `generate` on several ranks: each picks tokens by itself, and must do so from the same numbers."""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessor

from d2o_dist.models.hf.cache import D2OCache


class FirstRankScores(LogitsProcessor):
    """On ranks that share a cache: `generate(..., past_key_values=cache, logits_processor=[FirstRankScores(cache)])`.

    All of them get the scores of the first. What `generate` does with these afterwards (temperature, top-k, a draw with
    the same seed, beams) is then the same computation of the same numbers. One collective a token; it sends a score of
    each entry of the vocabulary, for each row or beam. The engine's own loop sends tokens instead.
    """

    def __init__(self, cache: D2OCache) -> None:
        self._ranks = cache.ranks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores of this rank -> those of the first."""
        with self._ranks.counter.phase("token"):
            return self._ranks.from_first(scores)
