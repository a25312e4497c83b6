"""What ranks send: collectives and bytes of a prompt, of a decode step and of an eviction, as `TrafficCounter` counts.

For a batch of rows of one length. Bytes are a rank's mean. Which slots must move to make shards level depends on the
prompt: the newest are taken to lie on one rank, the others to be level. Not modelled: what ranks that hold copies of a
KV head send for a second reading, and for heads with budgets of their own; what is sent when layers are trimmed, where
a prompt is read layer by layer and its budgets are not known before. What a tensor-parallel engine sends is not in the
counter; its phase here is `model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from d2o_dist.plan.memory import slots_of_layers
from d2o_dist.plan.meshes import Share, rings
from d2o_dist.plan.model_size import ModelSize
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.gate import head_reports
from d2o_dist.policy.score import Reread
from d2o_dist.policy.statistics import COLUMN_SUMS
from d2o_dist.slots.slots import stats_dtype
from d2o_dist.slots.windows import kept


@dataclass(frozen=True)
class Sent:
    """Some collectives of one phase, axis and kind; bytes of all of them together."""

    phase: str
    axis: str
    kind: str
    calls: float
    bytes: float

    def every(self, times: int) -> Sent:
        """What this is a time, if it comes once in so many."""
        return Sent(self.phase, self.axis, self.kind, self.calls / times, self.bytes / times)


@dataclass(frozen=True)
class PlannedTraffic:
    """The traffic of one request's ranks.

    Attributes:
        share: who holds what; batch: rows; tokens: of each prompt.
        chunk: tokens of one forward of the prompt; None: all.
        is_auto: whether `sp_prefill` was `auto`, which rings where a head is too long to gather.
        reading: `whole` or `layerwise`.
    """

    model: ModelSize
    d2o: D2OConfig
    share: Share
    tokens: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    chunk: int | None = None
    is_auto: bool = True
    reading: str = "whole"

    # ---- the three things that are sent ------------------------------------------------------------------------------

    def prompt(self) -> Iterator[Sent]:
        """Reading and compressing the prompts."""
        if self.share.sp > 1:
            yield from self._read(self.chunk or self.tokens)
        if self.share.copies > 1 and self.d2o.needs_column_sums:
            widths = sum(end if self.share.reads_by_heads else self._width(end) for _, end in self._chunks(self.chunk))
            count = len(self._chunks(self.chunk)) * self._full
            yield self._among_copies("prefill", count, self._full * widths * self.share.kv_heads * self._stat)
        if isinstance(self.d2o.score, Reread) and self.share.sp > 1:
            yield from self._read(self.d2o.score.chunk, logits=False)
        yield from self._engine(self.tokens, len(self._chunks(self.chunk)))
        yield from self._finalize()

    def step(self) -> Iterator[Sent]:
        """One token of each row, its choice included, without evictions."""
        share, dim = self.share, self.model.head_dim
        if share.sp > 1 and share.holds_by_heads:
            each = self.batch * share.queries_here * dim * self.dtype.itemsize
            yield self._gather("decode", "sp", self.model.num_layers, each)
        elif share.sp > 1:
            each = self.batch * share.query_heads * (self.model.value_dim + 1) * self._stat
            yield self._gather("decode", "sp", self._full, each)
        if share.copies > 1 and (self.d2o.needs_column_sums or self.d2o.needs_rates or self.d2o.needs_reread):
            rooms = [self.tokens if one is None else one + (self.d2o.eviction_interval or 0) for one in self._slots]
            rooms = rooms if share.holds_by_heads else [self._width(room) for room in rooms]
            size = share.kv_heads * self._full * sum(rooms) / len(rooms) * self._stat if rooms else 0
            yield self._among_copies("decode", self._full, size)
        ranks = share.sp * share.tp
        if ranks > 1:
            yield Sent("token", "request", "all_reduce", 1, 2 * (ranks - 1) / ranks * 8 * self.batch)
        yield from self._engine(1, 1)

    def eviction(self) -> Iterator[Sent]:
        """One eviction of all layers while decoding: it comes every `eviction_interval` tokens, or never."""
        share, merge, gone = self.share, self.d2o.merge, self.d2o.eviction_interval
        budgets = [slots for slots in self._slots if slots is not None]
        if gone is None or not budgets or self.d2o.budget.per_head:
            return
        layers, heads, stat = len(budgets), self.batch * share.kv_heads, self._stat
        width, found = self._report_width(gone), 2
        sizes = merge.targets.tail_sizes(torch.tensor(budgets), finalize=False) if merge.merges else None
        tails = [0] * layers if sizes is None else sizes.tolist()
        if share.sp > 1 and not share.holds_by_heads:
            offered = sum(
                min(gone + tail, self._width(slots + gone)) for slots, tail in zip(budgets, tails, strict=True)
            )
            numbers = 3 if merge.keeps_mass else 2  # rank, position and, where it counts, rate: in float64
            yield self._gather("evict", "sp", 1, heads * offered * numbers * 8)
            if share.copies > 1:
                yield self._from_first_copy("evict", 1, heads * offered * (numbers + 1) * 8)
            found = 3  # beside reports: similarity, target, and whether it lies here
            if merge.merges and share.parallel.merge_scope == "global":
                both = self.model.pair * self.dtype.itemsize
                yield self._all_reduce("evict", 1, heads * layers * gone * both)
                if stat == 4:
                    yield self._all_reduce("evict", 1, heads * layers * gone * 8)
                else:
                    yield self._gather("evict", "sp", 1, heads * layers * gone * 2 * stat)
            elif merge.merges:
                yield self._all_reduce("evict", 1, heads * layers * gone * stat)
        elif share.sp > 1 and merge.merges:
            yield self._gather("evict", "sp", 1, self.batch * share.kv_here * layers * width * stat)
        if share.copies > 1 and share.holds_by_heads:
            yield self._from_first_copy("evict", 1, heads * (layers * gone + sum(tails)) * 8)
        if share.tp > 1 and merge.merges:
            width += found * gone if share.copies > 1 else 0
            yield self._gather("evict", "tp", 1, heads * layers * width * stat)

    def steady(self) -> Iterator[Sent]:
        """One token of each row, with its part of an eviction."""
        yield from self.step()
        for one in self.eviction():
            yield one.every(self.d2o.eviction_interval)

    # ---- the prompt --------------------------------------------------------------------------------------------------

    def _read(self, chunk: int, *, logits: bool = True) -> Iterator[Sent]:
        share, item, dim, sp, phase = self.share, self.dtype.itemsize, self.model.head_dim, self.share.sp, "prefill"
        windows = self.model.num_layers - self._full
        for start, end in self._chunks(chunk):
            n, width = self._width(end - start), self._width(end)
            here = rings(share, self.model, width, self.dtype, is_auto=self.is_auto)
            if share.reads_by_heads:
                heads = 2 * share.query_heads + 2 * share.kv_heads  # queries, keys, values; and what comes back
                sent = self.batch * n * dim * item * heads * (sp - 1) / sp
                yield Sent(phase, "sp", "all_to_all", 2 * self.model.num_layers, self.model.num_layers * sent)
            elif here.parallel.sp_prefill == "ring":
                block = self.batch * share.kv_heads * width * item
                sums = self.batch * share.query_heads * width * self._stat
                calls, sent = sp - 1, self.model.pair * block * (sp - 1)
                if self.d2o.needs_column_sums:
                    calls, sent = calls + 2 * sp - 1, sent + dim * block * (sp - 1) + sums * sp
                yield Sent(phase, "sp", "ring_shift", self._full * calls, self._full * sent)
            else:
                one_head = self.batch * width * self.model.pair * item
                yield self._gather(phase, "sp", self._full * share.kv_heads, one_head)
                if self.d2o.needs_column_sums:
                    sent = self.batch * share.query_heads * width * self._stat * (sp - 1)
                    yield Sent(phase, "sp", "all_to_all", self._full, self._full * sent)
            if windows and not share.reads_by_heads:
                yield self._gather(phase, "sp", windows, self.batch * share.kv_heads * n * 2 * dim * item)
            if logits and (end == self.tokens or self.reading == "whole"):  # of each forward
                yield self._all_reduce(phase, 1, self.batch * self.model.vocab * item)

    def _finalize(self) -> Iterator[Sent]:
        share, d2o, stat, full = self.share, self.d2o, self._stat, self._full
        ranks = share.sp * share.tp
        if ranks == 1 or not full:
            return
        phase, by_heads = "finalize", share.reads_by_heads
        uses = COLUMN_SUMS in d2o.budget.statistics and not d2o.keeps_everything
        slots = self.tokens if by_heads else self._width(self.tokens)
        sample = d2o.query_sample
        # Rates, and what no sampled query stands for.
        measured = d2o.needs_rates + (sample is not None and self.tokens % sample.stride > 0)
        if share.copies > 1 and measured:
            size = full * share.kv_heads * slots * stat
            yield self._among_copies(phase, self.batch * full * measured, size * measured)
        if uses:
            heads = share.queries_here if by_heads else share.query_heads
            yield self._gather(phase, "sp", 1, self.batch * heads * full * stat)
            yield self._gather(phase, "tp", 1, self.batch * share.query_heads * full * stat)
        if not by_heads and d2o.num_last_queries:
            each = self.batch * d2o.num_last_queries * share.query_heads * (self.model.head_dim + 2) * stat
            yield self._gather(phase, "sp", full, each)
        if d2o.budget.by_ranking:
            yield from self._count_highest()
        numbers = len(self._slots) * (3 if uses else 2)
        yield Sent(phase, "request", "broadcast", 1, (ranks - 1) / ranks * self.batch * numbers * 8)
        due = [count for count in self._slots if count is not None and count < self.tokens]
        if by_heads and not d2o.budget.per_head:
            for kept in due:
                width = self._report_width(self.tokens - kept)
                if share.copies > 1:
                    yield self._from_first_copy(phase, 1, self.batch * share.kv_heads * self.tokens)
                    width += 2 * (self.tokens - kept)
                if d2o.merge.merges:
                    yield self._gather(phase, "sp", 1, self.batch * share.kv_here * width * stat)
                    yield self._gather(phase, "tp", 1, self.batch * share.kv_heads * width * stat)
        if by_heads and not share.holds_by_heads and share.sp > 1:
            yield from self._spread(len(due))
        if not by_heads:
            for kept in self._slots:
                yield from self._select_shards(self.tokens if kept is None else min(kept, self.tokens))

    def _count_highest(self) -> Iterator[Sent]:
        """How many of the highest ranked tokens each KV head has: counts of 256 digits, a digit of 8 bits at a time."""
        share = self.share
        for axis, size in (("sp", share.sp), ("tp", share.tp)):
            if size > 1:
                sent = 2 * (size - 1) / size * self._stat * self.batch * 256 * 8
                yield Sent("finalize", axis, "all_reduce", self._stat, sent)
        each = self.batch * 2 * self._full * 8
        if share.reads_by_heads:
            yield self._gather("finalize", "sp", 1, share.kv_here * each)
        yield self._gather("finalize", "tp", 1, share.kv_heads * each)

    def _spread(self, num_due: int) -> Iterator[Sent]:
        """From all slots of some heads to some slots of all heads."""
        share, phase, pair = self.share, "finalize", self.model.pair * self.dtype.itemsize
        each = self.batch * share.kv_here * (share.sp - 1) * (pair + 3 * self._stat + 8)
        held = sum(self._width(self.tokens if one is None else min(one, self.tokens)) for one in self._slots)
        yield Sent(phase, "sp", "all_to_all", 3 * self._full, each * held)
        if num_due:
            yield self._all_reduce(phase, num_due, num_due * 2 * self.batch * 8)
        for window in self.model.windows:
            if window is not None:
                yield self._gather(
                    phase, "sp", 1, self.batch * share.kv_here * kept(window, self.tokens) * pair
                )

    def _select_shards(self, kept: int) -> Iterator[Sent]:
        """One layer, of which every rank holds some slots of all heads."""
        share, phase, stat, dim = self.share, "finalize", self._stat, self.model.head_dim
        heads, width, gone = self.batch * share.kv_heads, self._width(self.tokens), self.tokens - kept
        if not gone and self.d2o.keeps_everything:
            return
        yield self._gather(phase, "sp", 1, heads * width * 8)
        yield self._gather(phase, "sp", 1, heads * width * 2 * stat)
        if not gone:
            return
        sp, (heavy, newest) = share.sp, self.d2o.split(kept)
        moved = newest * (1 - 1 / sp) / sp * (self.model.pair * self.dtype.itemsize + 3 * stat)
        yield Sent(phase, "sp", "all_to_all", 2, heads * moved)
        yield Sent(phase, "sp", "broadcast", 1, (sp - 1) / sp * heads * sp * width)
        if share.copies > 1:
            yield self._from_first_copy(phase, 1, heads * sp * width)
        if self.d2o.merge.merges:
            is_global = share.parallel.merge_scope == "global"
            if is_global:
                yield self._all_reduce(phase, 1, heads * kept * dim * self.dtype.itemsize)
            yield self._all_reduce(phase, 1, heads * gone * stat)
            width = self._report_width(gone) + (2 * gone if share.copies > 1 else 0)
            yield self._gather(phase, "tp", 1, heads * width * stat)
            if is_global:
                sums = 2 + self.model.value_dim + (dim if self.d2o.merge.averages_keys else 0)
                yield Sent(phase, "sp", "all_to_all", 1, heads * (self._width(heavy) + newest) * (sp - 1) * sums * stat)

    # ---- parts -------------------------------------------------------------------------------------------------------

    @property
    def _stat(self) -> int:
        return stats_dtype(self.dtype).itemsize

    @property
    def _full(self) -> int:
        return self.model.num_full_layers

    @cached_property
    def _slots(self) -> list[int | None]:
        return slots_of_layers(self.model, self.d2o, self.tokens)

    def _width(self, tokens: int) -> int:
        """Of a sequence rank."""
        return -(-tokens // self.share.sp)

    def _chunks(self, chunk: int | None) -> list[tuple[int, int]]:
        chunk = chunk or self.tokens
        return [(start, min(start + chunk, self.tokens)) for start in range(0, self.tokens, chunk)]

    def _report_width(self, gone: int) -> int:
        """X, of an eviction of so many tokens."""
        if not self.d2o.merge.merges:
            return 0
        return self._report_of_one + (gone - 1 if self.d2o.merge.gate.looks_at_each else 0)

    @cached_property
    def _report_of_one(self) -> int:
        similarity, is_victim = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
        return head_reports(similarity, is_victim, self.d2o.merge.gate).shape[-1]

    def _gather(self, phase: str, axis: str, calls: int, part: float) -> Sent:
        """All-gathers of which each rank has a part of so many bytes."""
        others = getattr(self.share, axis) - 1
        return Sent(phase, axis, "all_gather", calls if others else 0, others * calls * part)

    def _all_reduce(self, phase: str, calls: int, size: float) -> Sent:
        """Over sp; bytes of all of them together."""
        return Sent(phase, "sp", "all_reduce", calls, 2 * (self.share.sp - 1) / self.share.sp * size)

    def _among_copies(self, phase: str, calls: int, size: float) -> Sent:
        """Each copy of a KV head sends what it has, of so many bytes a row in all calls, to the others."""
        return Sent(phase, "tp", "all_to_all", calls, (self.share.copies - 1) * self.batch * size)

    def _from_first_copy(self, phase: str, calls: int, size: float) -> Sent:
        """One of the copies sends, to all others."""
        return Sent(phase, "tp", "all_to_all", calls, (self.share.copies - 1) / self.share.copies * size)

    def _engine(self, tokens: int, forwards: int) -> Iterator[Sent]:
        """Two sums of hidden states a layer, of the tokens that this rank has of each forward."""
        tp = self.share.tp
        if tp > 1:
            calls = 2 * self.model.num_layers * forwards
            size = self.batch * self._width(tokens) * self.model.hidden * self.dtype.itemsize
            yield Sent("model", "tp", "all_reduce", calls, 2 * (tp - 1) / tp * 2 * self.model.num_layers * size)
