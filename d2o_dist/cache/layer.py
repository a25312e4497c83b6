"""One layer of the cache: its slots, the statistics that attention leaves on them, its budget and its threshold.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens of a chunk, S slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.attention.prefill import chunk_attention, prompt_rates, reread_attention
from d2o_dist.cache.query_window import QueryWindow
from d2o_dist.cache.rows import Rows, is_uniform, live_mask
from d2o_dist.cache.store import SlotStore
from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.statistics import RATE_FLOOR, group_sum, squared_deviations
from d2o_dist.core.types import D2OState, stats_dtype
from d2o_dist.kernels.column_peaks import column_peaks
from d2o_dist.kernels.decode_attention import decode_attention
from d2o_dist.kernels.prefill_attention import prefill_attention


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
        self._window: QueryWindow | None = None
        # Per query head, [B, Hq, S]: only the first prefill needs them, for its dispersions.
        self._column_sums: Tensor | None = None
        # [B, Hkv, S]: the most attention that a query of the second reading gave. They become the scores.
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
        """What has a budget of its own."""
        return [self]

    # ---- attention ---------------------------------------------------------------------------------------------

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        self.store.append(k, v, rows, num_seen)
        self._grow_column_sums(q)
        if self._peaks is not None:
            self._peaks = pad(self._peaks, (0, max(self.store.kv_len) - self._peaks.shape[-1]))
        if rows.index is None and is_uniform(start):
            return self._prefill_rows(slice(None), q, start[0], scale)
        out = torch.zeros_like(q)
        for row in range(rows.batch):
            if rows.counts[row]:
                part = self._prefill_rows(slice(row, row + 1), rows.pick(q, row), start[row], scale)
                rows.put(out, row, part)
        return out

    def _prefill_rows(self, group: slice, q: Tensor, start: int, scale: float) -> Tensor:
        """Rows of equal length: attend, add up the column sums, remember the last queries."""
        config, slots = self.config, self.store.slots
        here = slice(0, start + q.shape[2])
        keys, values = slots.keys[group, :, here], slots.values[group, :, here]
        log_mass = slots.log_mass[group, :, here] if config.merge == "mass" and not self._first_prefill else None
        by_peaks = config.needs_reread and not self._first_prefill
        out, lse, sums = chunk_attention(
            q, keys, values, scale, with_sums=config.needs_column_sums and not by_peaks, log_mass=log_mass
        )
        if by_peaks or self._peaks is not None:
            # A later turn, or what follows the second reading before anything is compressed.
            peaks = (slots.scores if by_peaks else self._peaks)[group, :, here]
            torch.maximum(peaks, column_peaks(q, keys, lse, scale, q_start=start, bias=log_mass), out=peaks)
        if sums is not None:
            slots.scores[group, :, here] += self.ranks.sum_replicas(group_sum(sums, keys.shape[1]))
            if self._column_sums is not None:
                self._column_sums[group, :, here] += sums
        if config.needs_rates:
            batch = len(self.store.kv_len)
            if self._window is None:
                self._window = QueryWindow(batch, config.rate_window, q, lse, scale)
            self._window.add(range(*group.indices(batch)), q, lse, [torch.arange(start, here.stop)] * q.shape[0])
        return out

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
        out, peaks = reread_attention(q, k, v, keys, values, scale)
        torch.maximum(self._peaks[group, :, :count], peaks, out=self._peaks[group, :, :count])
        return out

    def _grow_column_sums(self, q: Tensor) -> None:
        if not (self._first_prefill and self.config.needs_column_sums):
            return
        width = max(self.store.kv_len)
        grown = torch.zeros(q.shape[0], q.shape[1], width, dtype=stats_dtype(q.dtype), device=q.device)
        if self._column_sums is not None:
            grown[:, :, : self._column_sums.shape[-1]] = self._column_sums
        self._column_sums = grown

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append one token a row, attend over all live slots, and score them by what they got: [B, Hq, 1, D]."""
        config = self.config
        self.store.append(k, v, rows, num_seen)
        slots, kv_len = self.store.slots, self.store.kv_len
        device = q.device
        valid = live_mask(kv_len, slots.positions.shape[-1], device)
        log_mass = slots.log_mass if config.merge == "mass" else None
        out, _, probs = decode_attention(q[:, :, 0], slots.keys, slots.values, scale, valid=valid, log_mass=log_mass)
        if rows.index is not None:
            present = torch.tensor(rows.counts, device=device).bool()
            out = out * present[:, None, None]
            probs = probs * present[:, None, None]
        if config.needs_column_sums or config.needs_rates:
            probs = self.ranks.sum_replicas(probs)
        if config.needs_reread:
            torch.maximum(slots.scores, probs, out=slots.scores)
        elif config.needs_column_sums:
            slots.scores.add_(probs)
        if config.needs_rates:
            decay = 1 / config.rate_window
            newest = torch.tensor(kv_len, device=device)[:, None, None] - 1
            is_new = torch.arange(slots.rates.shape[-1], device=device) == newest
            aged = slots.rates * (1 - decay) + probs * decay
            fresh = torch.where(is_new, probs, aged)
            slots.rates.copy_(fresh if rows.index is None else torch.where(present[:, None, None], fresh, slots.rates))
        return out.unsqueeze(2)

    # ---- what finalize reads ------------------------------------------------------------------------------------

    def squared_deviations(self, row: int) -> Tensor:
        """[Hq] sum of the squared deviations of the row's column sums, of the first prefill."""
        assert self._column_sums is not None
        return squared_deviations(self._column_sums[row, :, : self.store.kv_len[row]])

    def finish_prefill(self) -> None:
        """Turn the last queries of this prefill into the rates of all slots, and free what only a prefill needs."""
        slots = self.store.slots
        if self._window is not None:
            for row, (queries, lse) in enumerate(zip(self._window.queries, self._window.lse, strict=True)):
                count = self.store.kv_len[row]
                if queries.shape[1] == 0:
                    continue
                mass = slots.log_mass[row : row + 1, :, :count] if self.config.merge == "mass" else None
                rates = prompt_rates(
                    queries[None], lse[None], slots.keys[row : row + 1, :, :count], self._window.scale, log_mass=mass
                )
                slots.rates[row : row + 1, :, :count] = self.ranks.sum_replicas(rates) + RATE_FLOOR
        if self._peaks is not None and self.config.needs_reread:
            slots.scores.copy_(self._peaks)
        self._window = None
        self._column_sums = self._peaks = None
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
        if not config.needs_rates:
            self._window = None
        elif self._window is not None:
            self._window.shrink(config.rate_window)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.store.select_rows(index)
        self.state = self.state.map(lambda t: t.index_select(0, index.to(t.device)))
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]
        if self._window is not None:
            self._window.select_rows(host)
        if self._column_sums is not None:
            self._column_sums = self._column_sums.index_select(0, index.to(self._column_sums.device))
        if self._peaks is not None:
            self._peaks = self._peaks.index_select(0, index.to(self._peaks.device))


class WindowLayer:
    """A layer that attends to its last `window` tokens only. It holds them, and is never compressed.

    Attributes:
        store: the slots; a few more than the window between trims.
        window: tokens a query sees, itself included.
    """

    # Tokens that may pile up before the window is moved to the front of the buffers again.
    SLACK = 64

    def __init__(self, batch: int, window: int) -> None:
        self.store = SlotStore(batch)
        self.window = window

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row, of each of its heads."""
        return self.store.kv_len

    @property
    def mean_kv_len(self) -> list[int]:
        """Slots of each row, mean over its heads."""
        return self.store.kv_len

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        self.store.append(k, v, rows, num_seen)
        slots = self.store.slots
        out = torch.zeros_like(q)
        uniform = rows.index is None and is_uniform(start)
        for row in range(1 if uniform else rows.batch):
            if not rows.counts[row]:
                continue
            group = slice(None) if uniform else slice(row, row + 1)
            here = slice(0, start[row] + rows.counts[row])
            queries = q if uniform else rows.pick(q, row)
            part, _ = prefill_attention(
                queries, slots.keys[group, :, here], slots.values[group, :, here], scale,
                q_start=start[row], window=self.window,
            )  # fmt: skip
            if uniform:
                out = part
            else:
                rows.put(out, row, part)
        self._trim()
        return out

    def reread(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept; [B, Hq, n, D] -> the same shape, zeros at padding."""
        slots, held = self.store.slots, self.store.kv_len
        out = torch.zeros_like(q)
        for row in range(rows.batch):
            if rows.counts[row]:
                q_row, k_row, v_row = (rows.pick(tensor, row) for tensor in (q, k, v))
                keys = torch.cat([slots.keys[row : row + 1, :, : held[row]], k_row], 2)
                values = torch.cat([slots.values[row : row + 1, :, : held[row]], v_row], 2)
                part, _ = prefill_attention(q_row, keys, values, scale, q_start=held[row], window=self.window)
                rows.put(out, row, part)
        return out

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Rows, num_seen: list[int]) -> Tensor:
        """Append one token a row and attend over the window: [B, Hq, 1, D]."""
        self.store.append(k, v, rows, num_seen)
        slots, kv_len = self.store.slots, self.store.kv_len
        slot = torch.arange(slots.positions.shape[-1], device=q.device)
        end = torch.tensor(kv_len, device=q.device)[:, None]
        valid = (slot < end) & (slot >= end - self.window)
        out, _, _ = decode_attention(q[:, :, 0], slots.keys, slots.values, scale, valid=valid)
        if rows.index is not None:
            out = out * torch.tensor(rows.counts, device=q.device)[:, None, None]
        if max(kv_len) >= self.window + self.SLACK:
            self._trim()
        return out.unsqueeze(2)

    def _trim(self) -> None:
        """Keep the last `window - 1` tokens of each row: what the next query sees beside itself."""
        kept = [min(count, self.window - 1) for count in self.store.kv_len]
        if kept == self.store.kv_len:
            return
        slots = self.store.slots
        device = slots.positions.device
        width = max(kept)
        slot = torch.arange(width, device=device)
        first = torch.tensor([n - m for n, m in zip(self.store.kv_len, kept, strict=True)], device=device)
        valid = slot < torch.tensor(kept, device=device)[:, None, None]
        index = ((first[:, None, None] + slot) * valid).expand(-1, slots.positions.shape[1], -1)
        self.store.replace(slots.take(index, valid), kept, capacity=self.window + self.SLACK)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.store.select_rows(index)
