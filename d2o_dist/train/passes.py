"""The forwards of a training step, as seen by one attention layer.

A model in training attends through `attn_implementation="d2o_train"`, and every forward is given a pass that says how:
nothing is kept on modules. Passes may be asked again for a layer when its activations are recomputed.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens at hand, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2o_dist.attention.prefill import prompt_rates
from d2o_dist.attention.sampled import prompt_column_sums
from d2o_dist.core.autocast import without_autocast
from d2o_dist.core.softmax import Softmax
from d2o_dist.core.statistics import RATE_FLOOR, column_sum_variance, group_sum
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.models.hf.packed import by_document
from d2o_dist.policy import D2OConfig
from d2o_dist.slots.slots import stats_dtype
from d2o_dist.train.past import Past, attend_past, window_past
from d2o_dist.train.ulysses import GradientExchange


class Pass(Protocol):
    """How the layers of one forward attend."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q [B, Hq, n, D], k and v [B, Hkv, n, D], this rank's tokens, after RoPE -> [B, Hq, n, D]."""


class PlainPass:
    """Causal attention over the row, or over each document of it.

    Args:
        documents: per row the lengths of its documents, of all ranks' tokens; None: a row is one document.
    """

    def __init__(self, exchange: GradientExchange, documents: Sequence[Sequence[int]] | None = None) -> None:
        self.exchange = exchange
        self.documents = documents

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `Pass`."""
        q, k, v = self.exchange.to_heads(q, k, v)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return prefill_attention(q, k, v, scale, window=window)[0]

        out = whole(q, k, v) if self.documents is None else by_document(whole, q, k, v, self.documents)
        return self.exchange.to_tokens(out)


@dataclass(frozen=True)
class PromptLayer:
    """What one layer's attention over the prompt leaves behind, for the heads at hand.

    Attributes:
        keys, values: [B, Hkv, T, D], with their graph.
        window: of a sliding-window layer, which is never compressed and has no statistics; None: full attention.
        scores, rates: [B, Hkv, T] float32 (float64 for a float64 model); constants; zeros where not needed.
        variances: [B, Hq] of the column sums; None where not needed.
    """

    keys: Tensor
    values: Tensor
    window: int | None
    scores: Tensor | None = None
    rates: Tensor | None = None
    variances: Tensor | None = None


class PromptPass:
    """Causal attention over the part of the row that will be compressed.

    Args:
        config: which statistics are needed; None: none are.

    Attributes:
        layers: filled by the forward, by layer.
    """

    def __init__(self, exchange: GradientExchange, config: D2OConfig | None) -> None:
        self.exchange = exchange
        self.config = config
        self.layers: dict[int, PromptLayer] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `Pass`."""
        q, k, v = self.exchange.to_heads(q, k, v)
        out, lse = prefill_attention(q, k, v, scale, window=window)
        # A recomputation gives the same again, on a graph that ends with it.
        if layer not in self.layers:
            with without_autocast():
                self.layers[layer] = self._observe(q.detach(), k, v, lse.detach(), scale, window)
        return self.exchange.to_tokens(out)

    @torch.no_grad()
    def _observe(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, window: int | None) -> PromptLayer:
        config, heads = self.config, k.shape[1]
        if window is not None or config is None:
            return PromptLayer(k, v, window)
        scores = rates = torch.zeros(k.shape[:3], dtype=stats_dtype(k.dtype), device=k.device)
        variances = None
        if config.needs_column_sums:
            sums = prompt_column_sums(q, k, lse, Softmax(scale), config.query_sample)
            scores, variances = group_sum(sums, heads), column_sum_variance(sums)
        if config.needs_rates:
            last = slice(-config.statistics.rate_window, None)
            rates = prompt_rates(q[:, :, last], lse[:, :, last], k, Softmax(scale)) + RATE_FLOOR
        return PromptLayer(k, v, None, scores, rates, variances)


class ContinuationPass:
    """What follows a prompt: attention over what is left of it, and causally over the continuation itself.

    Args:
        pasts: what is left of the prompt, by layer.
    """

    def __init__(self, exchange: GradientExchange, pasts: Mapping[int, Past]) -> None:
        self.exchange = exchange
        self.pasts = pasts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `Pass`."""
        return self.exchange.to_tokens(attend_past(*self.exchange.to_heads(q, k, v), self.pasts[layer], scale))


def full_pasts(layers: Mapping[int, PromptLayer]) -> dict[int, Past]:
    """The whole prompt as the past of a teacher: nothing evicted, no gradients."""
    return {index: window_past(layer.keys.detach(), layer.values.detach(), layer.window)
            for index, layer in layers.items()}  # fmt: skip
