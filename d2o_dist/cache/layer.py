"""One compressed layer of a cache: a block of all its heads, or of each of them where they have budgets of their own.

Heads differ far more than layers do: a few look tokens up anywhere in the prompt, most never leave their neighbourhood.
Where ranks share the heads, every rank knows how many slots each head of the layer holds, its own or not: that follows
from lengths and budgets alone, which all ranks know. So nothing is asked of other ranks to evict, or to report.

Shape legend: B rows, Hq query heads, Hkv KV heads of this rank, n tokens of a chunk, S slots of the fullest head, D
head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.cache.block import HeadBlock
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.segments import Segments
from d2o_dist.layout.forward import Chunk, DealtChunk
from d2o_dist.layout.segments import decode_heads, segments_of
from d2o_dist.slots.rows import Rows
from d2o_dist.slots.slots import D2OState, Slots
from d2o_dist.slots.step import BlockStep


class HeadElsewhere:
    """A KV head that another rank holds: how many slots it has there.

    Attributes:
        kv_len, slot_budgets: as of the `HeadBlock` that it is there.
    """

    def __init__(self, kv_len: Sequence[int]) -> None:
        self.kv_len = list(kv_len)
        self.slot_budgets: list[int] | None = None

    def advance(self, counts: Sequence[int]) -> None:
        """Count what each row took."""
        self.kv_len = [held + new for held, new in zip(self.kv_len, counts, strict=True)]

    def evict(self, slack: int) -> None:
        """Count the eviction of each row that holds `slack` slots or more over its budget."""
        if self.slot_budgets is not None:
            both = zip(self.kv_len, self.slot_budgets, strict=True)
            self.kv_len = [slots if held >= slots + slack else held for held, slots in both]

    def join(self, other: HeadElsewhere) -> None:
        """Count the rows of another cache too."""
        self.kv_len += other.kv_len
        if self.slot_budgets is not None:
            self.slot_budgets = [*self.slot_budgets, *other.slot_budgets]

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        host = index.tolist()
        self.kv_len = [self.kv_len[row] for row in host]
        if self.slot_budgets is not None:
            self.slot_budgets = [self.slot_budgets[row] for row in host]


class Layer:
    """A layer that attends to everything before it.

    Attributes:
        blocks: what holds slots here, of one budget each; elsewhere: heads of other ranks that have budgets of their
            own.
        budgeted: both, in the order of the model's heads.
    """

    def __init__(self, block: HeadBlock) -> None:
        self.blocks = [block]
        # Of blocks that are attended in one call; known in decode steps.
        self._segments: Segments | None = None
        self.elsewhere: list[HeadElsewhere] = []
        self.budgeted: list[HeadBlock | HeadElsewhere] = self.blocks

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is known of segments is found again before their first step."""
        return {**vars(self), "_segments": None}

    def part_heads(self, here: range, num_heads: int) -> None:
        """After the first prefill: let each KV head be a block of its own.

        Args:
            here: which of the whole model's `num_heads` heads of the layer are on this rank.
        """
        (whole,) = self.blocks
        self.blocks = [whole.of_head(number) for number in range(len(here))]
        before, after = ([HeadElsewhere(whole.kv_len) for _ in range(count)]
                         for count in (here.start, num_heads - here.stop))  # fmt: skip
        self.elsewhere = before + after
        self.budgeted = before + self.blocks + after

    # ---- what it holds ---------------------------------------------------------------------------------------------

    @property
    def kv_len(self) -> list[int]:
        """Slots of each row's fullest head, on whichever rank."""
        return [max(held) for held in zip(*(one.kv_len for one in self.budgeted), strict=True)]

    @property
    def mean_kv_len(self) -> list[float]:
        """Slots of each row, mean over its heads on all ranks."""
        return [_mean(held) for held in zip(*(one.kv_len for one in self.budgeted), strict=True)]

    @property
    def slot_budgets(self) -> list[float] | None:
        """Slots each row is evicted to, mean over its heads on all ranks; None before finalize and for a protected
        layer."""
        budgets = [one.slot_budgets for one in self.budgeted]
        return None if None in budgets else [_mean(slots) for slots in zip(*budgets, strict=True)]

    @property
    def state(self) -> D2OState:
        """Thresholds averaged over the blocks of this rank, counts added up."""
        states = [block.state for block in self.blocks]

        def join(name: str, over: Callable[[Tensor], Tensor]) -> Tensor | None:
            known = [value for value in (getattr(state, name) for state in states) if value is not None]
            return over(torch.stack(known)) if known else None

        return states[0] if len(states) == 1 else D2OState(
            join("threshold", lambda x: x.nanmean(0)),
            join("num_merged", lambda x: x.sum(0)),
            join("num_dropped", lambda x: x.sum(0)),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int] | None:
        """(Hkv, D) of this rank; None before the first token."""
        shapes = [block.store.shape for block in self.blocks]
        return None if shapes[0] is None else (sum(heads for heads, _ in shapes), shapes[0][1])

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        return self.blocks[0].store.dtype

    @property
    def slot_bytes(self) -> int | None:
        """Bytes of the key and the value of one slot of a head, as they are stored; None before the first token."""
        return self.blocks[0].store.slot_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and the value of one token in a head, as a full cache stores them."""
        return self.blocks[0].store.token_size * self.dtype.itemsize

    @property
    def num_allocated_bytes(self) -> int:
        """Bytes of all buffers here."""
        return sum(block.store.num_allocated_bytes for block in self.blocks)

    @property
    def slots(self) -> Slots | None:
        """What is held here, [B, Hkv, S, ...]: in order, but for unused slots amid those of a rank that has some slots
        of all heads; heads with fewer slots end in unused ones, of position -1."""
        parts = [block.store.slots for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        width = max(one.positions.shape[-1] for one in parts)

        def join(name: str) -> Tensor:
            value = -1 if name == "positions" else 0
            tensors = [getattr(one, name) for one in parts]
            sides = [(0, 0) * (tensor.dim() - 3) + (0, width - tensor.shape[2]) for tensor in tensors]
            return torch.cat([pad(one, side, value=value) for one, side in zip(tensors, sides, strict=True)], 1)

        return Slots(*(join(name) for name in ("keys", "values", "positions", "scores", "rates", "log_mass")))

    # ---- attention -------------------------------------------------------------------------------------------------

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, chunk: Chunk | DealtChunk) -> Tensor:
        """Append a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        for head in self.elsewhere:
            head.advance(chunk.counts)
        return self._over_blocks(lambda block, *given: block.prefill(*given, chunk), softmax, q, k, v)

    def reread(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, rows: Rows) -> Tensor:
        """Attend from a chunk that is not kept, and note what each slot got; the same shape, zeros at padding."""
        return self._over_blocks(lambda block, *given: block.reread(*given, rows), softmax, q, k, v)

    def prepare(self) -> None:
        """Before the first decode step over slots that moved."""
        self._segments = segments_of([block.layout for block in self.blocks])

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *steps: BlockStep) -> Tensor:
        """Store one token a row, attend over all slots, and score them: [B, Hq, 1, D]; a step for each block."""
        if self._segments is not None:
            layouts = [block.layout for block in self.blocks]
            return decode_heads(layouts, self._segments, q, k, v, softmax, steps, self.blocks[0].config)
        if len(steps) == 1:
            return self.blocks[0].decode(q, k, v, softmax, steps[0])
        step = iter(steps)
        return self._over_blocks(lambda block, *given: block.decode(*given, next(step)), softmax, q, k, v)

    def look(self, q: Tensor, softmax: Softmax, chunk: Chunk, place: int) -> Tensor:
        """Attend from queries of another layer to what is held; see `Forward.look`."""
        return self._over_blocks(lambda block, *given: block.look(*given, chunk, place), softmax, q)

    def look_in_step(self, q: Tensor, softmax: Softmax, place: int, *steps: BlockStep) -> Tensor:
        """As `look`, in a decode step."""
        step = iter(steps)
        return self._over_blocks(lambda block, *given: block.look_in_step(*given, next(step), place), softmax, q)

    def _over_blocks(self, attend: Callable[..., Tensor], softmax: Softmax, *tensors: Tensor) -> Tensor:
        """Each block with its heads of queries (and keys, values), one after the other."""
        if len(self.blocks) == 1:
            return attend(self.blocks[0], *tensors, softmax)
        count = len(self.blocks)
        own = [softmax.of_heads(lambda heads, number=number: heads.chunk(count, 1)[number]) for number in range(count)]
        heads = zip(self.blocks, *(tensor.chunk(count, 1) for tensor in tensors), own, strict=True)
        return torch.cat([attend(*of_head) for of_head in heads], 1)

    def advance(self, counts: Sequence[int]) -> bool:
        """Count what each row took in a decode step; whether slots moved (never: evictions are the cache's)."""
        for one in self.budgeted:
            one.advance(counts)
        return False

    # ---- the rest is that of the blocks ----------------------------------------------------------------------------

    def begin_prefill(self, expected: int) -> None:
        """A prompt, or a later turn, is read from here on; expected: its tokens, 0: not known."""
        for block in self.blocks:
            block.begin_prefill(expected)

    def complete_statistics(self) -> None:
        """The last chunk was read."""
        for block in self.blocks:
            block.complete_statistics()

    def finish_prefill(self) -> None:
        """Free what only a prefill needs."""
        for block in self.blocks:
            block.finish_prefill()

    def spread(self, num_seen: Sequence[int]) -> None:
        """Hold some slots of all heads of the tensor rank, after a prompt whose slots were held by heads."""
        for block in self.blocks:
            block.spread(num_seen)

    def join(self, other: Layer) -> None:
        """Hold the rows of the same layer of another cache too."""
        for one, theirs in zip(self.budgeted, other.budgeted, strict=True):
            one.join(theirs)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        for one in self.budgeted:
            one.select_rows(index)


def _mean(values: Sequence[float]) -> float:
    """Of one value, the value itself."""
    return values[0] if len(values) == 1 else sum(values) / len(values)
