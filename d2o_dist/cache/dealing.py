"""How the chunks of a prompt are spread over the sequence ranks of a request, and what a forward of one does.

Shape legend: B rows, n columns of a chunk, or of this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from d2o_dist.attention.exchange import HeadExchange
from d2o_dist.cache.block import HeadBlock
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.order import Order
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.deal import Deal, Placement
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.shard import Contiguous, Zigzag
from d2o_dist.layout.forward import Chunk, DealtChunk, SecondReading
from d2o_dist.layout.heads import HeadLayout
from d2o_dist.layout.places import Places, in_deal
from d2o_dist.layout.sequence import SequenceLayout
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.rows import Rows
from d2o_dist.slots.store import SlotStore
from d2o_dist.slots.windows import Window


class Dealing:
    """Of one cache.

    Attributes:
        layout: of blocks of heads, now: by heads, or every rank has some slots of every head.
        latest: the chunk that was dealt last, if any.
    """

    def __init__(self, ranks: RequestRanks) -> None:
        self.ranks = ranks
        spread = ranks.deals_tokens and ranks.parallel.sp_prefill != "ulysses"
        self.layout: type[HeadLayout] | type[SequenceLayout] = SequenceLayout if spread else HeadLayout
        self.latest: Deal | None = None
        # What was dealt, and whose forwards, or tiles of one, have not begun.
        self._announced: list[tuple[Deal, Rows]] = []
        self._placement: Placement | None = None

    @property
    def is_announced(self) -> bool:
        """Whether a chunk was dealt whose forward has not begun."""
        return bool(self._announced)

    def make_layers(
        self, config: D2OConfig, windows: Sequence[Window | None], order: Order, batch: int, latent: int | None
    ) -> list[Layer | WindowLayer]:
        """Empty layers of `batch` rows, each with a window or (None) compressed; latent: see `SlotStore`."""
        return [self._layer(config, one, batch, order.sharing(index), latent) for index, one in enumerate(windows)]

    def _layer(
        self, config: D2OConfig, window: Window | None, batch: int, sharing: tuple[int, int], latent: int | None
    ) -> Layer | WindowLayer:
        if window is not None:
            return WindowLayer(batch, window, self.ranks, is_looked_at=sharing[0] > 1)
        store = SlotStore(batch, latent)
        layout = self.layout(self.ranks, store) if sharing[0] == 1 else HeadLayout(self.ranks, store, sharing[0])
        return Layer(HeadBlock(config, layout, sharing[1]))

    def num_kv_heads(self, held: int) -> int:
        """KV heads of a layer of the whole model, of which `held` are on this rank."""
        ranks = self.ranks
        if ranks.deals_tokens and not self.layout.is_spread:
            held = held // ranks.kv_sizes[ranks.sp.rank] * sum(ranks.kv_sizes)
        return held * ranks.tp.size // ranks.kv_replicas

    def deal(self, mask: Tensor, batch: int, *, more: bool = False) -> Deal:
        """Announce a chunk; see `CompressedCache.deal`. batch: rows of the cache; 0: none yet."""
        rows = Rows.of(*mask.shape, mask)
        counts = rows.counts
        if batch and len(counts) != batch:
            raise ValueError(f"a chunk of {len(counts)} rows was dealt, but the cache has {batch}")
        if not counts or max(counts) < 1:
            raise ValueError(f"a chunk must have a token, but its rows have {list(counts)}")
        rule = Zigzag if self.layout.is_spread else Contiguous
        self.latest = Deal.of(counts, rule, self.ranks.sp.size, self.ranks.sp.rank)
        self._announced = [*(self._announced if more else ()), (self.latest, rows)]
        return self.latest

    def take(self, batch: int, length: int, *, is_chunk: bool) -> tuple[Deal | None, Rows | None]:
        """What was announced of a forward of `batch` rows of `length` columns, and the tokens of the whole chunk.

        Raises:
            ValueError: a chunk that must be dealt was not, or the forward has another shape.
        """
        deal, rows = self._announced.pop(0) if self._announced else (None, None)
        if deal is None and self.ranks.deals_tokens and is_chunk:
            raise ValueError(
                f"a chunk of {length} columns was not dealt: with sp ({self.ranks.sp.size}) every rank takes a part of "
                "the prompt; announce it with deal()"
            )
        if deal is not None and (len(deal.maps), deal.width) != (batch, length):
            raise ValueError(
                f"{len(deal.maps)} rows of {deal.width} columns were dealt to this rank, but the forward has {batch} "
                f"of {length}"
            )
        return deal, rows

    def begin_prefill(self, batch: int) -> bool:
        """A chunk comes; whether it is the first one of its prompt."""
        is_first = self._placement is None
        if is_first:
            self._placement = Placement(batch, self.ranks.sp.size)
        return is_first

    def end_prefill(self) -> None:
        """The prompt is over."""
        self._placement = None

    def forward(
        self, deal: Deal | None, rows: Rows, num_seen: list[int], places: Places, *, rereads: bool
    ) -> Chunk | DealtChunk | SecondReading:
        """Of a chunk whose tokens here are `rows`; num_seen: tokens of each row before it; places: of its queries, if
        it was not dealt."""
        exchange, places = None, places if deal is None else in_deal(deal, num_seen)
        if deal is not None and self.ranks.deals_tokens:
            if self.layout.is_spread:
                self._placement = self._placement.with_chunk(deal)
                return DealtChunk(deal, self._placement, rows, num_seen, places)
            rows, exchange = Rows.first(deal.counts), HeadExchange(self.ranks, deal)
        return SecondReading(rows, exchange, places) if rereads else Chunk(rows, num_seen, places, exchange)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated where repeated."""
        if self._placement is not None:
            self._placement.select_rows(rows)
