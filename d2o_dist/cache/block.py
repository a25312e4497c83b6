"""The KV heads of a layer that have one budget: their slots, the budget, the threshold, and what a reading gathers.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens of a chunk, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.core.softmax import Softmax
from d2o_dist.evict.prompt import Order
from d2o_dist.layout.forward import Chunk, DealtChunk
from d2o_dist.layout.heads import HeadLayout
from d2o_dist.layout.sequence import SequenceLayout
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.rows import Rows
from d2o_dist.slots.slots import D2OState
from d2o_dist.slots.step import BlockStep, Held
from d2o_dist.slots.store import SlotStore
from d2o_dist.statistics.reading import Reading


class HeadBlock:
    """Heads that attend to everything before them, and are compressed together.

    Args:
        layers_in_prompts: layers that attend to these slots and count in a prompt's statistics.

    Attributes:
        layout: where the slots lie among the ranks of the request.
        slot_budgets: per row the slots `S_l` it is evicted to; None before finalize and for a protected layer.
        state: threshold and counts.
        order: by which a prompt's slots that are here are trimmed once more; None: they are not.
    """

    def __init__(self, config: D2OConfig, layout: HeadLayout | SequenceLayout, layers_in_prompts: int = 1) -> None:
        self.config, self.layout, self.layers_in_prompts = config, layout, layers_in_prompts
        self.slot_budgets: list[int] | None = None
        self.state = D2OState()
        self.order: Order | None = None
        self._reading: Reading | None = None
        self._first = True

    @property
    def store(self) -> SlotStore:
        """The slots on this rank."""
        return self.layout.store

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row, of each of its heads, on all ranks."""
        return self.layout.kv_len

    @property
    def held(self) -> Held:
        """As a decode step takes it."""
        return self.layout.held

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def begin_prefill(self, expected: int) -> None:
        """A prompt, or a later turn, is read from here on; expected: its tokens, 0: not known."""
        self.layout.leave()
        self._reading = Reading(
            self.config, self.layout.ranks, self.layout.begin(expected), first=self._first,
            layers=self.layers_in_prompts,
        )  # fmt: skip

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, chunk: Chunk | DealtChunk) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        return self.layout.prefill(q, k, v, softmax, chunk, self._reading, self.config)

    def look(self, q: Tensor, softmax: Softmax, chunk: Chunk, place: int) -> Tensor:
        """Attend from another layer's queries of a chunk that was appended, [B, Hq, m, D] of its last m columns."""
        return self.layout.look(q, softmax, chunk, self._reading, self.config, place)

    def reread(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept, and note what each slot got; the same shape, zeros at padding."""
        return self.layout.reread(q, k, v, softmax, rows, self._reading)

    @property
    def has_sinks(self) -> bool:
        """Whether the model has learned sinks here, known from the first chunk of a prompt on."""
        return self._reading.has_sinks

    def deviations(self) -> Tensor:
        """[B, Hq, P] sums of the deviations of each row's column sums here from 1, of the first prefill: of their
        squares, and with learned sinks of themselves too.

        The mean is 1, for every query gives 1 in all. Where a sink takes a share of it, it is measured.
        """
        sums, powers = self._reading.sums, (2, 1) if self.has_sinks else (2,)
        rows = [[sums.deviations(row, held, power) for power in powers] for row, held in enumerate(self.store.kv_len)]
        return torch.stack([torch.stack(row, -1) for row in rows])

    def complete_statistics(self) -> None:
        """The last chunk was read: measure what needs the last queries."""
        reading = self._reading
        for place, last in enumerate(reading.lasts):
            reading.close(self.store.slots, self.store.kv_len, self.layout.last_queries(last), place)

    def finish_prefill(self) -> None:
        """Free what only a prefill needs."""
        if self.config.needs_reread:
            self._reading.peaks.close(self.store.slots)
        self._reading, self._first = None, False

    def adopt(self, config: D2OConfig) -> None:
        """Leave what a prefill under `config` would have left, of a prefill that gathered at least that."""
        self.config = config
        self._reading.adopt(config, self.store.slots)

    # ---- decode steps ----------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Before a decode step of a block that is in no arena."""
        self.layout.make_room()

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, step: BlockStep) -> Tensor:
        """Store one token a row, attend over all slots, and score them: [B, Hq, 1, D].

        On the device only; `advance` counts the tokens on the host.
        """
        return self.layout.decode(q, k, v, softmax, step, self.config)

    def look_in_step(self, q: Tensor, softmax: Softmax, step: BlockStep, place: int) -> Tensor:
        """Attend from another layer's queries of a step whose tokens were stored, [B, Hq, 1, D]."""
        return self.layout.look_in_step(q, softmax, step, self.config, place)

    @property
    def widths(self) -> list[int]:
        """Of each row, how many columns of the buffers a step looks at: of its own segment, or those in use."""
        return self.layout.widths

    def advance(self, counts: Sequence[int]) -> None:
        """Count what each row took in a decode step."""
        self.layout.advance(counts)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def of_head(self, head: int) -> HeadBlock:
        """A block of one KV head of this one, whose first prefill is over; it holds views of this one's slots."""
        assert not self._first and self.state.num_dropped is None
        slots = self.store.slots.map(lambda tensor: tensor[:, head : head + 1])
        store = SlotStore.of(slots, self.kv_len, self.store.latent)
        made = HeadBlock(self.config, HeadLayout(self.layout.ranks, store, self.layout.layers), self.layers_in_prompts)
        made._first = False
        return made

    def spread(self, num_seen: Sequence[int]) -> None:
        """Hold some slots of all heads of the tensor rank, after a prompt whose slots were held by heads."""
        layout = SequenceLayout(self.layout.ranks, SlotStore(len(self.kv_len), self.store.latent))
        budgets = self.slot_budgets or [0]
        layout.spread(self.store, num_seen, max(self.config.split(slots)[1] for slots in budgets))
        self.layout, self.state = layout, self.state.map_counts(layout.ranks.sp.all_reduce)

    def join(self, other: HeadBlock) -> None:
        """Hold the rows of another block of the same heads too, after those that are here. Slots that lie in an arena
        are its own to join."""
        lengths = [len(one.kv_len) for one in (self, other)]
        self.layout.join(other.layout)
        self.state = D2OState.cat([self.state, other.state], lengths)
        if self.slot_budgets is not None:
            self.slot_budgets = [*self.slot_budgets, *other.slot_budgets]

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.layout.select_rows(index)
        self.state = self.state.map(lambda t: t.index_select(0, index.to(t.device)))
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]
        if self._reading is not None:
            self._reading.select_rows(host)
