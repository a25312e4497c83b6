"""A whole model's compressed cache for one batch: prefill, finalize, decode, and later turns.

It knows nothing of any model library: integrations hand it queries, keys and values layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o_dist.cache.layer import FullLayer, WindowLayer
from d2o_dist.cache.rows import Rows
from d2o_dist.compression.budgets import eviction_budget, row_log_weights, row_slots
from d2o_dist.compression.evict import GatherHeads, all_heads_at_hand, run_evictions
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.budget import check_total
from d2o_dist.core.compress import EvictionSteps, eviction_steps
from d2o_dist.core.types import LayerBudget
from d2o_dist.kernels.nearest_kept import nearest_kept


@dataclass
class RowPlan:
    """What one row's budgets derive from: set at its first finalize, read again at later ones."""

    log_weights: list[float]
    dispersions: list[float]
    num_tokens: int
    slots: list[int] = field(default_factory=list)


class CompressedCache:
    """All layers of one model for one batch of rows.

    Args:
        config: how to compress.
        windows: per layer of the model None (full attention, compressed) or its sliding window (kept as it is).
        gather_heads: brings together what the heads of all tensor-parallel ranks report; all heads are here by default.

    Attributes:
        num_seen: tokens seen by each row, padding not counted (the logical length).
        num_seen_columns: columns seen, padding included: what a padded batch's masks and ids are indexed by.
        phase: `prefill` until a decode step or `finalize`; `decode` after it.

    Raises:
        ValueError: protected layers or minima that exceed the total.
    """

    def __init__(
        self, config: D2OConfig, windows: list[int | None], gather_heads: GatherHeads = all_heads_at_hand
    ) -> None:
        self.config = config
        self.gather_heads = gather_heads
        self.windows = list(windows)
        self.full_layers = [index for index, window in enumerate(windows) if window is None]
        self._compressed_config = _on_full_layers(config, windows)
        check_total(self._compressed_config, len(self.full_layers))
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new batch."""
        self.layers: list[FullLayer | WindowLayer] = []
        self.num_seen: list[int] = []
        self.num_seen_columns = 0
        self.phase = "prefill"
        self.plans: list[RowPlan] | None = None
        self._next_layer = 0
        self._rows: Rows | None = None

    # ---- one forward ---------------------------------------------------------------------------------------------

    @property
    def in_forward(self) -> bool:
        """Whether a forward has begun and not reached its last layer."""
        return self._next_layer != 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """Append a chunk to one layer and attend from it. Layers come in order, 0 first.

        Args:
            q: [B, Hq, n, D]; k, v: [B, Hkv, n, D], after RoPE; n = 1 after a prefill is a decode step.
            mask: 2D [B, >= n], its last n columns are this chunk's; 0 marks padding. None: no padding.

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
        decoding = self.phase == "decode"
        step = self.layers[layer].decode if decoding else self.layers[layer].prefill
        out = step(q, k, v, scale, self._rows, self.num_seen)
        self._next_layer = layer + 1
        if self._next_layer == len(self.windows):
            self._end(k.shape[2])
        return out

    def _begin(self, k: Tensor, mask: Tensor | None) -> None:
        """Settle the phase and the rows of this forward."""
        batch, _, length, _ = k.shape
        if not self.layers:
            self.num_seen = [0] * batch
            self.layers = [
                FullLayer(batch, self.config) if window is None else WindowLayer(batch, window)
                for window in self.windows
            ]
        self._rows = Rows.of(batch, length, mask)
        # A prompt of one token is a prefill; so is anything before the first token was seen.
        if length == 1 and self.num_seen_columns > 0:
            self.finalize()
        else:
            self.phase = "prefill"

    def _end(self, length: int) -> None:
        """After the last layer: count the tokens, and evict what is due."""
        self._next_layer = 0
        self.num_seen = [old + new for old, new in zip(self.num_seen, self._rows.counts, strict=True)]
        self.num_seen_columns += length
        self._rows = None
        if self.phase == "decode" and self.config.eviction_interval is not None:
            self._evict(self.config.eviction_interval, finalize=False)

    # ---- compression ---------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """End the prefill: set the budgets and evict every layer to its own. A second call does nothing."""
        if self.in_forward:
            raise ValueError("finalize() was called in the middle of a forward")
        if self.phase == "decode":
            return
        if not self.num_seen_columns:
            raise ValueError("finalize() was called before any token was seen")
        self._set_budgets()
        for layer in self.full_layers:
            self.layers[layer].finish_prefill()
        self.phase = "decode"
        self._evict(1, finalize=True)

    def _set_budgets(self) -> None:
        config, count = self._compressed_config, len(self.full_layers)
        if not count:
            self.plans = []
            return
        layers = [self.layers[index] for index in self.full_layers]
        if self.plans is None:
            self.plans = []
            variances: Sequence[Tensor | None] = [None] * len(self.num_seen)
            if config.allocation == "dynamic" and config.needs_column_sums:
                rows = range(len(self.num_seen))
                at_hand = [torch.stack([layer.variances(row) for layer in layers], -1) for row in rows]
                # One exchange for the whole model: [B, h, L] -> [B, H, L].
                variances = self.gather_heads(torch.stack(at_hand)).transpose(1, 2).contiguous()
            for row, num_tokens in enumerate(self.num_seen):
                log_weights, dispersions = row_log_weights(variances[row], config, count)
                self.plans.append(RowPlan(log_weights, dispersions, num_tokens))
        for plan, num_tokens in zip(self.plans, self.num_seen, strict=True):
            plan.slots = row_slots(plan.log_weights, num_tokens, plan.slots or None, config)
            plan.num_tokens = num_tokens
        protected = config.protected(count)
        for index, layer in enumerate(layers):
            layer.slot_budgets = None if index in protected else [plan.slots[index] for plan in self.plans]

    def _evict(self, slack: int, *, finalize: bool) -> None:
        """Evict the rows of all layers that hold at least `slack` slots over their budget.

        At finalize one layer after the other, so that no more than one layer is held twice; while decoding, when little
        is held, all layers with one exchange between ranks.
        """
        due = [index for index in self.full_layers if self.layers[index].slot_budgets is not None]
        for batch in [[index] for index in due] if finalize else [due]:
            jobs = []
            for index in batch:
                layer = self.layers[index]
                device = layer.store.slots.positions.device
                job = eviction_budget(layer.slot_budgets, layer.store.kv_len, slack, self.config, device)
                if finalize:
                    # From here on the buffers never move: room for the budget and what gathers between evictions.
                    held = layer.store.kv_len if job is None else job[1]
                    capacity = max(*layer.slot_budgets, *held) + (self.config.eviction_interval or 0)
                    if job is None:
                        layer.store.reserve(capacity)
                if job is not None:
                    jobs.append((layer, *job))
            steps = [self._steps(layer, budget, finalize) for layer, budget, _ in jobs]
            for (layer, _, kv_len), (slots, state) in zip(jobs, run_evictions(steps, self.gather_heads), strict=True):
                layer.state = state
                layer.store.replace(slots, kv_len, capacity if finalize else None)

    def _steps(self, layer: FullLayer, budget: LayerBudget, finalize: bool) -> EvictionSteps:
        slots = layer.store.slots
        seen = torch.tensor(self.num_seen, device=slots.positions.device)
        return eviction_steps(
            slots, budget, layer.state, self.config, finalize=finalize, num_seen_tokens=seen, nearest=nearest_kept
        )

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
        self.num_seen = [self.num_seen[row] for row in host]
        if self.plans:
            plans = self.plans
            self.plans = [RowPlan(p.log_weights, p.dispersions, p.num_tokens, list(p.slots)) for p in
                          (plans[row] for row in host)]  # fmt: skip


def _on_full_layers(config: D2OConfig, windows: list[int | None]) -> D2OConfig:
    """The configuration with `protected_layers` counted among the compressed layers only.

    Layer indices in a configuration are the model's; sliding-window layers need no protection and take no part in
    the budget.
    """
    full = [index for index, window in enumerate(windows) if window is None]
    protected = config.protected(len(windows))
    return config.replace(protected_layers=tuple(n for n, index in enumerate(full) if index in protected))
