"""All statistics of one block of heads while a prompt, or a later turn, is read.

Shape legend: B rows, b rows of a group, Hq query heads, Hkv KV heads, n queries, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.attention.sampled import last_query_sums, rest_sums
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.core.statistics import RATE_FLOOR, group_sum
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import Slots
from d2o_dist.statistics.column_sums import ColumnSums
from d2o_dist.statistics.last_queries import LastQueries
from d2o_dist.statistics.peaks import Peaks


class Reading:
    """What a running prefill leaves behind.

    Args:
        num_old: slots of each row from before it, on this rank; first: whether nothing was read before it.
        layers: that attend to these slots. Statistics are of their mean.

    Attributes:
        num_read: tokens of each row that it has read, on all ranks.
        tokens: which of them lie here, after the old slots: B tensors int64 on the host, ascending, counted from
            anywhere.
        sums, peaks, last: the statistics; None: no rule asks for them. others: as `last`, of the other layers.
        has_sinks: whether a sink took a share of the attention.
    """

    def __init__(
        self, config: D2OConfig, ranks: RequestRanks, num_old: Sequence[int], *, first: bool, layers: int = 1
    ) -> None:
        self._config, self._ranks, self._first = config, ranks, first
        self.num_old = list(num_old)
        self.num_read = [0] * len(num_old)
        self.tokens = [torch.zeros(0, dtype=torch.int64)] * len(num_old)
        self.peaks = Peaks(ranks, in_scores=config.needs_reread and not first)
        wanted = config.needs_column_sums and not self.peaks.in_scores
        self.sums = ColumnSums(ranks, by_query_head=first) if wanted else None
        self.last: LastQueries | None = None
        self.others: list[LastQueries] = []
        self.layers = layers
        self.has_sinks = False

    @property
    def has_mass(self) -> bool:
        """Whether old slots may stand for more than one token."""
        return self._config.merge.keeps_mass and not self._first

    def grow(self, q: Tensor, width: int, counts: Sequence[int], tokens: Sequence[Tensor]) -> None:
        """A chunk comes, after which there are S = `width` slots.

        Args:
            q: [B, Hq, n, D]; counts: its tokens in each row, on all ranks; tokens: which of them lie here.
        """
        self.num_read = [old + new for old, new in zip(self.num_read, counts, strict=True)]
        self.tokens = [torch.cat(both) for both in zip(self.tokens, tokens, strict=True)]
        if self.sums is not None:
            self.sums.grow(q, width)
        self.peaks.grow(width)

    def observe(
        self, slots: Slots, rows: slice, q: Tensor, lse: Tensor, softmax: Softmax, sums: Tensor | None,
        tokens: Sequence[Tensor], place: int = 0,
    ) -> None:  # fmt: skip
        """A group of rows has attended.

        Args:
            q: [b, Hq, n, D]; lse: [b, Hq, n]; sums: [b, Hq, <= S]; tokens: b of [n], the last that each query
                sees: as a rule itself. place: which of the layers it is, 0 first.
        """
        self.has_sinks = softmax.sinks is not None
        if sums is not None:
            self.sums.observe(slots, rows, sums / self.layers)
        size, batch = self._config.num_last_queries, len(self.num_read)
        if size:
            if place == len(self.lasts):
                self.lasts = [*self.lasts, LastQueries(batch, size, q, lse, softmax)]
            self.lasts[place].add(range(*rows.indices(batch)), q, lse, tokens)

    @property
    def lasts(self) -> list[LastQueries]:
        """Of all layers that have any."""
        return [] if self.last is None else [self.last, *self.others]

    @lasts.setter
    def lasts(self, given: Sequence[LastQueries]) -> None:
        self.last, *self.others = given or [None]

    def close(
        self, slots: Slots, kv_len: Sequence[int], last: Sequence[tuple[Tensor, Tensor, Tensor]], place: int = 0
    ) -> None:
        """Measure what needs the last queries: all rates, and the rest of sampled column sums.

        Args:
            kv_len: slots of each row here, unused old ones (of position -1) included.
            last: per row the last queries of all ranks: queries, lse and tokens, as `LastQueries` has them.
            place: which of the layers they are of; 0 comes first.
        """
        config, softmax = self._config, self.lasts[place].softmax
        for row, (queries, lse, at) in enumerate(last):
            if not len(at):
                continue
            here, count, tokens = slice(row, row + 1), kv_len[row], self.tokens[row]
            queries, lse, keys = queries.to(slots.keys.dtype)[None], lse[None], slots.keys[here, :, :count]
            unused = slots.positions[here, :, :count] < 0
            bias = slots.log_mass[here, :, :count].masked_fill(unused, -torch.inf) if self.num_old[row] else None
            if config.needs_rates:
                part = slice(-config.statistics.rate_window, None)
                # The queries are tokens of this prefill, and so are the slots that may lie after one of them.
                newest = int((tokens >= at[part][0]).sum())
                rates = last_query_sums(
                    queries[:, :, part], keys, lse[:, :, part], softmax, bias=bias, num_before=count - newest,
                    hidden=tokens[len(tokens) - newest :] > at[part][:, None],
                )  # fmt: skip
                rates = self._ranks.sum_replicas(group_sum(rates, keys.shape[1]) / len(at[part])) / self.layers
                before = slots.rates[here, :, :count] if place else RATE_FLOOR
                slots.rates[here, :, :count] = (rates + before).masked_fill(unused, 0)
            sample = config.query_sample
            rest = 0 if sample is None or self.sums is None else self.num_read[row] % sample.stride
            if rest:
                # Tokens follow each other; `at` is what they see, which may be later ones.
                own = at[-1] + torch.arange(1 - rest, 1)
                sums = rest_sums(
                    queries[:, :, -rest:], keys, lse[:, :, -rest:], softmax, sample,
                    query_tokens=own, key_tokens=tokens, bias=bias,
                )  # fmt: skip
                self.sums.observe(slots, here, sums / self.layers)

    def adopt(self, config: D2OConfig, slots: Slots) -> None:
        """Leave what a prefill under `config` would have left, of one that gathered at least that."""
        self._config = config
        if not config.needs_column_sums:
            self.sums = None
            slots.scores.zero_()
        if not config.needs_reread:
            self.peaks.forget()
        if not config.num_last_queries:
            self.lasts = []
        for last in self.lasts:
            last.shrink(config.num_last_queries)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        self.num_old = [self.num_old[row] for row in rows]
        self.num_read = [self.num_read[row] for row in rows]
        self.tokens = [self.tokens[row] for row in rows]
        for statistic in filter(None, (self.sums, self.peaks, *self.lasts)):
            statistic.select_rows(rows)
