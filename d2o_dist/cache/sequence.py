"""A whole model's compressed cache for one batch: prefill, finalize, decode, and later turns.

It knows nothing of any model library: `models` hands it queries, keys and values layer by layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from d2o_dist.attention.exchange import HeadExchange
from d2o_dist.cache.columns import Columns
from d2o_dist.cache.evictions import LayerEvictions, ShardEvictions
from d2o_dist.cache.forward import Chunk, ChunkOfHeads, DealtChunk, Forward, SecondReading, Step
from d2o_dist.cache.headwise import HeadElsewhere, HeadwiseLayer
from d2o_dist.cache.inference import in_own_mode
from d2o_dist.cache.layers import CompressedLayer, Layer, make_layers, spread_layers
from d2o_dist.cache.plans import RowPlan, check_gathered, head_counts, head_variances, on_full_layers, set_budgets
from d2o_dist.cache.rows import Rows
from d2o_dist.cache.step import DecodeStep
from d2o_dist.comm.deal import Deal, Placement
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.shard import Contiguous, Zigzag
from d2o_dist.compression.evict_arena import ArenaEvictions
from d2o_dist.policy.budget import check_total
from d2o_dist.policy.config import D2OConfig


class CompressedCache:
    """All layers of one model for one batch of rows.

    Args:
        config: how to compress.
        windows: per layer of the model None (full attention, compressed) or its sliding window (kept as it is).
        ranks: those that share the request; this process alone by default.

    Attributes:
        num_seen: tokens seen by each row, padding not counted (the logical length).
        columns: what was seen of the batch, padding included: what a padded batch's masks and ids are indexed by.
        phase: `prefill` until a decode step or `finalize`; `decode` after it.
        num_reread: tokens of each row that were read a second time; reread_chunk: in forwards of so many; None: none.
        dealt: the chunk that was dealt last, if any.
        in_inference: whether it was ever used in `torch.inference_mode`.
        step: what decode steps read and advance on the device; None while there are none.

    Raises:
        ValueError: protected layers or minima that exceed the total; a rule that ranks cannot share.
    """

    def __init__(self, config: D2OConfig, windows: list[int | None], ranks: RequestRanks | None = None) -> None:
        self.config = config
        self.ranks = RequestRanks.alone() if ranks is None else ranks
        self.windows = list(windows)
        self.full_layers = [index for index, window in enumerate(windows) if window is None]
        self._compressed_config = on_full_layers(config, windows)
        check_total(self._compressed_config.budget, config.size, len(self.full_layers))
        self._check_shared(config)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new batch."""
        self.layers: list[Layer] = []
        self.num_seen: list[int] = []
        self.num_reread: list[int] = []
        self.reread_chunk: int | None = None
        self._rereading = False
        self.columns = Columns(0)
        self.phase = "prefill"
        self.plans: list[RowPlan] | None = None
        self._next_layer = 0
        self.dealt: Deal | None = None
        self._dealt_rows: Rows | None = None
        self._placement: Placement | None = None
        self._forward: Forward | None = None
        # Of the running forward: its tokens among the columns of the batch, and where they end if that is known.
        self._rows: Rows | None = None
        self._last_positions: list[int] | None = None
        self._left_out: frozenset[int] = frozenset()
        self.step: DecodeStep | None = None
        # Evictions while decoding, and the arena that the slots of layers with budgets lie in meanwhile.
        self._arena_evictions: ArenaEvictions | None = None
        self._step_announced = False
        self.in_inference = False
        # Whether every rank holds a part of the slots of every head, rather than all slots of some heads.
        self._by_sequence = self.ranks.deals_tokens and self.ranks.parallel.sp_prefill != "ulysses"

    @in_own_mode
    def adopt(self, config: D2OConfig) -> None:
        """Compress as `config` says what was read under another configuration.

        What a prefill gathers does not depend on how the cache is compressed afterwards: one prompt, read once into a
        cache and copied, serves many configurations.

        Raises:
            ValueError: the first prefill is over or has not begun, or did not gather what `config` needs.
        """
        self._check_first_prefill("only a cache in its first prefill can change its configuration")
        check_gathered(config, self.config, reread_chunk=self.reread_chunk)
        compressed = on_full_layers(config, self.windows)
        check_total(compressed.budget, config.size, len(self.full_layers))
        self._check_shared(config)
        self.config, self._compressed_config = config, compressed
        for layer in self._full().values():
            layer.adopt(config)

    def _check_first_prefill(self, rule: str) -> None:
        if self.phase != "prefill" or self.plans is not None or not self.num_seen_columns or self.in_forward:
            raise ValueError(
                f"{rule}; this cache is in phase {self.phase} and has seen {self.num_seen_columns} tokens"
            )

    def _check_shared(self, config: D2OConfig) -> None:
        self.ranks.parallel.check_rules(config)

    # ---- one forward ---------------------------------------------------------------------------------------------

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer of the whole model; 0 before the first token."""
        shape = self.layers[0].store.shape if self.layers else None
        if shape is None:
            return 0
        whole = self.ranks.deals_tokens and not self._by_sequence
        heads = sum(self.ranks.kv_sizes) if whole else shape[0]
        return heads * self.ranks.tp.size // self.ranks.kv_replicas

    def token_bytes(self, layer: int) -> int:
        """Bytes of the key and value of one token in all KV heads of a layer of the whole model."""
        store = self.layers[layer].store
        return 2 * self.num_kv_heads * store.shape[1] * store.dtype.itemsize

    @property
    def num_seen_columns(self) -> int:
        """Columns seen, padding included."""
        return self.columns.count

    @property
    def step_announced(self) -> bool:
        """Whether the next forward is a decode step that was announced."""
        return self._step_announced

    @property
    def in_forward(self) -> bool:
        """Whether a forward has begun and not reached its last layer."""
        return self._next_layer != 0

    def deal(self, mask: Tensor) -> Deal:
        """Announce the next forward: the chunk of which the mask [B, n] has zeros in padding, spread over the
        sequence ranks.

        The forward then takes this rank's part: [B, H, deal.width, D], each row's tokens in its last columns.

        Raises:
            ValueError: rows other than those of this batch, or no token at all.
        """
        rows = Rows.of(*mask.shape, mask)
        counts = rows.counts
        if self.layers and len(counts) != len(self.num_seen):
            raise ValueError(f"a chunk of {len(counts)} rows was dealt, but the cache has {len(self.num_seen)}")
        if not counts or max(counts) < 1:
            raise ValueError(f"a chunk must have a token, but its rows have {list(counts)}")
        rule = Zigzag if self._by_sequence else Contiguous
        self.dealt, self._dealt_rows = Deal.of(counts, rule, self.ranks.sp.size, self.ranks.sp.rank), rows
        return self.dealt

    def leave_out(self, rows: Collection[int]) -> None:
        """Let the next forward take no token of these rows, if it is a decode step: whatever its mask and position ids
        say of them, they are fed padding."""
        self._left_out = frozenset(rows)

    @in_own_mode
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Append a chunk to one layer and attend from it. Layers come in order, 0 first.

        Args:
            q: [B, Hq, n, D]; k, v: [B, Hkv, n, D], after RoPE; n = 1 after a prefill is a decode step. Of a chunk that
                was dealt: this rank's part.
            mask: 2D [B, seen + n], 0 marks padding. None: no padding in this chunk.
            positions: [1 or B, n] position ids, to see that they go on where the text ended. Of a chunk that was dealt,
                and of a step that was announced, neither is read.

        Returns:
            [B, Hq, n, D] in the dtype of q; zeros at padding.

        Raises:
            ValueError: a layer out of order; a mask or positions that contradict what was seen (see `Columns`).
        """
        if layer != self._next_layer:
            raise ValueError(
                f"layer {layer} attends, but layer {self._next_layer} was expected: a forward was broken off, or the "
                "model's layers do not all use this cache. Make a new cache"
            )
        if layer == 0:
            self._begin(k, mask, positions)
        with self.ranks.counter.phase(self.phase):
            out = self._forward.attend(layer, self.layers[layer], q, k, v, scale)
        self._next_layer = layer + 1
        if self._next_layer == len(self.windows):
            self._end()
        return out

    def _begin(self, k: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """Settle the phase and the kind of this forward."""
        batch, _, length, _ = k.shape
        deal = None if self._dealt_rows is None else self.dealt
        dealt_rows, self._dealt_rows, left_out, self._left_out = self._dealt_rows, None, self._left_out, frozenset()
        is_chunk = length > 1 or not self.num_seen_columns or self._rereading or deal is not None
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
        if not self.layers:
            self.num_seen, self.columns = [0] * batch, Columns(batch)
            self.layers = make_layers(self.windows, batch, self.config, self.ranks, by_sequence=self._by_sequence)
        self._last_positions = None
        if deal is not None:
            self._rows, rows = dealt_rows, Rows.of(batch, length, deal.mask())
        elif self._step_announced:
            rows = None
        else:
            left_out = frozenset() if is_chunk else left_out
            self.columns.check_mask(mask, length, left_out)
            rows = self._rows = Rows.of(batch, length, mask).without(left_out)
            self._last_positions = self.columns.check_positions(positions, rows, left_out)
        # A prompt of one token is a prefill; so is anything before the first token was seen.
        if not is_chunk:
            if not self._step_announced:
                self._open_step(None if rows.index is None else [bool(count) for count in rows.counts])
            steps = iter(self.step.begin())
            by_layer = [[next(steps) for _ in layer.units] for layer in self.layers]
            spread = self.ranks.deals_tokens and not self._by_sequence
            self._forward = Step(by_layer, self.ranks if spread else None)
            return
        if self._step_announced:
            raise ValueError(f"a decode step was announced, but a chunk of {length} columns came")
        if self._rereading:
            self._forward = self._second_reading(deal, rows)
            return
        self._begin_prefill(batch)
        if deal is None or not self.ranks.deals_tokens:
            self._forward = Chunk(rows, self.num_seen)
        elif self._by_sequence:
            self._placement.add(deal)
            self._forward = DealtChunk(deal, self._placement, rows, self.num_seen)
        else:
            self._forward = ChunkOfHeads(Rows.first(deal.counts), self.num_seen, HeadExchange(self.ranks, deal))

    def _second_reading(self, deal: Deal | None, rows: Rows) -> SecondReading:
        """Of a chunk whose tokens here are `rows`."""
        if deal is None or not self.ranks.deals_tokens:
            return SecondReading(rows, None)
        return SecondReading(Rows.first(deal.counts), HeadExchange(self.ranks, deal))

    def _begin_prefill(self, batch: int) -> None:
        for unit in self._units():
            unit.store.leave()
        self._arena_evictions = None
        if self._placement is None or self.phase != "prefill":
            self._placement = Placement(batch, self.ranks.sp.size)
            if self._by_sequence:
                for layer in self.layers:
                    layer.begin_prefill()
        self.phase = "prefill"

    def _end(self) -> None:
        """After the last layer: count the tokens, and evict what is due."""
        forward, self._forward, self._next_layer = self._forward, None, 0
        if isinstance(forward, Step):
            self.step.end()
            if not self._step_announced:
                self._close_step()
        elif isinstance(forward, SecondReading):
            self.num_reread = _added(self.num_reread, forward.rows.counts)
        else:
            self.num_seen = _added(self.num_seen, forward.counts)
            self.columns.add(self._rows, self._last_positions)

    # ---- one decode step -----------------------------------------------------------------------------------------

    @in_own_mode
    def begin_step(self, present: Sequence[bool] | None = None) -> DecodeStep:
        """Announce a decode step: do what the host must before it, an end of the prefill included.

        The forward that follows works on the device only. It may be recorded and, while `begin_step` returns the same
        object, be replaced by a replay of the recording. `end_step` must follow either.

        Args:
            present: rows that take a token; None: all of them. Masks of the forward are not read.

        Raises:
            ValueError: nothing was read yet, other rows than the cache has, or another step is open.
        """
        if self.in_forward or self._step_announced:
            raise ValueError("a decode step was announced in the middle of another forward or step")
        if not self.num_seen_columns:
            raise ValueError("a decode step was announced before any token was seen")
        if present is not None and len(present) != len(self.num_seen):
            raise ValueError(f"a step of {len(present)} rows was announced, but the cache has {len(self.num_seen)}")
        self._open_step(present)
        self._step_announced, self._last_positions = True, None
        return self.step

    @in_own_mode
    def end_step(self) -> None:
        """After the forward or the replay of an announced step: count the tokens, and evict what is due."""
        assert self._step_announced and not self.in_forward
        self._step_announced = False
        self._close_step()

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded and not run, as far as it came."""
        self._step_announced, self._next_layer, self._forward = False, 0, None

    def _open_step(self, present: Sequence[bool] | None) -> None:
        self.finalize()
        units = self._units()
        for unit in units:
            if not unit.store.in_arena:
                unit.make_room()
        if present is not None and all(present):
            present = None
        buffers = [unit.store.buffers for unit in units]
        if self.step is None or not self.step.fits(buffers, present):
            arena = None if self._arena_evictions is None else self._arena_evictions.arena
            numbers = iter(range(len(units)))
            blocks = [next(numbers) if unit.store.in_arena else None for unit in units]
            held = [unit.kv_len for unit in units]
            self.step = DecodeStep(self.num_seen, held, buffers, present, arena, blocks)
        self.step.choose(present)

    def _units(self) -> list[Layer]:
        """All that holds slots of its own: layers, or their KV heads where these have budgets of their own."""
        return [unit for layer in self.layers for unit in layer.units]

    def _elsewhere(self) -> list[HeadElsewhere]:
        """KV heads of other ranks that have budgets of their own."""
        return [head for layer in self.layers if isinstance(layer, HeadwiseLayer) for head in layer.elsewhere]

    def _close_step(self) -> None:
        counts = self.step.counts
        moved = [unit.advance(counts) for unit in self._units()]
        for head in self._elsewhere():
            head.advance(counts)
        self.num_seen = _added(self.num_seen, counts)
        self.columns.add(Rows.of_step(counts), self._last_positions)
        if self.config.eviction_interval is not None:
            with self.ranks.counter.phase("evict"):
                moved.append(self._evict(self.config.eviction_interval))
        if any(moved):
            self.step.hold([unit.kv_len for unit in self._units()])

    @contextmanager
    def rereading(self, chunk: int) -> Iterator[None]:
        """What is read inside is a second reading of the prompt: it attends to all slots and, causally, to its own
        forward, and is not kept. What each slot got is noted, for the score rule `reread`.

        Args:
            chunk: tokens of each of its forwards.

        Raises:
            ValueError: the first prefill is over or has not begun; the prompt was not read by heads (`sp_prefill`).
        """
        self._check_first_prefill("a prompt is read a second time after the first and before it is compressed")
        if self._by_sequence:
            raise ValueError(
                f"sp_prefill ({self.ranks.parallel.sp_prefill}) must be ulysses to read a prompt a second time with sp "
                f"({self.ranks.sp.size})"
            )
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
        if self.in_forward:
            raise ValueError("finalize() was called in the middle of a forward")
        if self.phase == "decode":
            return
        if not self.num_seen_columns:
            raise ValueError(
                "finalize() was called before any token was seen: no forward of the model was given this cache. Read "
                "the prompt first, with past_key_values=cache"
            )
        if self.config.needs_reread and self.plans is None and not any(self.num_reread):
            raise ValueError(
                'score.rule "reread" ranks tokens by a second reading of the prompt, and there was none: call '
                "cache.reread(model, input_ids) before finalize() or generate()"
            )
        with self.ranks.counter.phase("finalize"):
            for index in self.full_layers:
                self.layers[index].complete_statistics()
            config, variances, highest = self._compressed_config, None, None
            if self.plans is None:
                variances = head_variances(
                    self._full().values(), config, self.num_seen, self.ranks, by_sequence=self._by_sequence
                )
            for index in self.full_layers:
                self.layers[index].finish_prefill()
            if self.plans is None:
                highest = head_counts(
                    self._full().values(), config, self.num_seen, self.num_kv_heads, self.ranks,
                    by_sequence=self._by_sequence,
                )  # fmt: skip
                if config.budget.per_head:
                    self._part_heads()
            self.plans = set_budgets(
                self._full().values(), self.plans, variances, highest, config, self.num_seen, self.ranks
            )
            # Of this prefill's tokens a step from before it knows nothing.
            self.phase, self.step = "decode", None
            moves = self.ranks.deals_tokens and not self._by_sequence and not self.ranks.by_heads
            in_arena = self.config.eviction_interval is not None and not moves
            self._arena_evictions = self._evictions().at_finalize(in_arena=in_arena)
            if moves:
                spread_layers(self.layers, self.num_seen, self.ranks)
                self._by_sequence = True
        self._placement = None

    def _part_heads(self) -> None:
        """Let each KV head of a layer be a layer of its own."""
        num_heads = self.num_kv_heads
        for index in self.full_layers:
            here = self.ranks.kv_heads(self.layers[index].store.shape[0], by_sequence=self._by_sequence)
            self.layers[index] = HeadwiseLayer(self.layers[index], here, num_heads)

    def _evict(self, slack: int) -> bool:
        """While decoding: evict what is `slack` slots or more over its budget; whether anything was."""
        return self._evictions().while_decoding(slack, self.step.positions, self._arena_evictions)

    def _evictions(self) -> LayerEvictions | ShardEvictions:
        kind = ShardEvictions if self._by_sequence else LayerEvictions
        return kind(self._full(), self.config, self.ranks, self.num_seen)

    def _full(self) -> dict[int, CompressedLayer]:
        """The layers that are compressed, by their index in the model."""
        return {index: self.layers[index] for index in self.full_layers}

    # ---- rows ----------------------------------------------------------------------------------------------------

    @in_own_mode
    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated (beam search, prompts reused by several rows)."""
        host = index.tolist()
        if not self.layers:
            return
        if not host:
            raise ValueError(f"no row was selected of the cache's {len(self.num_seen)}: others need a new cache")
        for row in host:
            if not 0 <= row < len(self.num_seen):
                raise ValueError(f"row {row} was selected, but the cache has {len(self.num_seen)} rows")
        for layer in self.layers:
            layer.select_rows(index)
        if self._arena_evictions is not None:
            self._arena_evictions = self._arena_evictions.select_rows(index)
            stores = [unit.store for unit in self._units() if unit.store.in_arena]
            for number, store in enumerate(stores):
                store.rebase(self._arena_evictions.arena.view(number))
        if self._placement is not None:
            self._placement.select_rows(host)
        self.num_seen = [self.num_seen[row] for row in host]
        self.columns.select_rows(host)
        self.num_reread = [self.num_reread[row] for row in host] if self.num_reread else []
        if self.plans:
            self.plans = [self.plans[row].copy() for row in host]


def _added(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Row by row."""
    return [one + other for one, other in zip(old, new, strict=True)]
