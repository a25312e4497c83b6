"""Some slots of all heads of the tensor rank on every sequence rank.

Shape legend: B rows, b rows of a group, Hq query heads, Hkv KV heads of the tensor rank, n columns of a rank's part of
a chunk, W slots of a rank during a prefill, C slots of a rank while decoding, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.attention.allgather import allgather_attention
from d2o_dist.attention.decode import sharded_decode_attention
from d2o_dist.attention.ring import ring_attention
from d2o_dist.attention.shard import ShardView
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.layout.forward import DealtChunk
from d2o_dist.layout.heads import step_statistics
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.codec import Codec
from d2o_dist.slots.shares import Shares
from d2o_dist.slots.slots import Slots, join_values, last_of
from d2o_dist.slots.step import BlockStep, Held
from d2o_dist.slots.store import GROWTH, SlotStore
from d2o_dist.statistics.last_queries import LastQueries
from d2o_dist.statistics.reading import Reading

# With `sp_prefill: auto`: keys and values of one head of all ranks, in bytes, above which they are not gathered. A ring
# sends half as much again, but holds one rank's tokens only.
RING_FROM_BYTES = 1 << 30


class SequenceLayout:
    """The layout of one block of heads.

    Args:
        store: the slots of this rank. While decoding all of its C slots count as used; an unused one has position -1.

    Attributes:
        kv_len: slots of each row, on all ranks together.
        shares: [B, Hkv, world] slots of each rank; None before the first prompt ends.
    """

    is_spread = True

    def __init__(self, ranks: RequestRanks, store: SlotStore) -> None:
        self.ranks, self.store = ranks, store
        self.kv_len = [0] * len(store.kv_len)
        self.shares: Shares | None = None
        # Slots of every rank when the running prefill began, and now: the fullest rank's.
        self._past = self._width = 0
        # Most slots that a head has here, if tokens go where there are fewest: what slots that grow need.
        self._peak = 0
        # [B, Hkv, M] positions of the newest slots of all ranks when the last prompt ended.
        self._newest: Tensor | None = None

    @property
    def slots(self) -> Slots:
        """[B, Hkv, W, ...] while a prompt is read: as many as any rank has, unused ones of position -1."""
        return self.store.view(self._width)

    @property
    def held(self) -> Held:
        """As a decode step takes it."""
        return Held(self.store.buffers, self.store.in_arena, self.store.kv_len, self.shares)

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, expected: int) -> list[int]:
        """A prefill of `expected` tokens on all ranks begins; slots of each row from before it, with unused ones."""
        self._past = 0 if self.shares is None else self.store.capacity
        self.store.expected = self._past + -(-expected // self.ranks.sp.size) if expected else 0
        return [self._past] * len(self.kv_len)

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, chunk: DealtChunk, reading: Reading, config: D2OConfig
    ) -> Tensor:
        """Append this rank's part of a chunk and attend from it; [B, Hq, n, D] -> the same shape, zeros at padding."""
        deal, placement = chunk.deal, chunk.placement
        start = list(self.store.kv_len)
        self.store.append(k, v, chunk.rows, chunk.num_seen)
        width = self._width = self._past + placement.width
        self.store.reserve(width)
        slots = self.store.view(width)
        tokens = [chunk.tokens(row) for row in range(len(start))]
        for row, here in enumerate(tokens):
            slots.positions[row, :, start[row] : self.store.kv_len[row]] = here.to(q.device)
        self.kv_len = [old + new for old, new in zip(self.kv_len, deal.counts, strict=True)]
        reading.grow(q, width, deal.counts, tokens)
        attend = ring_attention if self._rings(k, v, width) else allgather_attention
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        for rows in chunk.groups:
            row = rows.start
            columns = chunk.columns(row)
            queries = q[rows, :, columns]
            view = ShardView(
                keys=slots.keys[rows],
                values=slots.values[rows],
                bias=self._past_bias(rows),
                tokens=[placement.tokens(row, rank) for rank in range(deal.world)],
                segments=placement.segments(row, deal),
                rank=deal.rank,
                latent=self.store.latent,
            )
            part, lse, sums = attend(
                self.ranks.sp, queries, view, softmax, with_sums=reading.sums is not None, sample=config.query_sample
            )
            out[rows, :, columns] = part
            reading.observe(slots, rows, queries, lse, softmax, sums, tokens[rows])
        return out

    def _rings(self, k: Tensor, v: Tensor, width: int) -> bool:
        """Whether keys and values travel around rather than being gathered; a cache moved from heads has no ring."""
        size = k.shape[3] + (v.shape[3] if self.store.latent is None else 0)
        gathered = self.ranks.sp.size * width * size * k.element_size()
        too_long = self.ranks.may_ring and gathered > RING_FROM_BYTES
        return too_long or self.ranks.parallel.sp_prefill == "ring"

    def _past_bias(self, rows: slice) -> Tensor | None:
        """[b, Hkv, C]: log masses of the past slots, -inf on unused ones."""
        if not self._past:
            return None
        past = self.store.view(self._past)
        return past.log_mass[rows].masked_fill(past.positions[rows] < 0, -torch.inf)

    def last_queries(self, last: LastQueries) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The last queries of each row on all ranks, as `Reading.close` takes them. One collective."""
        return last.gather(self.ranks.sp, self.store.slots.rates)

    def add_up(self, sums: Tensor) -> Tensor:
        """Sums over tokens here [B, Hq, ...] -> of all tokens, of all heads of the tensor rank. One collective."""
        return self.ranks.sp.sum_in_rank_order(sums)

    # ---- the end of a prompt ---------------------------------------------------------------------------------------

    def settle(self, slots: Slots, held: Tensor, kv_len: Sequence[int], newest: Tensor | None = None) -> None:
        """Hold what the eviction of a prompt left.

        Args:
            slots: [B, Hkv, C, ...] here; held: [B, Hkv, world] slots of each rank; newest: [B, Hkv, M] positions of the
                newest ones of all ranks.
        """
        self.kv_len, self.shares, self._newest = list(kv_len), Shares(held, self.ranks.sp.rank), newest
        self._width = slots.positions.shape[-1]
        self.store.hold(slots, [self._width] * len(kv_len))

    def settle_whole(self) -> None:
        """Hold everything, of a block that has no budget."""
        slots = self.slots
        counts = slots.live.sum(-1, keepdim=True)
        # The past's unused slots lie in the middle.
        self.settle(slots.in_order() if self._past else slots, self.ranks.sp.all_gather(counts, -1), self.kv_len)
        self._past, self._peak = 0, self.store.capacity

    def newest(self, count: int) -> Tensor:
        """[B, Hkv, count] int64 positions of each row's newest slots on all ranks, the last at the end; -1 where it has
        fewer."""
        newest, self._newest = self._newest, None
        if newest is None:  # tokens have come since, or rows
            positions = statistics_of_all(self.store.slots, self.ranks.sp)[0].positions
            return last_of(positions, self.kv_len, count)
        return newest[..., newest.shape[-1] - count :]

    def everyone(self) -> Slots:
        """The statistics of all ranks' slots, [B, Hkv, S, ...] in order; keys and values are empty. Two collectives."""
        return statistics_of_all(self.slots, self.ranks.sp)[0]

    def spread(self, source: SlotStore, num_seen: Sequence[int], most: int) -> None:
        """Take over the slots [B, h, S, ...] of some heads, of which each rank holds all: slot s goes to rank s mod
        world. Three collectives.

        Args:
            num_seen: tokens seen by each row, which are one prompt; most: M, newest slots of which positions are known.
        """
        sp, slots, kv_len = self.ranks.sp, join_values(source.slots, source.latent), list(source.kv_len)
        width = -(-slots.positions.shape[-1] // sp.size)
        batch, dim = slots.keys.shape[0], slots.keys.shape[3]

        def exchange(tensor: Tensor) -> Tensor:
            """[B, h, S, X] -> [B, Hkv, width, X]; positions are shifted by one, so that what is padded reads -1."""
            padded = pad(tensor, (0, 0, 0, width * sp.size - tensor.shape[2]))
            parts = padded.unflatten(2, (width, sp.size)).unbind(3)
            shapes = [(batch, size, width, tensor.shape[3]) for size in self.ranks.kv_sizes]
            return torch.cat(sp.all_to_all_list(parts, shapes), 1)

        keys, values = exchange(torch.cat([slots.keys, slots.values], -1)).tensor_split([dim], -1)
        statistics = exchange(torch.stack([slots.scores, slots.rates, slots.log_mass], -1)).unbind(-1)
        positions = exchange(slots.positions.unsqueeze(-1) + 1).squeeze(-1) - 1
        counts = torch.tensor(kv_len, device=positions.device)[:, None]
        held = (counts - torch.arange(sp.size, device=positions.device) + sp.size - 1) // sp.size
        held = held[:, None].expand(-1, positions.shape[1], -1).clone()
        # Nothing was evicted among the newest: their positions follow.
        back = torch.arange(most, device=positions.device) - most
        newest = (torch.tensor(list(num_seen), device=positions.device)[:, None] + back).clamp_min(-1)
        newest = newest[:, None].expand(-1, positions.shape[1], -1)
        self.settle(Slots(keys, values, positions, *statistics), held, kv_len, newest)
        self._peak = width

    # ---- decode steps ----------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Before a step of slots that grow."""
        needed = max(self._peak, -(-(max(self.kv_len) + 1) // self.ranks.sp.size))
        if needed > self.store.capacity:
            self.store.reserve(needed, slack=GROWTH)
            self.store.kv_len = [self.store.capacity] * len(self.kv_len)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, step: BlockStep, config: D2OConfig) -> Tensor:
        """Store one token a row on one rank, attend over all ranks' slots, and score this rank's: [B, Hq, 1, D]."""
        new = (k[:, :, 0], v[:, :, 0]) if self.store.is_exact else None
        if new is None:
            self.store.put(k, v, step.slot, step.position, masked=True)
        buffers = self.store.buffers
        out = sharded_decode_attention(
            self.ranks.sp, q[:, :, 0], *self.store.keys_values, softmax, valid=step.live,
            log_mass=buffers.log_mass if config.merge.keeps_mass else None,
            newest=step.slot, new=new, rate_window=config.statistics.rate_window, present=step.present,
            total=self.ranks.total_of_replicas, **step_statistics(buffers, config),
        )  # fmt: skip
        return out.unsqueeze(2)

    def advance(self, counts: Sequence[int]) -> None:
        """Count what each row took in a decode step."""
        self.kv_len = [old + new for old, new in zip(self.kv_len, counts, strict=True)]

    def evicted(self, kv_len: Sequence[int]) -> None:
        """Count what an eviction in the arena left, on all ranks together."""
        self.kv_len = list(kv_len)

    @property
    def widths(self) -> list[int]:
        """As `HeadBlock.widths`; nothing reads them here."""
        return self.store.widths

    def enter(self, block: Slots, codec: Codec, room: Sequence[int]) -> None:
        """Move the slots into a block of an arena, all of which then count as used."""
        self.store.enter(block, codec, room)
        self.store.kv_len = [self.store.capacity] * len(self.kv_len)

    def rebase(self, block: Slots, room: Sequence[int]) -> None:
        """The slots lie in the block of another arena."""
        self.store.rebase(block, room)
        self.store.kv_len = [self.store.capacity] * len(self.kv_len)

    def leave(self) -> None:
        """Hold the slots in buffers of their own, in order."""
        self.store.leave()

    def join(self, other: SequenceLayout) -> None:
        """Hold the rows of another block too."""
        self.store.join(other.store)
        self.store.kv_len = [self.store.capacity] * len(self.store.kv_len)
        self.kv_len += other.kv_len
        self._peak = max(self._peak, other._peak)
        self.shares = Shares(torch.cat([self.shares.held, other.shares.held]), self.ranks.sp.rank)
        self._newest = None

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated."""
        self.store.select_rows(index)
        self.kv_len = [self.kv_len[row] for row in index.tolist()]
        if self.shares is not None:
            held = self.shares.held.index_select(0, index.to(self.shares.held.device))
            self.shares = Shares(held, self.ranks.sp.rank)


def statistics_of_all(slots: Slots, sp: Collectives) -> tuple[Slots, Tensor]:
    """All ranks' slots by position, without keys and values; where each is: rank x W + slot. Both [B, H, world x W]."""
    positions = sp.all_gather(slots.positions, -1)
    scores, rates = sp.all_gather(torch.stack([slots.scores, slots.rates]), -1)
    nothing = positions.new_zeros(*positions.shape, 0)
    # By position; the place of each travels in the slot of the log masses, which no selection reads.
    source = torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)
    order = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
    everyone = Slots(nothing, nothing, positions, scores, rates, torch.zeros_like(scores))
    return everyone.take(order, (positions >= 0).gather(-1, order)), source.gather(-1, order)
