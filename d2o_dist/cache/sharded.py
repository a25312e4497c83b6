"""Layers whose slots are spread over sequence ranks: every rank holds a part of the slots of every head.

Shape legend: B rows, Hq query heads, Hkv KV heads of the tensor rank, n columns of a rank's part of a chunk, W slots of
a rank during a prefill, C slots of a rank while decoding, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o_dist.attention.allgather import allgather_attention
from d2o_dist.attention.decode import sharded_decode_attention
from d2o_dist.attention.ring import ring_attention
from d2o_dist.attention.sampled import last_query_sums, rest_sums
from d2o_dist.attention.shard import ShardView
from d2o_dist.cache.forward import DealtChunk
from d2o_dist.cache.layer import FullLayer
from d2o_dist.cache.query_window import QueryWindow
from d2o_dist.cache.step import LayerStep
from d2o_dist.cache.store import GROWTH, SlotStore
from d2o_dist.comm.request import RequestRanks
from d2o_dist.compression.shard_evict import ShardEviction, ShardJob
from d2o_dist.compression.shard_finalize import Shard
from d2o_dist.core.statistics import RATE_FLOOR, group_sum, squared_deviations
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import D2OState, Slots, stats_dtype

# With `sp_prefill: auto`: keys and values of one head of all ranks, in bytes, above which they are not gathered. A ring
# sends half as much again, but holds one rank's tokens only.
RING_FROM_BYTES = 1 << 30


class ShardedLayer:
    """A layer that attends to everything before it, and is compressed.

    Attributes:
        store: the slots of this rank. While decoding all of its C slots count as used; an unused one has position -1.
        kv_len: slots of each row, on all ranks together.
        held: [B, Hkv, world] slots of each rank; None before finalize.
        slot_budgets, state: as in `FullLayer`, over all ranks.
    """

    def __init__(self, batch: int, config: D2OConfig, ranks: RequestRanks) -> None:
        self.config, self.ranks = config, ranks
        self.store = SlotStore(batch)
        self.kv_len = [0] * batch
        self.held: Tensor | None = None
        self.slot_budgets: list[int] | None = None
        self.state = D2OState()
        # Slots of every rank when the running prefill began, and now: the fullest rank's.
        self._past = self._width = 0
        # Slots of each row on all ranks when the running prefill began.
        self._num_old = [0] * batch
        self._window: QueryWindow | None = None
        self._column_sums: Tensor | None = None  # [B, Hq, W], of the first prefill
        self._first_prefill = True
        # Most slots that a head has here, if tokens go where there are fewest: what a layer without a budget needs.
        self._peak = 0
        # Positions of the newest slots at finalize, [B, Hkv, M] with the last at the end, and the tokens seen then.
        self._newest: Tensor | None = None
        self._seen_then: list[int] = []

    @classmethod
    def from_heads(cls, layer: FullLayer, num_seen: list[int], ranks: RequestRanks) -> ShardedLayer:
        """From a finalized layer of which this rank holds all slots of some heads: slot s goes to rank s mod world."""
        made = cls(len(layer.store.kv_len), layer.config, ranks)
        made._first_prefill = False
        made.kv_len = list(layer.store.kv_len)
        made.slot_budgets = layer.slot_budgets
        sp, slots = ranks.sp, layer.store.slots
        width = -(-slots.positions.shape[-1] // sp.size)
        batch, _, _, dim = slots.keys.shape

        def exchange(tensor: Tensor) -> Tensor:
            """[B, h, S, X] -> [B, Hkv, width, X]; positions are shifted by one, so that what is padded reads -1."""
            padding = width * sp.size - tensor.shape[2]
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
            parts = padded.unflatten(2, (width, sp.size)).unbind(3)
            shapes = [(batch, size, width, tensor.shape[3]) for size in ranks.kv_sizes]
            return torch.cat(sp.all_to_all_list(parts, shapes), 1)

        keys, values = exchange(torch.cat([slots.keys, slots.values], -1)).split(dim, -1)
        statistics = exchange(torch.stack([slots.scores, slots.rates, slots.log_mass], -1)).unbind(-1)
        positions = exchange(slots.positions.unsqueeze(-1) + 1).squeeze(-1) - 1
        arrived = Slots(keys, values, positions, *statistics)
        budgets = layer.slot_budgets
        room = max(made.kv_len) if budgets is None else max(*budgets, *made.kv_len) + made._interval
        made.store.replace(arrived, [0], capacity=max(width, -(-room // sp.size)))
        made._settle(num_seen)
        counts = torch.tensor(made.kv_len, device=positions.device)[:, None]
        held = (counts - torch.arange(sp.size, device=positions.device) + sp.size - 1) // sp.size
        made.held = held[:, None].expand(-1, positions.shape[1], -1).clone()
        made._peak = width
        # Nothing was evicted among the newest: their positions follow.
        if budgets is not None:
            recents = [made.config.split(slots)[1] for slots in budgets]
            back = torch.arange(max(recents), device=positions.device) - max(recents)
            seen = torch.tensor(num_seen, device=positions.device)
            made._newest = (seen[:, None] + back).clamp_min(-1)[:, None].expand(-1, positions.shape[1], -1)
        made.state = layer.state
        if layer.state.num_merged is not None:
            totals = sp.all_reduce(torch.stack([layer.state.num_merged, layer.state.num_dropped]))
            made.state = D2OState(layer.state.threshold, *totals.unbind(0))
        return made

    @property
    def mean_kv_len(self) -> list[int]:
        """Slots of each row on all ranks together, mean over its heads."""
        return self.kv_len

    @property
    def units(self) -> list[ShardedLayer]:
        """What holds slots of its own."""
        return [self]

    @property
    def budgeted(self) -> list[ShardedLayer]:
        """What has a budget of its own."""
        return [self]

    @property
    def _interval(self) -> int:
        return self.config.eviction_interval or 0

    # ---- prefill -------------------------------------------------------------------------------------------------

    def begin_prefill(self) -> None:
        """The slots held so far are the past of the prefill that begins."""
        self._past = self.store.capacity if self.held is not None else 0
        self._num_old = list(self.kv_len)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: DealtChunk, num_seen: list[int]) -> Tensor:
        """Append this rank's part of a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        deal, placement, config = chunk.deal, chunk.placement, self.config
        start = list(self.store.kv_len)
        self.store.append(k, v, chunk.rows, num_seen)
        width = self._width = self._past + placement.width
        self.store.reserve(width)
        slots = self.store.view(width)
        for row, one in enumerate(deal.maps):
            here = slice(start[row], self.store.kv_len[row])
            slots.positions[row, :, here] = num_seen[row] + one.indices(deal.rank, q.device)
        self.kv_len = [old + new for old, new in zip(self.kv_len, deal.counts, strict=True)]
        self._grow_column_sums(q, width)
        out = torch.zeros_like(q)
        for group, row in chunk.groups:
            columns = chunk.columns(row)
            queries = q[group, :, columns]
            view = ShardView(
                keys=slots.keys[group],
                values=slots.values[group],
                bias=self._past_bias(group),
                tokens=[placement.tokens(row, rank) for rank in range(deal.world)],
                segments=placement.segments(row, deal),
                rank=deal.rank,
            )
            attend = ring_attention if self._rings(k, width) else allgather_attention
            part, lse, sums = attend(
                self.ranks.sp, queries, view, scale, with_sums=config.needs_column_sums, sample=config.query_sample
            )
            out[group, :, columns] = part
            if sums is not None:
                slots.scores[group] += self.ranks.sum_replicas(group_sum(sums, k.shape[1]))
                if self._column_sums is not None:
                    self._column_sums[group] += sums
            if config.num_last_queries:
                rows, batch = range(*group.indices(q.shape[0])), q.shape[0]
                if self._window is None:
                    self._window = QueryWindow(batch, config.num_last_queries, q, lse, scale)
                mine = deal.maps[row].indices(deal.rank)
                self._window.add(rows, queries, lse, [num_seen[one] + mine for one in rows])
        return out

    def _rings(self, k: Tensor, width: int) -> bool:
        """Whether keys and values travel around rather than being gathered; a cache moved from heads has no ring."""
        gathered = self.ranks.sp.size * width * 2 * k.shape[3] * k.element_size()
        too_long = self.ranks.may_ring and gathered > RING_FROM_BYTES
        return too_long or self.ranks.parallel.sp_prefill == "ring"

    def _past_bias(self, group: slice) -> Tensor | None:
        """[b, Hkv, C]: log masses of the past slots, -inf on unused ones."""
        if not self._past:
            return None
        past = self.store.view(self._past)
        return past.log_mass[group].masked_fill(past.positions[group] < 0, -torch.inf)

    def _grow_column_sums(self, q: Tensor, width: int) -> None:
        if not (self._first_prefill and self.config.needs_column_sums):
            return
        grown = torch.zeros(q.shape[0], q.shape[1], width, dtype=stats_dtype(q.dtype), device=q.device)
        if self._column_sums is not None:
            old = self._column_sums[:, :, :width]  # of rows that were let go of it may have more
            grown[:, :, : old.shape[-1]] = old
        self._column_sums = grown

    def squared_deviations(self, row: int) -> Tensor:
        """[Hq] sum of the squared deviations of the row's column sums over this rank's tokens, of the first prefill."""
        assert self._column_sums is not None
        return squared_deviations(self._column_sums[row, :, : self.store.kv_len[row]])

    def complete_statistics(self) -> None:
        """Measure what needs the last queries of this prefill: all rates, and the rest of sampled column sums."""
        if self._window is None:
            return
        mine, config = self._window, self.config
        slots = self.store.slots
        everyone = mine.gather(self.ranks.sp, slots.rates)
        for row, (queries, lse, positions) in enumerate(everyone):
            if len(positions) == 0:
                continue
            queries, lse = queries.to(slots.keys.dtype)[None], lse[None]
            here, count = slice(row, row + 1), self.store.kv_len[row]
            keys, held = slots.keys[here, :, :count], slots.positions[row, :, :count]
            bias = slots.log_mass[here, :, :count].masked_fill(held < 0, -torch.inf)
            tokens = held[0, self._past :]  # slots of this prefill have the same position in all heads
            if config.needs_rates:
                at = slice(-config.statistics.rate_window, None)
                # The queries are tokens of this prefill, and so are the slots that may lie after one of them.
                newest = int((tokens >= positions[at][0]).sum())
                rates = last_query_sums(
                    queries[:, :, at], keys, lse[:, :, at], mine.scale, bias=bias, num_before=count - newest,
                    hidden=held[0, count - newest :] > positions[at][:, None],
                )  # fmt: skip
                rates = group_sum(rates, keys.shape[1]) / len(positions[at])
                rates = self.ranks.sum_replicas(rates) + RATE_FLOOR
                slots.rates[row, :, :count] = rates[0].masked_fill(held < 0, 0)
            sample = config.query_sample
            rest = 0 if sample is None else (self.kv_len[row] - self._num_old[row]) % sample.stride
            if rest:
                sums = rest_sums(
                    queries[:, :, -rest:], keys, lse[:, :, -rest:], mine.scale, sample,
                    query_tokens=positions[-rest:], key_tokens=tokens, bias=bias,
                )  # fmt: skip
                slots.scores[here, :, :count] += self.ranks.sum_replicas(group_sum(sums, keys.shape[1]))
                if self._column_sums is not None:
                    self._column_sums[here, :, :count] += sums

    def finish_prefill(self) -> None:
        """Free what only a prefill needs."""
        self._window = self._column_sums = None
        self._first_prefill = False

    # ---- what finalize gives -------------------------------------------------------------------------------------

    def slots_for_finalize(self) -> Slots:
        """[B, Hkv, W, ...] as many as any rank has; a row's unused ones have position -1."""
        return self.store.view(self._width)

    def settle(self, shard: Shard, state: D2OState, kv_len: list[int], num_seen: list[int]) -> None:
        """Hold what a finalize left; from here on the buffers never move."""
        self.kv_len, self.held, self.state = list(kv_len), shard.held, state
        self.store.replace(shard.slots, [0], capacity=shard.slots.positions.shape[-1])
        self._settle(num_seen)
        recents = max(self.config.split(slots)[1] for slots in self.slot_budgets)
        counts = torch.tensor(kv_len, device=shard.positions.device)[:, None, None]
        index = counts - recents + torch.arange(recents, device=shard.positions.device)
        index = index.expand(-1, shard.positions.shape[1], -1)
        self._newest = shard.positions.gather(-1, index.clamp_min(0)).masked_fill(index < 0, -1)

    def settle_whole(self, num_seen: list[int]) -> None:
        """Hold everything, of a layer that has no budget."""
        slots = self.slots_for_finalize()
        counts = slots.live.sum(-1, keepdim=True)
        self.held = self.ranks.sp.all_gather(counts, -1)
        self._peak = slots.positions.shape[-1]
        if self._past:
            # The past's unused slots lie in the middle.
            self.store.replace(slots.in_order(), [0], capacity=self._peak)
        self._settle(num_seen)

    def _settle(self, num_seen: list[int]) -> None:
        self.store.kv_len = [self.store.capacity] * len(self.kv_len)
        self._seen_then = list(num_seen)
        self._past = 0

    # ---- decode --------------------------------------------------------------------------------------------------

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: LayerStep) -> Tensor:
        """Add one token a row where there is most room, attend over all ranks' slots, and score this rank's."""
        config, ranks, device = self.config, self.ranks, q.device
        present = (step.position >= 0)[:, None]
        target = self.held.argmin(-1)  # of equal ones the first: the lowest rank
        mine = (target == ranks.sp.rank) & present
        column = self.held[..., ranks.sp.rank].clone()
        slots = self.store.slots
        _put(slots.keys, column, mine, k)
        _put(slots.values, column, mine, v)
        _put(slots.positions, column, mine, step.position[:, None, None])
        self.held.scatter_add_(-1, target.unsqueeze(-1), present.expand_as(target).long().unsqueeze(-1))

        slot = torch.arange(slots.positions.shape[-1], device=device)
        valid = slot < self.held[..., ranks.sp.rank, None]
        log_mass = slots.log_mass if config.merge.keeps_mass else None
        out, probs = sharded_decode_attention(
            ranks.sp, q[:, :, 0], slots.keys, slots.values, scale, valid=valid, log_mass=log_mass
        )
        if step.present is not None:
            out, probs = out * present.unsqueeze(-1), probs * present.unsqueeze(-1)
        if config.needs_column_sums or config.needs_rates:
            probs = ranks.sum_replicas(probs)
        if config.needs_column_sums:
            slots.scores.add_(probs)
        if config.needs_rates:
            decay = 1 / config.statistics.rate_window
            is_new = (slot == column.unsqueeze(-1)) & mine.unsqueeze(-1)
            fresh = torch.where(is_new, probs, slots.rates * (1 - decay) + probs * decay)
            slots.rates.copy_(torch.where(present.unsqueeze(-1), fresh, slots.rates))
        return out.unsqueeze(2)

    def advance(self, counts: list[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved (never)."""
        self.kv_len = [old + new for old, new in zip(self.kv_len, counts, strict=True)]
        return False

    def make_room(self) -> None:
        """A layer with a budget has room for all that may come before its next eviction; others grow."""
        needed = max(self._peak, -(-(max(self.kv_len) + 1) // self.ranks.sp.size))
        if needed > self.store.capacity:
            self.store.reserve(needed, slack=GROWTH)
            self.store.kv_len = [self.store.capacity] * len(self.kv_len)

    def job(self, surplus: list[int], num_seen: list[int]) -> ShardJob:
        """The layer as an eviction takes it; surplus: per row the slots over its budget, 0 for a row not due."""
        device = self.held.device
        recents = torch.tensor([self.config.split(slots)[1] for slots in self.slot_budgets], device=device)
        seen = torch.tensor(num_seen, device=device)
        new = seen - torch.tensor(self._seen_then, device=device)
        # The M-th newest slot: one of those at finalize while fewer than M tokens have come since.
        most = self._newest.shape[-1]
        index = (most - recents + new).clamp_max(most - 1)[:, None, None].expand(-1, self._newest.shape[1], 1)
        old = self._newest.gather(-1, index).squeeze(-1)
        recent_from = torch.where((new >= recents)[:, None], (seen - recents)[:, None], old)
        return ShardJob(self.store.slots, self.held, recent_from, self.slot_budgets, surplus, self.state)

    def take_eviction(self, eviction: ShardEviction, kv_len: list[int]) -> None:
        """Hold what an eviction left."""
        self.store.replace(eviction.slots, self.store.kv_len)
        self.held, self.state, self.kv_len = eviction.held, eviction.state, list(kv_len)

    def adopt(self, config: D2OConfig) -> None:
        """Leave what a prefill under `config` would have left, of a prefill that gathered at least that."""
        self.config = config
        if not config.needs_column_sums:
            self._column_sums = None
            self.store.slots.scores.zero_()
        if not config.num_last_queries:
            self._window = None
        elif self._window is not None:
            self._window.shrink(config.num_last_queries)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.store.select_rows(index)
        self.state = self.state.map(lambda t: t.index_select(0, index.to(t.device)))
        self.kv_len = [self.kv_len[row] for row in host]
        self._num_old = [self._num_old[row] for row in host]
        self._seen_then = [self._seen_then[row] for row in host] if self._seen_then else []
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]
        for name in ("held", "_newest", "_column_sums"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        if self._window is not None:
            self._window.select_rows(host)


def _put(buffer: Tensor, column: Tensor, mine: Tensor, value: Tensor) -> None:
    """Write `value` [B, H or 1, 1(, D)] into slot `column` [B, H] where `mine` [B, H], without asking the device."""
    index = column.clamp_max(buffer.shape[2] - 1).unsqueeze(-1)
    if buffer.dim() == 4:
        index = index.unsqueeze(-1).expand(-1, -1, 1, buffer.shape[3])
        mine = mine.unsqueeze(-1)
    old = buffer.gather(2, index)
    buffer.scatter_(2, index, torch.where(mine.unsqueeze(2), value, old))
