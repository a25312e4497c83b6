"""A whole model's compressed cache for one batch: prefill, finalize, decode, and later turns.

It knows nothing of any model library: `models` hands it queries, keys and values layer by layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from d2o_dist.cache import misuse
from d2o_dist.cache.columns import Columns
from d2o_dist.cache.compress import Compression
from d2o_dist.cache.dealing import Dealing
from d2o_dist.cache.decoding import Decoding
from d2o_dist.cache.inference import in_own_mode
from d2o_dist.cache.layer import Layer
from d2o_dist.cache.order import Order
from d2o_dist.cache.plans import RowBudgets, check_gathered, on_full_layers
from d2o_dist.cache.tiles import Tiles
from d2o_dist.cache.window import WindowLayer
from d2o_dist.comm.deal import Deal
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.layout.forward import Forward, SecondReading, Step
from d2o_dist.layout.places import Tune, in_columns, in_rows
from d2o_dist.layout.sequence import SequenceLayout
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.layer_slots import check_total
from d2o_dist.slots.rows import Rows, added
from d2o_dist.slots.step import DecodeStep
from d2o_dist.slots.windows import Window


class CompressedCache:
    """All layers of one model for one batch of rows.

    Args:
        config: how to compress; of as many layers as there are (`D2OConfig.for_layers`).
        windows: per layer of the model None (full attention, compressed) or its window (kept as it is).
        ranks: those that share the request; this process alone by default.
        order: of these layers, and of others that attend to their keys; by default there are none.
        latent: elements of a key, the first ones, that are its value too, and are stored once; None: none are.

    Attributes:
        num_seen: tokens seen by each row, padding not counted (the logical length).
        columns: what was seen of the batch, padding included: what a padded batch's masks and ids are indexed by.
        phase: `prefill` until a decode step or `finalize`; `decode` after it.
        num_reread: tokens of each row that were read a second time; reread_chunk: in forwards of so many; None: none.
        reads_layerwise: whether every prefill forward is a whole prompt or turn, and compressed layer by layer.
        is_steady: whether a row attends over its own segment alone, so that its last bits do not depend on others.
        dealing: how the chunks of a prompt are spread over ranks.
        step_announced: whether the next forward is a decode step that was announced.
        in_inference: whether it was ever used in `torch.inference_mode`.

    Raises:
        ValueError: protected layers or minima that exceed the total; a rule that ranks cannot share.
    """

    def __init__(
        self, config: D2OConfig, windows: list[Window | None], ranks: RequestRanks | None = None,
        order: Order | None = None, latent: int | None = None,
    ) -> None:  # fmt: skip
        self.order, self.windows, self.latent = order or Order(len(windows)), list(windows), latent
        self.ranks = RequestRanks.alone() if ranks is None else ranks
        self.full_layers = [index for index, window in enumerate(windows) if window is None]
        misuse.check_looks(self, config.needs_reread)
        self._configure(config)
        self.reads_layerwise = self.is_steady = False
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new batch."""
        self.layers: list[Layer | WindowLayer] = []
        self.num_seen: list[int] = []
        self.num_reread: list[int] = []
        self.reread_chunk: int | None = None
        self._expected, self._rereading, self._in_rows = 0, False, False
        self.columns, self.phase = Columns(0), "prefill"
        self.plans: list[RowBudgets] | None = None
        self.dealing = Dealing(self.ranks)
        self._tiles = Tiles()
        self._compression: Compression | None = None
        # Of the running forward: its tokens among the columns of the batch, and where they end if that is known.
        self._rows: Rows | None = None
        self._last_positions: list[int] | None = None
        self.left_out: frozenset[int] = frozenset()
        self._decoding: Decoding | None = None
        self.step_announced = self.in_inference = False

    @in_own_mode
    def adopt(self, config: D2OConfig) -> None:
        """Compress as `config` says what was read under another configuration.

        What a prefill gathers does not depend on how the cache is compressed afterwards: one prompt, read once into a
        cache and copied, serves many configurations.

        Raises:
            ValueError: the first prefill is over or has not begun, or did not gather what `config` needs.
        """
        misuse.check_first_prefill(self, "only a cache in its first prefill can change its configuration")
        check_gathered(config, self.config, reread_chunk=self.reread_chunk)
        self._configure(config)
        for index in self.full_layers:
            self.layers[index].blocks[0].adopt(config)

    def _configure(self, config: D2OConfig) -> None:
        compressed = on_full_layers(config, self.windows)
        check_total(compressed.budget, config.size, len(self.full_layers))
        self.ranks.parallel.check_rules(config)
        self.config, self._compressed_config = config, compressed

    # ---- one forward ---------------------------------------------------------------------------------------------

    def kv_heads(self, layer: int) -> int:
        """KV heads of a layer of the whole model, of which layers with windows may have others; 0 before any token."""
        shape = self.layers[layer].shape if self.layers else None
        return 0 if shape is None else self.dealing.num_kv_heads(shape[0])

    @property
    def num_seen_columns(self) -> int:
        """Columns seen, padding included."""
        return self.columns.count

    @property
    def in_forward(self) -> bool:
        """Whether a forward has begun and not reached its last layer."""
        return self._tiles.has_begun

    def announce(self, expected: int, num_tiles: int = 1, *, is_layerwise: bool = False) -> None:
        """Say what comes next: a prompt, or a later turn.

        Args:
            expected: tokens of its fullest row, for room; 0: not known.
            num_tiles: tiles in which its forward goes through each layer.
            is_layerwise: whether the forward is all of it, and each layer is compressed as soon as it has read it.

        Raises:
            ValueError: it cannot be compressed layer by layer.
        """
        assert not self.in_forward
        if is_layerwise:
            self.config.check_reading("layerwise")
        # Places are those of rows from here on, not columns: rows are to be what they are alone.
        self._expected, self._in_rows, self._tiles = expected, True, Tiles(num_tiles, is_layerwise=is_layerwise)

    def deal(self, mask: Tensor, *, more: bool = False) -> Deal:
        """Announce the next forward: a chunk, of which mask [B, n] has zeros in padding, spread over sequence ranks.

        The forward then takes this rank's part: [B, H, deal.width, D], each row's tokens in its last columns.

        Args:
            more: this is the next tile of a forward of which others were dealt.

        Raises:
            ValueError: rows other than those of this batch, or no token at all.
        """
        return self.dealing.deal(mask, len(self.num_seen) if self.layers else 0, more=more)

    def leave_out(self, rows: Collection[int]) -> None:
        """Let the next forward take no token of these rows, if it is a step, whatever its mask and positions say."""
        self.left_out = frozenset(rows)

    @in_own_mode
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, mask: Tensor | None,
        positions: Tensor | None = None, blocks: Tensor | None = None, tune: Tune | None = None,
    ) -> Tensor:  # fmt: skip
        """Append a chunk to one layer and attend from it. Layers come in order, 0 first. Those without keys of their
        own follow, numbered on: their k and v are not read, and q may be of the last columns alone.

        Args:
            q: [B, Hq, n, D]; k, v: [B, Hkv, n, D], of this rank's tokens, after RoPE; n = 1 after a prefill: a step.
            mask: 2D [B, seen + n], 0 marks padding. None: no padding in this chunk.
            positions: [1 or B, n] position ids, to see that they go on where the text ended. Of a chunk that was dealt,
                and of a step that was announced, neither is read.
            blocks: [B, n] int64 on the host: tokens of one number attend to each other both ways; -1, None: to none.
            tune: what makes the queries, of what they are and where; None: they are made.

        Returns:
            [B, Hq, n, D] in the dtype of q; zeros at padding.

        Raises:
            ValueError: a layer out of order; a mask or positions that contradict what was seen (see `Columns`).
        """
        forward = self._tiles.take(layer, lambda: self._begin(k, mask, positions))
        if blocks is not None:
            misuse.check_blocks(self, forward)
            forward = forward.with_blocks(blocks)
        if tune is not None:
            q = tune(q, forward.places(q.device))
        owner, place = self.order.owner(layer), self.order.place(layer)
        with self.ranks.counter.phase(self.phase):
            if place:
                out = forward.look(owner, self.layers[owner], q, softmax, place)
            else:
                out = forward.attend(layer, self.layers[layer], q, k, v, softmax)
        if layer == 0 and self._tiles.counts_at_once:
            self._count(forward)
        if self._tiles.done():
            self._end_layer(layer)
        return out

    def _begin(self, k: Tensor, mask: Tensor | None, positions: Tensor | None) -> Forward:
        """Settle the phase and the kind of this forward, or of its next tile."""
        batch, _, length, _ = k.shape
        left_out, self.left_out = self.left_out, frozenset()
        is_chunk = length > 1 or not self.num_seen_columns or self._tiles.counts_at_once
        is_chunk = is_chunk or self._rereading or self.dealing.is_announced
        if mask is not None and self._tiles.count > 1:  # that of the whole prompt
            mask = mask[:, : self.num_seen_columns + length]
        deal, dealt_rows = self.dealing.take(batch, length, is_chunk=is_chunk)
        if not self.layers:
            self.num_seen, self.columns = [0] * batch, Columns(batch)
            self.layers = self.dealing.make_layers(self.config, self.windows, self.order, batch, self.latent)
        self._last_positions = None
        if deal is not None:
            self._rows, rows = dealt_rows, Rows.of(batch, length, deal.mask())
        elif self.step_announced:
            rows = None
        else:
            left_out = frozenset() if is_chunk else left_out
            self.columns.check_mask(mask, length, left_out)
            rows = self._rows = Rows.of(batch, length, mask).without(left_out)
            self._last_positions = self.columns.check_positions(positions, rows, left_out)
        # A prompt of one token is a prefill; so is anything before the first token was seen.
        if not is_chunk:
            if not self.step_announced:
                self._open_step(None if rows.index is None else [bool(count) for count in rows.counts])
            to_heads = self.ranks.deals_tokens and not self.dealing.layout.is_spread
            places = self._decoding.places if self.step_announced else in_columns(self.num_seen_columns, 1)
            return Step(self._decoding.begin(self.is_steady), self.ranks if to_heads else None, places)
        if self.step_announced:
            raise ValueError(f"a decode step was announced, but a chunk of {length} columns came")
        if not self._rereading:
            if self.dealing.begin_prefill(batch):  # the first chunk of a prompt or of a later turn
                for one in self.layers:
                    one.begin_prefill(self._expected)
                self._expected = 0
            self._decoding, self.phase = None, "prefill"
            self._tiles.is_layerwise |= self.reads_layerwise
        places = in_rows(rows, self.num_seen) if self._in_rows else in_columns(self.num_seen_columns, length)
        return self.dealing.forward(deal, rows, self.num_seen, places, rereads=self._rereading)

    def _end_layer(self, layer: int) -> None:
        """After the last tile of a layer: compress what no other will attend to, if that is to be; after the last layer
        count the tokens, and evict what is due."""
        done = self.order.done_after(layer)
        if self._tiles.is_layerwise and done in self.full_layers:
            self._compression = self._compression or self._compress()
            with self.ranks.counter.phase("finalize"):
                self._compression.of_layer(done)
        if done in self.order.looks and done not in self.full_layers and self.phase == "prefill":
            self.layers[done].end_chunk()
        if not self.order.is_last(layer):
            return
        tiles, self._tiles = self._tiles, Tiles()
        (*_, forward) = tiles.forwards
        if isinstance(forward, Step):
            self._decoding.step.end()
            if not self.step_announced:
                self._close_step()
        elif not tiles.counts_at_once:
            self._count(forward)
        if tiles.is_layerwise:
            self.finalize()

    def _count(self, forward: Forward) -> None:
        if isinstance(forward, SecondReading):
            self.num_reread = added(self.num_reread, forward.rows.counts)
        else:
            self.num_seen = added(self.num_seen, forward.counts)
            self.columns.add(self._rows, self._last_positions)

    def _compress(self) -> Compression:
        full = {index: self.layers[index] for index in self.full_layers}
        heads, config = self.kv_heads((*self.full_layers, 0)[0]), self.config
        return Compression(full, self.plans, config, self._compressed_config, self.num_seen, heads, self.ranks)

    # ---- one decode step -----------------------------------------------------------------------------------------

    @in_own_mode
    def begin_step(self, present: Sequence[bool] | None = None) -> DecodeStep:
        """Announce a decode step: do what the host must before it, an end of the prefill included.

        The forward that follows works on the device only. It may be recorded and, while `begin_step` returns the same
        object, be replaced by a replay of the recording. `end_step` must follow either.

        Args:
            present: rows that take a token; None: all of them. Masks of the forward are not read.

        Raises:
            ValueError: see `check_step`.
        """
        misuse.check_step(self, present)
        step = self._open_step(present)
        self.step_announced, self._last_positions = True, None
        return step

    @in_own_mode
    def end_step(self) -> None:
        """After the forward or the replay of an announced step: count the tokens, and evict what is due."""
        assert self.step_announced and not self.in_forward
        self.step_announced = False
        self._close_step()

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded and not run, as far as it came."""
        self.step_announced, self._tiles = False, Tiles()

    def _open_step(self, present: Sequence[bool] | None) -> DecodeStep:
        self.finalize()
        return self._decoding.open(self.num_seen, present)

    def _close_step(self) -> None:
        counts = self._decoding.step.counts
        self.num_seen = added(self.num_seen, counts)
        self.columns.add(Rows.of_step(counts), self._last_positions)
        self._decoding.close(self.num_seen)

    @contextmanager
    def rereading(self, chunk: int) -> Iterator[None]:
        """What is read inside is a second reading of the prompt: it attends to all slots and, causally, to its own
        forward, and is not kept. What each slot got is noted, for the score rule `reread`.

        Args:
            chunk: tokens of each of its forwards.

        Raises:
            ValueError: the first prefill is over or has not begun; the prompt was not read by heads (`sp_prefill`).
        """
        misuse.check_rereading(self)
        self.num_reread = self.num_reread or [0] * len(self.num_seen)
        self.reread_chunk, self._rereading = chunk, True
        try:
            yield
        finally:
            self._rereading = False

    # ---- compression ---------------------------------------------------------------------------------------------

    @in_own_mode
    def finalize(self) -> None:
        """End the prefill: set the budgets and evict every layer to its own. A second call does nothing."""
        if self.phase == "decode" and not self.in_forward:
            return
        misuse.check_finalize(self)
        with self.ranks.counter.phase("finalize"):
            layerwise, self._compression = self._compression, None
            self.plans = self._compress().at_once() if layerwise is None else layerwise.end()
            self.phase = "decode"
            if self.ranks.deals_tokens and not self.dealing.layout.is_spread and not self.ranks.by_heads:
                for layer in self.layers:
                    layer.spread(self.num_seen)
                self.dealing.layout = SequenceLayout
            move = None if layerwise is None else layerwise.move
            self._decoding = Decoding(self.layers, self.config, self.ranks, self.num_seen, move)
        self.dealing.end_prefill()

    # ---- rows ----------------------------------------------------------------------------------------------------

    @in_own_mode
    def join(self, *others: CompressedCache) -> None:
        """Go on with the rows of other caches too, after those that are here; they must not be used afterwards.

        Each reads its own prompt; while decoding they share a step. All segments move to a new arena, as they are.

        Raises:
            ValueError: see `check_joinable`.
        """
        for other in others:
            misuse.check_joinable(self, other)
        for other in others:
            for mine, theirs in zip(self.layers, other.layers, strict=True):
                mine.join(theirs)
            self.columns.join(other.columns)
            self.num_seen += other.num_seen
            self.num_reread += other.num_reread
            self.plans += other.plans
        self._decoding.join([other._decoding for other in others])

    @in_own_mode
    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated (beam search, prompts reused by several rows)."""
        host = index.tolist()
        if not self.layers:
            return
        misuse.check_rows(host, len(self.num_seen))
        for layer in self.layers:
            layer.select_rows(index)
        if self._decoding is not None:
            self._decoding.select_rows(index)
        self.dealing.select_rows(host)
        self.num_seen = [self.num_seen[row] for row in host]
        self.columns.select_rows(host)
        self.num_reread = [self.num_reread[row] for row in host] if self.num_reread else []
        if self.plans:
            self.plans = [self.plans[row].copy() for row in host]
