"""What one compressed layer does in a decode step and at the end of a prompt, put together from the kernels and `core`.

Shape legend: Hq/Hkv heads, S slots, D head dim; one row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.compression.evict import run_evictions
from d2o_dist.compression.merge import merge_evicted
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.compress import eviction_steps
from d2o_dist.core.types import D2OState, LayerBudget, Slots, stats_dtype
from d2o_dist.kernels.decode_attention import decode_with_logits
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.kernels.update_scores import update_scores


def random_slots(num_kv_heads: int, num_slots: int, head_dim: int, dtype: torch.dtype, device: str) -> Slots:
    """Slots of one row, all live, with random keys, values and statistics."""
    generator = torch.Generator().manual_seed(num_slots)
    shape = (1, num_kv_heads, num_slots)
    keys, values = (torch.randn(*shape, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    scores, rates = (torch.rand(*shape, generator=generator).to(device, stats_dtype(dtype)) for _ in range(2))
    positions = torch.arange(num_slots, device=device).expand(shape).contiguous()
    return Slots(keys, values, positions, scores, rates + 1e-6, torch.zeros_like(scores))


def budget_of(num_slots: int, config: D2OConfig) -> LayerBudget:
    """The budget of a layer that holds `num_slots`."""
    heavy = int(config.heavy_fraction * num_slots)
    return LayerBudget(heavy, num_slots - heavy)


@dataclass
class DecodeLayer:
    """A layer at its budget, with room for what gathers between evictions: append, attend, score, evict."""

    config: D2OConfig
    slots: Slots
    budget: LayerBudget
    held: int
    seen: int
    state: D2OState

    @classmethod
    def full(cls, config: D2OConfig, heads: tuple[int, int], seen: int, head_dim: int, dtype: torch.dtype, device: str):
        """As after the eviction of a prompt of `seen` tokens at `config.keep_ratio`."""
        held = int(config.keep_ratio * seen)
        slots = random_slots(heads[1], held + config.eviction_interval, head_dim, dtype, device)
        slots.positions[:, :, :held] = torch.linspace(0, seen - 1, held, dtype=torch.float64, device=device).long()
        slots.positions[:, :, held:] = -1
        return cls(config, slots, budget_of(held, config), held, seen, D2OState())

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q [1, Hq, D], k and v [1, Hkv, D] -> [1, Hq, D]. Every `eviction_interval` steps it evicts."""
        slots, new = self.slots, self.held
        slots.keys[:, :, new], slots.values[:, :, new], slots.positions[:, :, new] = k, v, self.seen
        for statistic in (slots.scores, slots.rates, slots.log_mass):
            statistic[:, :, new] = 0
        self.held, self.seen = new + 1, self.seen + 1
        live = slots.map(lambda x: x[:, :, : self.held])
        log_mass = live.log_mass if self.config.merge == "mass" else None
        out, lse, logits = decode_with_logits(q, live.keys, live.values, q.shape[-1] ** -0.5, log_mass=log_mass)
        update_scores(
            logits,
            lse,
            live.scores if self.config.needs_column_sums else None,
            live.rates if self.config.needs_rates else None,
            newest=torch.full((1,), new, device=q.device),
            rate_window=self.config.rate_window,
        )
        if self.held == slots.positions.shape[-1]:
            self.evict()
        return out

    def evict(self) -> None:
        """Down to the budget, in place."""
        seen = torch.tensor([self.seen], device=self.slots.positions.device)
        # The slots are in order of position already, so unlike `compress_layer` this does not copy them to make sure.
        steps = eviction_steps(
            self.slots, self.budget, self.state, self.config, finalize=False, num_seen_tokens=seen,
            nearest=nearest_kept, merge=merge_evicted,
        )  # fmt: skip
        ((kept, self.state),) = run_evictions([steps], lambda reports: reports)  # all heads are here
        self.held = kept.positions.shape[-1]
        for name in ("keys", "values", "positions", "scores", "rates", "log_mass"):
            getattr(self.slots, name)[:, :, : self.held] = getattr(kept, name)
        self.slots.positions[:, :, self.held :] = -1

    def fill(self) -> None:
        """Take what lies in the free slots for the newest tokens, so that an eviction is due."""
        count = self.slots.positions.shape[-1] - self.held
        self.slots.positions[:, :, self.held :] = torch.arange(
            self.seen, self.seen + count, device=self.slots.positions.device
        )
        self.held, self.seen = self.held + count, self.seen + count


def finalize_layer(slots: Slots, config: D2OConfig) -> Slots:
    """Select, find the nearest, merge: what the end of a prompt costs a layer after its attention."""
    num_kept = int(config.keep_ratio * slots.positions.shape[-1])
    steps = eviction_steps(
        slots, budget_of(num_kept, config), D2OState(), config, nearest=nearest_kept, merge=merge_evicted
    )
    ((kept, _),) = run_evictions([steps], lambda reports: reports)  # all heads are here
    return kept
