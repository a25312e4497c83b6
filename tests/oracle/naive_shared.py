"""Layers without keys of their own in the naive oracle: docs/algorithm.md, "Layers that share keys"."""

from __future__ import annotations

import torch

from .naive_cache import OracleCache
from .naive_softmax import OracleSoftmax


class SharedOracleCache(OracleCache):
    """A layer's statistics are counted when all layers that attend to its keys have: "the mean over these layers"."""

    def read(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: OracleSoftmax
    ) -> torch.Tensor:
        """A layer with keys of its own takes a chunk, or a step after `finalize` was run and the token counted."""
        self.count = queries.shape[1]
        self.start = self.num_seen_tokens - self.stepping
        self._append(layer, keys, values, list(range(self.start, self.start + self.count)))
        outputs, probabilities = self._attend(layer, queries, list(range(self.start, self.start + self.count)), softmax)
        self.heard = {**getattr(self, "heard", {}), layer: [probabilities]}
        return outputs

    def look(self, layer: int, queries: torch.Tensor, softmax: OracleSoftmax) -> torch.Tensor:
        """Another layer attends to its keys, from the last tokens of the forward."""
        places = list(range(self.start + self.count - queries.shape[1], self.start + self.count))
        outputs, probabilities = self._attend(layer, queries, places, softmax)
        self.heard[layer].append(probabilities)
        return outputs

    def end_forward(self, reads_prompts: bool) -> None:
        """reads_prompts: whether the others count in prompts."""
        for layer, heard in self.heard.items():
            heard = heard if reads_prompts or self.stepping else heard[:1]
            mean = [sum(of_head) / len(heard) for of_head in zip(*heard, strict=True)]
            (self._count_step if self.stepping else self._count_chunk)(layer, mean)
        self.heard = {}
        if not self.stepping:
            self.finish_prefill_chunk(self.count)

    def begin_forward(self, is_step: bool) -> None:
        self.stepping = int(is_step)
        if is_step:
            self.finalize()
            self.num_seen_tokens += 1
