"""The most attention that any one query of a second reading of the prompt gave to each slot (as in KVzip).

Shape legend: B rows, b rows of a group, Hq query heads, Hkv KV heads, S slots, n queries, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.attention.peaks import partial_peaks
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.slots.slots import Slots


class Peaks:
    """Peaks of a running prefill: apart from the scores until the first one ends, and in the scores ever after.

    Between ranks that hold copies of a KV head they are complete only when a prefill ends.

    Args:
        in_scores: whether the scores are peaks already.
    """

    def __init__(self, ranks: RequestRanks, *, in_scores: bool) -> None:
        self._ranks = ranks
        self.in_scores = in_scores
        self._peaks: Tensor | None = None  # [B, Hkv, S]

    @property
    def wanted(self) -> bool:
        """Whether what is read now counts: it is read a second time, or after a second reading."""
        return self.in_scores or self._peaks is not None

    def begin(self, slots: Slots) -> None:
        """A second reading begins."""
        if self._peaks is None:
            self._peaks = torch.zeros_like(slots.scores)

    def grow(self, width: int) -> None:
        """Before a chunk after which there are S = `width` slots."""
        if self._peaks is not None:
            self._peaks = pad(self._peaks, (0, width - self._peaks.shape[-1]))

    def observe(
        self, slots: Slots, rows: slice, q: Tensor, keys: Tensor, lse: Tensor, softmax: Softmax, *,
        q_start: int = 0, bias: Tensor | None = None, causal: bool = True,
    ) -> None:  # fmt: skip
        """What the queries q [b, Hq, n, D] of a group of rows gave to its first slots, those of keys [b, Hkv, s, D]."""
        peaks = (slots.scores if self.in_scores else self._peaks)[rows, :, : keys.shape[2]]
        found = partial_peaks(self._ranks, q, keys, lse, softmax, q_start=q_start, bias=bias, causal=causal)
        torch.maximum(peaks, found, out=peaks)

    def close(self, slots: Slots) -> None:
        """The prefill ends: peaks are the scores."""
        if self._peaks is not None:
            slots.scores.copy_(self._ranks.max_replicas(self._peaks[:, :, : slots.scores.shape[-1]]))
        elif self.in_scores and self._ranks.kv_replicas > 1:
            slots.scores.copy_(self._ranks.max_replicas(slots.scores))

    def forget(self) -> None:
        """No rule asks for them."""
        self._peaks = None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        if self._peaks is not None:
            self._peaks = self._peaks[list(rows)]
