"""One layer of the cache: its slots, the statistics that attention leaves on them, its budget and its threshold.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens of a chunk, S slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.attention.peaks import partial_peaks
from d2o_dist.attention.prefill import chunk_attention, prompt_rates, reread_attention
from d2o_dist.attention.sampled import rest_sums
from d2o_dist.cache.query_window import QueryWindow
from d2o_dist.cache.rows import Rows, is_uniform
from d2o_dist.cache.step import LayerStep
from d2o_dist.cache.store import GROWTH, SlotStore
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.statistics import RATE_FLOOR, group_sum, squared_deviations
from d2o_dist.kernels.scored_decode import scored_decode
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import D2OState, stats_dtype


class FullLayer:
    """A layer that attends to everything before it, and is compressed.

    Attributes:
        store: the slots.
        slot_budgets: per row the slots `S_l` it is evicted to; None before finalize and for a protected layer.
        state: threshold and counts.
    """

    def __init__(self, batch: int, config: D2OConfig, ranks: RequestRanks) -> None:
        self.config = config
        self.ranks = ranks
        self.store = SlotStore(batch)
        self.slot_budgets: list[int] | None = None
        self.state = D2OState()
        # Slots of each row when the running prefill began; None between prefills.
        self._num_old: list[int] | None = None
        self._window: QueryWindow | None = None
        # Per query head, [B, Hq, S]: only the first prefill needs them, for its dispersions.
        self._column_sums: Tensor | None = None
        # [B, Hkv, S]: the most attention that a query of the second reading gave. They become the scores. Between
        # ranks that hold copies of the KV heads peaks are complete, here and in the scores, only when a prefill ends.
        self._peaks: Tensor | None = None
        self._first_prefill = True

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row, of each of its heads."""
        return self.store.kv_len

    @property
    def mean_kv_len(self) -> list[int]:
        """Slots of each row, mean over its heads."""
        return self.store.kv_len

    @property
    def units(self) -> list[FullLayer]:
        """What holds slots of its own."""
        return [self]

    @property
    def budgeted(self) -> list[FullLayer]:
        """What has a budget of its own, here or on other ranks."""
        return [self]

    # ---- attention ---------------------------------------------------------------------------------------------

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        if self._num_old is None:
            self._num_old = start
        old = self._num_old
        self.store.append(k, v, rows, num_seen)
        self._grow_column_sums(q)
        if self._peaks is not None:
            self._peaks = pad(self._peaks, (0, max(self.store.kv_len) - self._peaks.shape[-1]))
        if rows.index is None and is_uniform(start) and is_uniform(old):
            return self._prefill_rows(slice(None), q, start[0], old[0], scale)
        out = torch.zeros_like(q)
        for row in range(rows.batch):
            if rows.counts[row]:
                part = self._prefill_rows(slice(row, row + 1), rows.pick(q, row), start[row], old[row], scale)
                rows.put(out, row, part)
        return out

    def _prefill_rows(self, group: slice, q: Tensor, start: int, num_old: int, scale: float) -> Tensor:
        """Rows of equal length: attend, add up the column sums, remember the last queries."""
        config, slots = self.config, self.store.slots
        here = slice(0, start + q.shape[2])
        keys, values = slots.keys[group, :, here], slots.values[group, :, here]
        log_mass = slots.log_mass[group, :, here] if config.merge.keeps_mass and not self._first_prefill else None
        out, lse, sums = chunk_attention(
            q, keys, values, scale,
            with_sums=config.needs_column_sums and not self._by_peaks, sample=config.query_sample, num_old=num_old,
            log_mass=log_mass,
        )  # fmt: skip
        if self._by_peaks or self._peaks is not None:
            # A later turn, or what follows the second reading before anything is compressed.
            peaks = (slots.scores if self._by_peaks else self._peaks)[group, :, here]
            found = partial_peaks(self.ranks, q, keys, lse, scale, q_start=start, bias=log_mass)
            torch.maximum(peaks, found, out=peaks)
        if sums is not None:
            slots.scores[group, :, here] += self.ranks.sum_replicas(group_sum(sums, keys.shape[1]))
            if self._column_sums is not None:
                self._column_sums[group, :, here] += sums
        if config.num_last_queries:
            batch = len(self.store.kv_len)
            if self._window is None:
                self._window = QueryWindow(batch, config.num_last_queries, q, lse, scale)
            self._window.add(range(*group.indices(batch)), q, lse, [torch.arange(start, here.stop)] * q.shape[0])
        return out

    @property
    def _by_peaks(self) -> bool:
        """Whether the scores are peaks already: nothing is added to them, and no column sums are wanted."""
        return self.config.needs_reread and not self._first_prefill

    def reread(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept, over all slots and causally over itself, and note what each slot got.

        [B, Hq, n, D] -> the same shape, zeros at padding.
        """
        if self._peaks is None:
            self._peaks = torch.zeros_like(self.store.slots.scores)
        if rows.index is None and is_uniform(self.store.kv_len):
            return self._reread_rows(slice(None), q, k, v, scale, self.store.kv_len[0])
        out = torch.zeros_like(q)
        for row in range(rows.batch):
            if rows.counts[row]:
                q_row, k_row, v_row = (rows.pick(tensor, row) for tensor in (q, k, v))
                part = self._reread_rows(slice(row, row + 1), q_row, k_row, v_row, scale, self.store.kv_len[row])
                rows.put(out, row, part)
        return out

    def _reread_rows(self, group: slice, q: Tensor, k: Tensor, v: Tensor, scale: float, count: int) -> Tensor:
        slots = self.store.slots
        keys, values = slots.keys[group, :, :count], slots.values[group, :, :count]
        out, lse = reread_attention(q, k, v, keys, values, scale)
        peaks = self._peaks[group, :, :count]
        torch.maximum(peaks, partial_peaks(self.ranks, q, keys, lse, scale, causal=False), out=peaks)
        return out

    def _grow_column_sums(self, q: Tensor) -> None:
        if not (self._first_prefill and self.config.needs_column_sums):
            return
        width = max(self.store.kv_len)
        grown = torch.zeros(q.shape[0], q.shape[1], width, dtype=stats_dtype(q.dtype), device=q.device)
        if self._column_sums is not None:
            grown[:, :, : self._column_sums.shape[-1]] = self._column_sums
        self._column_sums = grown

    def make_room(self) -> None:
        """Before a decode step. A layer with a budget has room for all that comes before its next eviction."""
        self.store.reserve(max(self.kv_len) + 1, slack=GROWTH)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: LayerStep) -> Tensor:
        """Store one token a row, attend over all live slots, and score them by what they got: [B, Hq, 1, D].

        On the device only; `advance` counts the tokens on the host.
        """
        config, buffers = self.config, self.store.buffers
        self.store.put(k, v, step.slot, step.position)
        out = scored_decode(
            q[:, :, 0], buffers.keys, buffers.values, scale,
            valid=step.live,
            newest=step.slot,
            log_mass=buffers.log_mass if config.merge.keeps_mass else None,
            scores=buffers.scores if config.needs_column_sums or config.needs_reread else None,
            peaks=config.needs_reread,
            rates=buffers.rates if config.needs_rates else None,
            rate_window=config.statistics.rate_window,
            present=step.present,
            total=None if self.ranks.kv_replicas == 1 else self.ranks.sum_replicas,
        )  # fmt: skip
        return out.unsqueeze(2)

    def advance(self, counts: list[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved (never: evictions are the cache's)."""
        self.store.advance(counts)
        return False

    # ---- what finalize reads ------------------------------------------------------------------------------------

    def squared_deviations(self, row: int) -> Tensor:
        """[Hq] sum of the squared deviations of the row's column sums, of the first prefill."""
        assert self._column_sums is not None
        return squared_deviations(self._column_sums[row, :, : self.store.kv_len[row]])

    def complete_statistics(self) -> None:
        """Measure what needs the last queries of this prefill: all rates, and the rest of sampled column sums."""
        if self._window is None:
            return
        slots, config, scale = self.store.slots, self.config, self._window.scale
        for row, (queries, lse) in enumerate(zip(self._window.queries, self._window.lse, strict=True)):
            if queries.shape[1] == 0:
                continue
            here, count, old = slice(row, row + 1), self.store.kv_len[row], self._num_old[row]
            keys = slots.keys[here, :, :count]
            mass = slots.log_mass[here, :, :count] if config.merge.keeps_mass else None
            if config.needs_rates:
                last = slice(-config.statistics.rate_window, None)
                rates = prompt_rates(queries[None, :, last], lse[None, :, last], keys, scale, log_mass=mass)
                slots.rates[here, :, :count] = self.ranks.sum_replicas(rates) + RATE_FLOOR
            rest = 0 if config.query_sample is None or self._by_peaks else (count - old) % config.query_sample.stride
            if rest:
                sums = rest_sums(
                    queries[None, :, -rest:], keys, lse[None, :, -rest:], scale, config.query_sample,
                    query_tokens=torch.arange(count - rest, count), key_tokens=torch.arange(old, count), bias=mass,
                )  # fmt: skip
                slots.scores[here, :, :count] += self.ranks.sum_replicas(group_sum(sums, keys.shape[1]))
                if self._column_sums is not None:
                    self._column_sums[here, :, :count] += sums

    def finish_prefill(self) -> None:
        """Let peaks be the scores, and free what only a prefill needs."""
        scores = self.store.slots.scores
        if self._peaks is not None and self.config.needs_reread:
            scores.copy_(self.ranks.max_replicas(self._peaks))
        elif self._by_peaks and self.ranks.kv_replicas > 1:
            scores.copy_(self.ranks.max_replicas(scores))
        self._window = self._column_sums = self._num_old = self._peaks = None
        self._first_prefill = False

    def of_head(self, head: int) -> FullLayer:
        """A layer of one KV head of this one, whose first prefill is over; it holds views of this one's slots."""
        assert not self._first_prefill and self.state.num_dropped is None
        made = FullLayer(len(self.kv_len), self.config, self.ranks)
        made.store = SlotStore.of(self.store.slots.map(lambda tensor: tensor[:, head : head + 1]), self.kv_len)
        made._first_prefill = False
        return made

    def adopt(self, config: D2OConfig) -> None:
        """Leave what a prefill under `config` would have left, of a prefill that gathered at least that."""
        self.config = config
        if not config.needs_column_sums:
            self._column_sums = None
            self.store.slots.scores.zero_()
        if not config.needs_reread:
            self._peaks = None
        if not config.num_last_queries:
            self._window = None
        elif self._window is not None:
            self._window.shrink(config.num_last_queries)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.store.select_rows(index)
        self.state = self.state.map(lambda t: t.index_select(0, index.to(t.device)))
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]
        if self._num_old is not None:
            self._num_old = [self._num_old[row] for row in host]
        if self._window is not None:
            self._window.select_rows(host)
        width = max(self.store.kv_len)  # of the rows that stay
        if self._column_sums is not None:
            self._column_sums = self._column_sums[:, :, :width].index_select(0, index.to(self._column_sums.device))
        if self._peaks is not None:
            self._peaks = self._peaks[:, :, :width].index_select(0, index.to(self._peaks.device))
