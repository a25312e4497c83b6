"""What one compressed layer does in a decode step and at the end of a prompt, put together from the kernels and `core`.

Shape legend: Hq/Hkv heads, S slots, D head dim; one row.
"""

import torch
from torch import Tensor

from d2o_dist.cache.block import HeadBlock
from d2o_dist.cache.evictions import Evictions
from d2o_dist.cache.layer import Layer
from d2o_dist.comm.request import RequestRanks
from d2o_dist.core.softmax import Softmax
from d2o_dist.evict.budgets import eviction_budget
from d2o_dist.evict.exchange import ByHeads
from d2o_dist.evict.merge import merge_evicted
from d2o_dist.evict.prompt import Whole, evict_ordered
from d2o_dist.kernels.nearest_kept import nearest_kept
from d2o_dist.layout.heads import HeadLayout
from d2o_dist.policy.config import D2OConfig
from d2o_dist.slots.slots import D2OState, Slots, stats_dtype
from d2o_dist.slots.step import DecodeStep
from d2o_dist.slots.store import SlotStore


def random_slots(num_kv_heads: int, num_slots: int, head_dim: int, dtype: torch.dtype, device: str) -> Slots:
    """Slots of one row, all live, with random keys, values and statistics."""
    generator = torch.Generator().manual_seed(num_slots)
    shape = (1, num_kv_heads, num_slots)
    keys, values = (torch.randn(*shape, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    scores, rates = (torch.rand(*shape, generator=generator).to(device, stats_dtype(dtype)) for _ in range(2))
    positions = torch.arange(num_slots, device=device).expand(shape).contiguous()
    return Slots(keys, values, positions, scores, rates + 1e-6, torch.zeros_like(scores))


class DecodeLayer:
    """A layer of the cache at its budget, with room for what gathers between evictions: store, attend, score, evict.

    Attributes:
        block: its heads, whose slots lie in an arena of their own; seen: tokens seen.
        evictions: what evicts them, as in the cache.
    """

    def __init__(self, config: D2OConfig, block: HeadBlock, seen: int) -> None:
        self.block, self.config, self.seen = block, config, seen
        self._layer = Layer(block)
        self.evictions = self._of_cache().in_arena()
        window = config.statistics.rate_window
        self._step = DecodeStep([seen], [block.held], None, self.evictions.arena, window)

    @classmethod
    def full(cls, config: D2OConfig, heads: tuple[int, int], seen: int, head_dim: int, dtype: torch.dtype, device: str):
        """As after the eviction of a prompt of `seen` tokens at `config.keep_ratio`."""
        held = int(config.keep_ratio * seen)
        slots = random_slots(heads[1], held, head_dim, dtype, device)
        positions = torch.linspace(0, seen - 1, held, dtype=torch.float64, device=device).long()
        store = SlotStore.of(slots.replace(positions=positions.repeat(1, heads[1], 1)), [held])
        block = HeadBlock(config, HeadLayout(RequestRanks.alone(), store))
        block.slot_budgets = [held]
        return cls(config, block, seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A step without its end: it can be captured, and repeated, since the next one writes the same slot."""
        (step,) = self._step.begin([self.block.widths])
        return self.block.decode(q, k, v, Softmax(q.shape[-1] ** -0.5), step)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token: q [1, Hq, 1, D], k and v [1, Hkv, 1, D] -> [1, Hq, 1, D]. An eviction where one is due."""
        out = self.attend(q, k, v)
        self._step.end()
        self._count(1)
        self.evict()
        return out

    def _count(self, tokens: int) -> None:
        self.block.advance([tokens])
        self.seen += tokens

    def evict(self) -> None:
        """Down to the budget, if the layer is full. As in the cache, the device is asked nothing."""
        if self._of_cache().while_decoding(self._step.positions, self.evictions):
            self._step.hold([self.block.kv_len])

    def fill(self) -> None:
        """Take what lies in the free slots for the newest tokens, so that an eviction is due."""
        arena = self.evictions.arena
        count = self.block.store.capacity - self.block.kv_len[0]
        free = arena.start[:, None] + arena.free[:, arena.free.shape[1] - count :]
        arena.storage.positions[free] = self._step.positions + torch.arange(count, device=free.device)
        arena.taken += count
        self._step.positions.add_(count)
        self._count(count)
        self._step.hold([self.block.kv_len])

    def _of_cache(self) -> Evictions:
        return Evictions({0: self._layer}, self.config, RequestRanks.alone(), [self.seen])


def finalize_layer(slots: Slots, config: D2OConfig) -> Slots:
    """Select, find the nearest, merge: what the end of a prompt costs a layer after its attention."""
    held = slots.positions.shape[-1]
    budget, _ = eviction_budget([int(config.keep_ratio * held)], [held], config, slots.positions.device)
    whole, seen = Whole(slots, ByHeads.alone(), merge_evicted), torch.tensor([held], device=slots.positions.device)
    return evict_ordered(whole, budget, D2OState(), config, seen=seen, nearest=nearest_kept)[0]
