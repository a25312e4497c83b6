"""All slots of some heads on one rank: of all heads, where no other rank shares the request.

Shape legend: B rows, b rows of a group, Hq query heads, Hkv KV heads at hand, n tokens of a chunk, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o_dist.attention.prefill import chunk_attention, reread_attention
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.finish_decode import add_probabilities, pace_of
from d2o_dist.kernels.scored_decode import scored_decode, scored_decode_steps
from d2o_dist.layout.forward import Chunk, over_rows
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.rows import Rows, is_uniform
from d2o_dist.slots.slots import Slots, last_of
from d2o_dist.slots.step import BlockStep, Held
from d2o_dist.slots.store import GROWTH, SlotStore
from d2o_dist.statistics.last_queries import LastQueries
from d2o_dist.statistics.reading import Reading


@dataclass(frozen=True)
class _Running:
    """Steps that follow each other over the same buffers.

    Attributes:
        step, softmax: of the first of them; run: see `scored_decode_steps`.
    """

    step: BlockStep
    softmax: Softmax
    run: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]

    def serves(self, step: BlockStep, softmax: Softmax) -> bool:
        """Whether a step is one of them: its tensors are those of the first, and were written anew."""
        return step is self.step and softmax.is_same(self.softmax)


class HeadLayout:
    """The layout of one block of heads.

    Args:
        store: its slots; layers: that attend to them.
    """

    is_spread = False

    def __init__(self, ranks: RequestRanks, store: SlotStore, layers: int = 1) -> None:
        self.ranks, self.store, self.layers = ranks, store, layers
        # What slots received in a step from the layers that have attended; None: between steps.
        self._received: Tensor | None = None
        self._running: _Running | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are other buffers."""
        return {**vars(self), "_running": None}

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row, of each of its heads."""
        return self.store.kv_len

    @property
    def slots(self) -> Slots:
        """[B, Hkv, S, ...] by ascending position; views of the store but in an arena."""
        return self.store.slots

    @property
    def held(self) -> Held:
        """As a decode step takes it."""
        return Held(self.store.buffers, self.store.in_arena, self.store.kv_len)

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, expected: int) -> list[int]:
        """A prefill of `expected` tokens begins (0: of how many is not known); slots of each row from before it."""
        self.store.expected = max(self.kv_len) + expected if expected else 0
        return list(self.store.kv_len)

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, chunk: Chunk, reading: Reading, config: D2OConfig
    ) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        start = list(self.store.kv_len)
        self.store.append(k, v, chunk.rows, chunk.num_seen)
        # Tokens are counted by their slots.
        ends = self.store.kv_len
        tokens = [torch.arange(first, stop) for first, stop in zip(start, ends, strict=True)]
        reading.grow(q, max(ends), chunk.rows.counts, tokens)
        return self.look(q, softmax, chunk, reading, config, 0)

    def look(
        self, q: Tensor, softmax: Softmax, chunk: Chunk, reading: Reading, config: D2OConfig, place: int
    ) -> Tensor:
        """Attend from queries of a chunk that was appended, of the last columns of it: [B, Hq, m, D].

        Args:
            place: which of the layers that attend to these slots does.
        """
        slots, ends, old = self.store.slots, self.store.kv_len, reading.num_old
        is_counted = place < reading.layers
        assert not is_counted or q.shape[2] == chunk.rows.length
        with_sums = is_counted and reading.sums is not None

        def attend(rows: slice, queries: Tensor) -> Tensor:
            row, outs = rows.start, []
            start, skipped = ends[row] - chunk.counts[row], chunk.counts[row] - queries.shape[2]
            for first, stop, both_ways in chunk.pieces(row, skipped):
                q, here = queries[:, :, first - skipped : stop - skipped], slice(0, start + stop)
                keys, values = slots.keys[rows, :, here], slots.values[rows, :, here]
                mass = slots.log_mass[rows, :, here] if reading.has_mass else None
                # The last token that each query sees; tokens are counted by their slots.
                seen = [torch.arange(start + first, start + stop)] * len(q)
                out, lse, sums = chunk_attention(
                    q, keys, values, softmax, with_sums=with_sums, sample=config.query_sample, num_old=old[row],
                    log_mass=mass, causal=not both_ways,
                )  # fmt: skip
                if both_ways:
                    seen = [one[-1:].expand(len(one)) for one in seen]
                if is_counted and reading.peaks.wanted:
                    # A later turn, or what follows the second reading before anything is compressed.
                    reading.peaks.observe(
                        slots, rows, q, keys, lse, softmax, q_start=start + first, bias=mass, causal=not both_ways
                    )
                if is_counted:
                    reading.observe(slots, rows, q, lse, softmax, sums, seen, place)
                outs.append(out)
            return torch.cat(outs, 2) if len(outs) > 1 else outs[0]

        alike = is_uniform(ends) and is_uniform(chunk.counts) and is_uniform(old) and chunk.blocks is None
        return over_rows(chunk.rows.last(q.shape[2]), q, attend, slots.values.shape[3], alike=alike)

    def reread(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, rows: Rows, reading: Reading) -> Tensor:
        """Attend from a chunk that is not kept, over all slots and causally over itself; note what each slot got.

        [B, Hq, n, D] -> the same shape, zeros at padding.
        """
        slots, kv_len = self.store.slots, self.store.kv_len
        reading.peaks.begin(slots)

        def attend(group: slice, queries: Tensor) -> Tensor:
            row, here = group.start, slice(0, kv_len[group.start])
            own = [tensor[group] if rows.index is None else rows.pick(tensor, row) for tensor in (k, v)]
            keys, values = slots.keys[group, :, here], slots.values[group, :, here]
            out, lse = reread_attention(queries, *own, keys, values, softmax)
            reading.peaks.observe(slots, group, queries, keys, lse, softmax, causal=False)
            return out

        return over_rows(rows, q, attend, v.shape[3], alike=is_uniform(kv_len))

    def last_queries(self, last: LastQueries) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The last queries of each row, as `Reading.close` takes them."""
        return list(zip(last.queries, last.lse, last.tokens, strict=True))

    def add_up(self, sums: Tensor) -> Tensor:
        """Sums over tokens here [B, h, ...] of these heads -> of all tokens and all heads of the tensor rank."""
        return self.ranks.join_heads(sums)

    # ---- the end of a prompt ---------------------------------------------------------------------------------------

    def newest(self, count: int) -> Tensor:
        """[B, Hkv, count] int64 positions of each row's newest slots, the last at the end; -1 where it has fewer."""
        return last_of(self.store.slots.positions, self.kv_len, count)

    def everyone(self) -> Slots:
        """The statistics of all ranks' slots, [B, Hkv, S, ...] in order."""
        return self.store.slots

    # ---- decode steps ----------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Before a step of slots that grow."""
        self.store.reserve(max(self.kv_len) + 1, slack=GROWTH)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, step: BlockStep, config: D2OConfig) -> Tensor:
        """Store one token a row, attend over all slots, and score them by what they got: [B, Hq, 1, D]."""
        if not self.store.is_exact:
            self.store.put(k, v, step.slot, step.position)
            return self.look_in_step(q, softmax, step, config, 0)
        new = (k[:, :, 0], v[:, :, 0])
        if self.layers > 1:
            return self.look_in_step(q, softmax, step, config, 0, new)
        if self._running is None or not self._running.serves(step, softmax):
            options = self._options(softmax, step, config) | step_statistics(self.store.buffers, config)
            run = scored_decode_steps(q[:, :, 0], *self.store.keys_values, tables=step.tables, **options)
            self._running = _Running(step, softmax, run)
        return self._running.run(q[:, :, 0], new).unsqueeze(2)

    def look_in_step(
        self, q: Tensor, softmax: Softmax, step: BlockStep, config: D2OConfig, place: int,
        new: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend over all slots, of which those of this step were stored, from one of the layers that do; the last of
        them scores: [B, Hq, 1, D]. new: as of `scored_decode`."""
        kept, options = step_statistics(self.store.buffers, config), self._options(softmax, step, config)
        gathers = self.layers > 1 and (kept["scores"] is not None or kept["rates"] is not None)
        if gathers and place == 0:
            self._received = torch.zeros_like(self.store.buffers.scores)
        received = {"scores": self._received} if gathers else kept
        out = scored_decode(q[:, :, 0], *self.store.keys_values, new=new, **options, **received)
        if gathers and place + 1 == self.layers:
            received, self._received = self._received, None
            pace = None
            if kept["rates"] is not None:
                pace = pace_of(kept["rates"], step.slot, config.statistics.rate_window, step.present)
            add_probabilities(received / self.layers, pace=pace, present=step.present, **kept)
        return out.unsqueeze(2)

    def _options(self, softmax: Softmax, step: BlockStep, config: D2OConfig) -> dict[str, Any]:
        """Of `scored_decode`: all but what is kept and the token."""
        return dict(
            **softmax.logits, sinks=softmax.sinks,
            valid=step.live,
            log_mass=self.store.buffers.log_mass if config.merge.keeps_mass else None,
            widths=step.widths,
            newest=step.slot,
            rate_window=config.statistics.rate_window,
            present=step.present,
            total=self.ranks.total_of_replicas,
        )  # fmt: skip

    def advance(self, counts: Sequence[int]) -> None:
        """Count what each row took in a decode step."""
        self.store.advance(counts)

    def evicted(self, kv_len: Sequence[int]) -> None:
        """Count what an eviction in the arena left."""
        self.store.kv_len = list(kv_len)

    @property
    def widths(self) -> list[int]:
        """As `HeadBlock.widths`."""
        return self.store.widths

    def enter(self, block: Slots, codec: Codec, room: Sequence[int]) -> None:
        """Move the slots into a block of an arena, in which each row has so much room."""
        self.store.enter(block, codec, room)

    def rebase(self, block: Slots, room: Sequence[int]) -> None:
        """The slots lie in the block of another arena."""
        self._running = None
        self.store.rebase(block, room)

    def leave(self) -> None:
        """Hold the slots in buffers of their own, in order."""
        self._running = None
        self.store.leave()

    def join(self, other: HeadLayout) -> None:
        """Hold the rows of another block too."""
        self._running = None
        self.store.join(other.store)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self._running = None
        self.store.select_rows(index)


def step_statistics(buffers: Slots, config: D2OConfig) -> dict[str, Any]:
    """What a decode step keeps up to date, as `scored_decode` takes it."""
    return dict(
        scores=buffers.scores if config.needs_column_sums or config.needs_reread else None,
        rates=buffers.rates if config.needs_rates else None,
        peaks=config.needs_reread,
    )

