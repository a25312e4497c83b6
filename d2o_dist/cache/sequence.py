"""A whole model's compressed cache for one batch: prefill, finalize, decode, and later turns.

It knows nothing of any model library: integrations hand it queries, keys and values layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from d2o_dist.attention.exchange import HeadExchange
from d2o_dist.cache.headwise import HeadElsewhere, HeadwiseLayer
from d2o_dist.cache.layer import FullLayer, WindowLayer
from d2o_dist.cache.plans import RowPlan, on_full_layers, on_units
from d2o_dist.cache.rows import Rows
from d2o_dist.cache.sharded import DealtChunk, ShardedLayer
from d2o_dist.cache.sharded_window import ShardedWindowLayer
from d2o_dist.cache.step import DecodeStep, LayerStep
from d2o_dist.comm.deal import Deal, Placement
from d2o_dist.comm.request import RequestRanks
from d2o_dist.comm.shard import Contiguous, Zigzag
from d2o_dist.compression.agree import check_agreement
from d2o_dist.compression.budgets import eviction_budget, highest_of_heads, row_log_weights, row_slots
from d2o_dist.compression.evict import run_evictions, steps_in_place
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.compression.shard_evict import evict_shards
from d2o_dist.compression.shard_finalize import finalize_shard
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.budget import check_total
from d2o_dist.core.compress import EvictionSteps, eviction_steps
from d2o_dist.core.select import rank_scores
from d2o_dist.core.types import LayerBudget
from d2o_dist.kernels.backend import cuda_leaves
from d2o_dist.kernels.nearest_kept import nearest_kept


class CompressedCache:
    """All layers of one model for one batch of rows.

    Args:
        config: how to compress.
        windows: per layer of the model None (full attention, compressed) or its sliding window (kept as it is).
        ranks: those that share the request; this process alone by default.

    Attributes:
        num_seen: tokens seen by each row, padding not counted (the logical length).
        num_seen_columns: columns seen, padding included: what a padded batch's masks and ids are indexed by.
        phase: `prefill` until a decode step or `finalize`; `decode` after it.
        num_reread: tokens of each row that were read a second time.
        dealt: the chunk that was dealt last, if any.
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
        check_total(self._compressed_config, len(self.full_layers))
        self._check_shared(config)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new batch."""
        self.layers: list[FullLayer | HeadwiseLayer | WindowLayer | ShardedLayer | ShardedWindowLayer] = []
        self.num_seen: list[int] = []
        self.num_reread: list[int] = []
        self._rereading = False
        self.num_seen_columns = 0
        self.phase = "prefill"
        self.plans: list[RowPlan] | None = None
        self._next_layer = 0
        self._rows: Rows | None = None
        self.dealt: Deal | None = None
        self._deal_waits = False
        self._placement: Placement | None = None
        self._forward: DealtChunk | HeadExchange | None = None
        self.step: DecodeStep | None = None
        self._layer_steps: list[list[LayerStep]] | None = None
        self._step_announced = False
        # Whether every rank holds a part of the slots of every head, rather than all slots of some heads.
        self._by_sequence = self.ranks.deals_tokens and self.ranks.parallel.sp_prefill != "ulysses"

    def adopt(self, config: D2OConfig) -> None:
        """Compress as `config` says what was read under another configuration.

        What a prefill gathers does not depend on how the cache is compressed afterwards: one prompt, read once into a
        cache and copied, serves many configurations.

        Raises:
            ValueError: the first prefill is over or has not begun, or did not gather what `config` needs.
        """
        if self.phase != "prefill" or self.plans is not None or not self.num_seen_columns or self.in_forward:
            raise ValueError(
                f"only a cache in its first prefill can change its configuration; this one is in phase {self.phase} "
                f"and has seen {self.num_seen_columns} tokens"
            )
        for name in ("needs_column_sums", "needs_rates"):
            if getattr(config, name) and not getattr(self.config, name):
                raise ValueError(
                    f"the new configuration {name.replace('_', ' ')}, and the prefill did not gather them"
                )
        if config.needs_reread and not any(self.num_reread):
            raise ValueError("the new configuration needs a second reading of the prompt, and there was none")
        if config.needs_reread and config.reread_chunk != self.config.reread_chunk:
            raise ValueError(
                f"reread_chunk ({config.reread_chunk}) must be the {self.config.reread_chunk} of the second reading"
            )
        if config.needs_column_sums and config.query_sample != self.config.query_sample:
            raise ValueError(
                f"the new configuration takes column sums from {_queries(config)}, and the prefill took them from "
                f"{_queries(self.config)}"
            )
        if config.needs_rates and config.rate_window > self.config.rate_window:
            raise ValueError(
                f"rate_window ({config.rate_window}) must be at most the {self.config.rate_window} of the prefill"
            )
        compressed = on_full_layers(config, self.windows)
        check_total(compressed, len(self.full_layers))
        self._check_shared(config)
        self.config, self._compressed_config = config, compressed
        for index in self.full_layers:
            self.layers[index].adopt(config)

    def _check_shared(self, config: D2OConfig) -> None:
        if self.ranks.deals_tokens and not config.by_layer:
            raise ValueError(
                f"sp ({self.ranks.sp.size}) must be 1 with selection reread, allocation ranked or budget_per head: "
                f"given are {config.selection}, {config.allocation} and {config.budget_per}; tp may be more"
            )

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
    def in_forward(self) -> bool:
        """Whether a forward has begun and not reached its last layer."""
        return self._next_layer != 0

    def deal(self, counts: Sequence[int]) -> Deal:
        """Announce the next forward: a chunk of `counts` tokens a row, spread over the sequence ranks.

        The forward then takes this rank's part: [B, H, deal.width, D], each row's tokens in its last columns.

        Raises:
            ValueError: rows other than those of this batch, or no token at all.
        """
        if self.layers and len(counts) != len(self.num_seen):
            raise ValueError(f"a chunk of {len(counts)} rows was dealt, but the cache has {len(self.num_seen)}")
        if not counts or max(counts) < 1:
            raise ValueError(f"a chunk must have a token, but its rows have {list(counts)}")
        rule = Zigzag if self._by_sequence else Contiguous
        self.dealt, self._deal_waits = Deal.of(counts, rule, self.ranks.sp.size, self.ranks.sp.rank), True
        return self.dealt

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Append a chunk to one layer and attend from it. Layers come in order, 0 first.

        Args:
            q: [B, Hq, n, D]; k, v: [B, Hkv, n, D], after RoPE; n = 1 after a prefill is a decode step. Of a chunk that
                was dealt: this rank's part.
            mask: 2D [B, >= n], its last n columns are this chunk's; 0 marks padding. None: no padding. Of a chunk that
                was dealt, and of a step that was announced, it is not read.

        Returns:
            [B, Hq, n, D] in the dtype of q; zeros at padding.
        """
        if layer != self._next_layer:
            raise ValueError(
                f"layer {layer} attends, but layer {self._next_layer} was expected: a forward was broken off, or the "
                "model's layers do not all use this cache. Make a new cache"
            )
        if layer == 0:
            self._begin(k, mask)
        with self.ranks.counter.phase(self.phase):
            out = self._attend(self.layers[layer], q, k, v, scale)
        self._next_layer = layer + 1
        if self._next_layer == len(self.windows):
            self._end(k.shape[2])
        return out

    def _attend(self, layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One layer's step, where the tokens or heads of this forward are wanted."""
        ranks, forward = self.ranks, self._forward
        if self._rereading:
            return layer.reread(q, k, v, scale, self._rows)
        if isinstance(forward, DealtChunk):
            return layer.prefill(q, k, v, scale, forward, self.num_seen)
        if isinstance(forward, HeadExchange):
            out = layer.prefill(*forward.to_heads(q, k, v), scale, self._rows, self.num_seen)
            return forward.to_tokens(out)
        if self._layer_steps is None:
            return layer.prefill(q, k, v, scale, self._rows, self.num_seen)
        steps = self._layer_steps[self._next_layer]
        if not ranks.deals_tokens or self._by_sequence:
            return layer.decode(q, k, v, scale, *steps)
        mine = (ranks.my_heads(tensor) for tensor in (q, k, v))
        return ranks.join_heads(layer.decode(*mine, scale, *steps))

    def _begin(self, k: Tensor, mask: Tensor | None) -> None:
        """Settle the phase and the rows of this forward."""
        batch, _, length, _ = k.shape
        if self._rereading:
            self._rows, self._forward = Rows.of(batch, length, mask), None
            return
        deal = self.dealt if self._deal_waits else None
        self._deal_waits = False
        if deal is None and self.ranks.deals_tokens and (length > 1 or not self.num_seen_columns):
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
            self.num_seen = [0] * batch
            self.layers = [self._make_layer(batch, window) for window in self.windows]
        self._forward = self._layer_steps = None
        # A prompt of one token is a prefill; so is anything before the first token was seen.
        if length == 1 and self.num_seen_columns > 0 and deal is None:
            if not self._step_announced:
                rows = Rows.of(batch, length, mask)
                self._open_step(None if rows.index is None else [bool(count) for count in rows.counts])
            steps = iter(self.step.begin())
            self._layer_steps = [[next(steps) for _ in layer.units] for layer in self.layers]
            return
        if self._step_announced:
            raise ValueError(f"a decode step was announced, but a chunk of {length} columns came")
        self._begin_prefill(batch)
        if deal is None or not self.ranks.deals_tokens:
            self._rows = Rows.of(batch, length, mask if deal is None else deal.mask())
            return
        self._rows = Rows.first(deal.counts)
        if self._by_sequence:
            self._placement.add(deal)
            self._forward = DealtChunk(deal, self._placement, Rows.of(batch, length, deal.mask()))
        else:
            self._forward = HeadExchange(self.ranks, deal)

    def _make_layer(self, batch: int, window: int | None):
        if self._by_sequence:
            return (
                ShardedLayer(batch, self.config, self.ranks)
                if window is None
                else ShardedWindowLayer(batch, window, self.ranks)
            )
        return FullLayer(batch, self.config, self.ranks) if window is None else WindowLayer(batch, window)

    def _begin_prefill(self, batch: int) -> None:
        if self._placement is None or self.phase != "prefill":
            self._placement = Placement(batch, self.ranks.sp.size)
            if self._by_sequence:
                for layer in self.layers:
                    layer.begin_prefill()
        self.phase = "prefill"

    def _end(self, length: int) -> None:
        """After the last layer: count the tokens, and evict what is due."""
        self._next_layer = 0
        if self._layer_steps is not None:
            self.step.end()
            self._layer_steps = None
            if not self._step_announced:
                self._close_step()
            return
        if self._rereading:
            self.num_reread = [old + new for old, new in zip(self.num_reread, self._rows.counts, strict=True)]
            self._rows = None
            return
        self.num_seen = [old + new for old, new in zip(self.num_seen, self._rows.counts, strict=True)]
        self.num_seen_columns += length if self._forward is None else self._rows.length
        self._rows = self._forward = None

    # ---- one decode step -----------------------------------------------------------------------------------------

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
        self._step_announced = True
        return self.step

    def end_step(self) -> None:
        """After the forward or the replay of an announced step: count the tokens, and evict what is due."""
        assert self._step_announced and not self.in_forward
        self._step_announced = False
        self._close_step()

    def abandon_step(self) -> None:
        """Take back an announced step whose forward was recorded and not run, as far as it came."""
        self._step_announced, self._next_layer, self._layer_steps = False, 0, None

    def _open_step(self, present: Sequence[bool] | None) -> None:
        self.finalize()
        units = self._units()
        for unit in units:
            unit.make_room()
        if present is not None and all(present):
            present = None
        buffers = [unit.store.buffers for unit in units]
        if self.step is None or not self.step.fits(buffers, present):
            self.step = DecodeStep(self.num_seen, [unit.kv_len for unit in units], buffers, present)
        self.step.choose(present)

    def _units(self) -> list[FullLayer | WindowLayer | ShardedLayer]:
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
        self.num_seen = [old + new for old, new in zip(self.num_seen, counts, strict=True)]
        self.num_seen_columns += 1
        if self.config.eviction_interval is not None:
            with self.ranks.counter.phase("evict"):
                moved.append(self._evict(self.config.eviction_interval))
        if any(moved):
            self.step.hold([unit.kv_len for unit in self._units()])

    @contextmanager
    def rereading(self) -> Iterator[None]:
        """What is read inside is a second reading of the prompt: it attends to all slots and, causally, to its own
        forward, and is not kept. What each slot got is noted, for `selection="reread"`.

        Raises:
            ValueError: the first prefill is over or has not begun; ranks share the tokens of the request.
        """
        if self.phase != "prefill" or self.plans is not None or not self.num_seen_columns or self.in_forward:
            raise ValueError(
                f"a prompt is read a second time after the first and before it is compressed; this cache is in phase "
                f"{self.phase} and has seen {self.num_seen_columns} tokens"
            )
        if self.ranks.deals_tokens:
            raise ValueError(f"sp ({self.ranks.sp.size}) must be 1 to read a prompt a second time")
        self.num_reread = self.num_reread or [0] * len(self.num_seen)
        self._rereading = True
        try:
            yield
        finally:
            self._rereading = False

    # ---- compression ---------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """End the prefill: set the budgets and evict every layer to its own. A second call does nothing."""
        if self.in_forward:
            raise ValueError("finalize() was called in the middle of a forward")
        if self.phase == "decode":
            return
        if not self.num_seen_columns:
            raise ValueError("finalize() was called before any token was seen")
        if self.config.needs_reread and self.plans is None and not any(self.num_reread):
            raise ValueError(
                'selection "reread" ranks tokens by a second reading of the prompt, and there was none: call '
                "cache.reread(model, input_ids) before finalize() or generate()"
            )
        with self.ranks.counter.phase("finalize"):
            for index in self.full_layers:
                self.layers[index].complete_statistics()
            variances = self._variances() if self.plans is None else None
            for index in self.full_layers:
                self.layers[index].finish_prefill()
            highest = self._highest() if self.plans is None else None
            if self.config.budget_per == "head" and self.plans is None:
                self._part_heads()
            self._set_budgets(variances, highest)
            # Of this prefill's tokens a step from before it knows nothing.
            self.phase, self.step = "decode", None
            if self._by_sequence:
                self._finalize_shards()
            else:
                self._finalize_layers()
        self._placement = None

    def _part_heads(self) -> None:
        """Let each KV head of a layer be a layer of its own."""
        num_heads = self.num_kv_heads
        here = self.ranks.kv_heads(self.layers[0].store.shape[0], by_sequence=self._by_sequence)
        for index in self.full_layers:
            self.layers[index] = HeadwiseLayer(self.layers[index], here, num_heads)

    def _set_budgets(self, variances: Tensor | None, highest: Tensor | None) -> None:
        """Of all that has a budget of its own, on other ranks too: all ranks derive the same."""
        if not self.full_layers:
            self.plans = []
            return
        budgeted = [one for index in self.full_layers for one in self.layers[index].budgeted]
        config = on_units(self._compressed_config, len(budgeted) // len(self.full_layers))
        count = len(budgeted)
        if self.plans is None:
            self.plans = []
            for row, num_tokens in enumerate(self.num_seen):
                log_weights, dispersions = row_log_weights(
                    None if variances is None else variances[row].reshape(count, -1), config, count,
                    None if highest is None else highest[row].reshape(count, -1).sum(-1).tolist(),
                )  # fmt: skip
                self.plans.append(RowPlan(log_weights, dispersions, num_tokens))
        for plan, num_tokens in zip(self.plans, self.num_seen, strict=True):
            plan.slots = row_slots(plan.log_weights, num_tokens, plan.slots or None, config)
            plan.num_tokens = num_tokens
        protected = config.protected(count)
        for index, one in enumerate(budgeted):
            one.slot_budgets = None if index in protected else [plan.slots[index] for plan in self.plans]

    def _highest(self) -> Tensor | None:
        """[B, L, Hkv] how many of the model's highest ranked tokens each KV head has, at the end of the first prefill.
        None where no budget depends on it."""
        if self.config.allocation != "ranked" or self.config.keeps_everything or not self.full_layers:
            return None
        layers = [self.layers[index] for index in self.full_layers]
        rankings = [
            rank_scores(layer.store.slots, self.config, finalize=True, num_seen_tokens=self._seen(layer))
            for layer in layers
        ]
        return highest_of_heads(
            rankings, [layer.store.slots.live for layer in layers], self.num_seen, self.num_kv_heads, self.config,
            self.ranks, by_sequence=self._by_sequence,
        )  # fmt: skip

    def _variances(self) -> Tensor | None:
        """[B, L, Hq] variance of the column sums of all query heads of the model: one exchange for all layers. None
        where no budget depends on them."""
        config, layers = self._compressed_config, [self.layers[index] for index in self.full_layers]
        if config.allocation != "dynamic" or not config.needs_column_sums or not layers:
            return None
        rows = range(len(self.num_seen))
        squares = torch.stack([torch.stack([layer.squared_deviations(row) for layer in layers], -1) for row in rows])
        if self._by_sequence:
            squares = self.ranks.sp.sum_in_rank_order(squares)
        divisors = torch.tensor([max(seen - 1, 1) for seen in self.num_seen], device=squares.device)
        variances = self.ranks.gather_query_heads(self._whole_heads(squares / divisors[:, None, None]))
        return variances.transpose(1, 2).contiguous()

    def _whole_heads(self, tensor: Tensor) -> Tensor:
        """[B, h, ...] of the heads at hand -> those of the tensor rank."""
        return tensor if self._by_sequence else self.ranks.join_heads(tensor)

    def _gather_reports(self, reports: Tensor) -> Tensor:
        """[B, h, X] of the KV heads at hand -> [B, H, X] of the whole layer, the same on every rank. A head that has a
        budget of its own is all of its layer."""
        if self.config.budget_per == "head":
            return reports
        return self.ranks.gather_kv_heads(self._whole_heads(reports))

    def _finalize_layers(self) -> None:
        """One layer after the other, so that no more than one is held twice."""
        for index in self.full_layers:
            for unit in self.layers[index].units:
                if unit.slot_budgets is not None:
                    self._finalize_unit(index, unit)
        for head in self._elsewhere():
            head.evict(1)
        self._check_heads()
        if self.ranks.deals_tokens and not self.ranks.by_heads:
            # Compressed first, then moved: from all slots of some heads to some slots of all heads.
            for index, window in enumerate(self.windows):
                if window is None:
                    self.layers[index] = ShardedLayer.from_heads(self.layers[index], self.num_seen, self.ranks)
                else:
                    self.layers[index] = ShardedWindowLayer.from_heads(self.layers[index], self.ranks)
            self._by_sequence = True

    def _finalize_unit(self, index: int, layer: FullLayer) -> None:
        job = eviction_budget(layer.slot_budgets, layer.kv_len, 1, self.config, self._device(layer))
        held = layer.kv_len if job is None else job[1]
        # From here on the buffers never move: room for the budget and what gathers between evictions.
        capacity = max(*layer.slot_budgets, *held) + (self.config.eviction_interval or 0)
        if job is None:
            layer.store.reserve(capacity)
            return
        budget, kv_len = job
        steps = [self._steps(layer, budget, self._seen(layer), finalize=True)]
        [(slots, layer.state)] = run_evictions(steps, self._gather_reports)
        layer.store.replace(slots, kv_len, capacity)
        self._check({index: [layer.store.slots.positions]})

    def _finalize_shards(self) -> None:
        interval = self.config.eviction_interval or 0
        for index in self.full_layers:
            layer = self.layers[index]
            if layer.slot_budgets is None:
                layer.settle_whole(self.num_seen)
                continue
            slots = layer.slots_for_finalize()
            job = eviction_budget(layer.slot_budgets, layer.kv_len, 1, self.config, self._device(layer))
            # No row is due: a budget of all that is held evicts nothing, and the shards are made level all the same.
            budget, kv_len = (LayerBudget(max(layer.kv_len), 0), layer.kv_len) if job is None else job
            shard, state = finalize_shard(
                slots, budget, layer.state, self.config, self.ranks, num_seen_tokens=self._seen(layer),
                nearest=nearest_kept, room=max(*layer.slot_budgets, *kv_len) + interval,
            )  # fmt: skip
            layer.settle(shard, state, kv_len, self.num_seen)
            self._check({index: [shard.positions, shard.held]})

    def _evict(self, slack: int) -> bool:
        """While decoding: evict the rows of all layers that hold `slack` slots or more over their budget.

        All layers with one exchange between ranks, since little is held. Returns whether any row was due.
        """
        jobs = []
        due_elsewhere = [head.evict(slack) for head in self._elsewhere()]
        units = [(index, unit) for index in self.full_layers for unit in self.layers[index].units]
        for index, layer in units:
            if layer.slot_budgets is not None:
                job = eviction_budget(layer.slot_budgets, layer.kv_len, slack, self.config, self._device(layer))
                if job is not None:
                    jobs.append((index, layer, *job))
        if not jobs:
            if any(due_elsewhere):
                self._check_heads()
            return False
        if self._by_sequence:
            shards = [
                layer.job([old - new for old, new in zip(layer.kv_len, kv_len, strict=True)], self.num_seen)
                for _, layer, _, kv_len in jobs
            ]
            evictions = evict_shards(
                shards, self.config, self.ranks, num_seen_tokens=self._seen(jobs[0][1]), nearest=nearest_kept
            )
            for (_, layer, _, kv_len), eviction in zip(jobs, evictions, strict=True):
                layer.take_eviction(eviction, kv_len)
            self._check({job[0]: [one.victims, one.held] for job, one in zip(jobs, evictions, strict=True)})
            return True
        steps = [
            self._steps_in_place(layer, kv_len) or self._steps(layer, budget, self.step.positions, finalize=False)
            for _, layer, budget, kv_len in jobs
        ]
        results = run_evictions(steps, self._gather_reports)
        for (_, layer, _, kv_len), (slots, state) in zip(jobs, results, strict=True):
            layer.state = state
            layer.store.replace(slots, kv_len)
        self._check({index: [layer.store.slots.positions] for index, layer, _, _ in jobs})
        self._check_heads()
        return True

    def _steps_in_place(self, layer: FullLayer, kv_len: list[int]) -> EvictionSteps | None:
        if self.config.budget_per == "head":
            cuda_leaves("evictions of heads with budgets of their own")
            return None
        alone = self.ranks.tp.size == 1 and not self.ranks.deals_tokens
        return steps_in_place(
            layer.store.slots, layer.state, self.config, held=layer.kv_len, kept=kv_len, num_seen=self.num_seen,
            all_heads_here=alone,
        )  # fmt: skip

    def _steps(self, layer: FullLayer, budget: LayerBudget, seen: Tensor, *, finalize: bool) -> EvictionSteps:
        return eviction_steps(
            layer.store.slots, budget, layer.state, self.config, finalize=finalize,
            num_seen_tokens=seen, nearest=nearest_kept, merge=merge_evicted,
        )  # fmt: skip

    def _seen(self, layer: FullLayer | ShardedLayer) -> Tensor:
        return torch.tensor(self.num_seen, device=self._device(layer))

    @staticmethod
    def _device(layer: FullLayer | ShardedLayer) -> torch.device:
        return layer.store.slots.positions.device

    def _check(self, positions: dict[int, list[Tensor]]) -> None:
        """With `check_replicas`: compare what was just decided between the ranks."""
        if self.ranks.parallel.check_replicas and self.config.budget_per == "layer":
            thresholds = {index: self.layers[index].state.threshold for index in positions}
            check_agreement(thresholds, positions, self.ranks, by_sequence=self._by_sequence)

    def _check_heads(self) -> None:
        """As `_check`, of all layers at once, where heads have budgets of their own: which of them are due differs from
        rank to rank. All ranks know the lengths of all heads; those with copies of a head, its slots too."""
        if self.ranks.parallel.check_replicas and self.config.budget_per == "head":
            layers = {index: self.layers[index] for index in self.full_layers}
            lengths = {
                index: torch.tensor([[head.kv_len, head.slot_budgets or head.kv_len] for head in layer.budgeted])
                for index, layer in layers.items()
            }
            positions = {
                index: [t for unit in layer.units for t in (unit.store.slots.positions, unit.state.threshold)]
                for index, layer in layers.items()
            }
            check_agreement(lengths, positions, self.ranks, by_sequence=False, what="lengths or budgets of heads")

    # ---- rows ----------------------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor) -> None:
        """Rows `index`, in that order, repeated where repeated (beam search, prompts reused by several rows)."""
        host = index.tolist()
        if not self.layers:
            return
        for row in host:
            if not 0 <= row < len(self.num_seen):
                raise ValueError(f"row {row} was selected, but the cache has {len(self.num_seen)} rows")
        for layer in self.layers:
            layer.select_rows(index)
        if self._placement is not None:
            self._placement.select_rows(host)
        self.num_seen = [self.num_seen[row] for row in host]
        self.num_reread = [self.num_reread[row] for row in host] if self.num_reread else []
        if self.plans:
            self.plans = [self.plans[row].copy() for row in host]


def _queries(config: D2OConfig) -> str:
    """Which queries column sums are taken from, in words."""
    sample = config.query_sample
    return "all queries" if sample is None else f"one query in {sample.stride} (all within {sample.near} tokens)"
