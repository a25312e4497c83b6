"""Decode steps over the same buffers, one after the other: what depends on the buffers alone is found once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from d2o_dist.kernels.finish_decode import add_probabilities
from d2o_dist.kernels.scored_decode.cpu import attend_rows, rows_of
from d2o_dist.slots.tables import Tables


class RowSteps:
    """Steps on a CPU, with PyTorch's operators, of buffers whose tables are written anew before each.

    A layer's weights take the place of all else in a processor's caches, so that every line of Python and every view
    that a step does without counts: beside few slots they take longer than the products.

    Args:
        k, v and the rest: as of `scored_decode`; a row that takes a token has a live slot, that of the token.
    """

    def __init__(
        self, k: Tensor, v: Tensor, scale: float, *, tables: Tables, softcap: float | None, sinks: Tensor | None,
        scores: Tensor | None, peaks: bool, rates: Tensor | None, present: Tensor | None,
        widths: Sequence[int], total: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self._rows, self._num_slots = rows_of(k, v, tables.bias, widths), k.shape[2]
        self._flat = [(buffer.view(-1, buffer.shape[3]), buffer.shape[3]) for buffer in (k, v)]
        self._scale, self._softcap, self._sinks, self._tables = scale, softcap, sinks, tables
        self._scores, self._peaks, self._rates, self._total = scores, peaks, rates, total
        self._present = present

    def __call__(self, q: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
        """q [B, Hq, D], the key and the value of the token [B, Hkv, D] -> output [B, Hq, D] in the dtype of q."""
        for (buffer, dim), token in zip(self._flat, new, strict=True):
            buffer.index_copy_(0, self._tables.place, token.reshape(-1, dim))
        out, probs = attend_rows(q, self._rows, self._num_slots, self._scale, self._softcap, self._sinks)
        if self._present is not None:
            absent = ~self._present[:, None, None]
            out, probs = out.masked_fill(absent, 0), probs.masked_fill(absent, 0)
        if self._scores is not None or self._rates is not None:
            probs = probs if self._total is None else self._total(probs)
            add_probabilities(probs, self._scores, self._rates, self._tables.pace, present=None, peaks=self._peaks)
        return out if out.dtype == q.dtype else out.to(q.dtype)
