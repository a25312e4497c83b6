"""The three values that compression works on: what a layer holds, what it may hold, what it remembers.

Shape legend: B rows, Hkv key/value heads, S slots, D head dim of keys, Dv of values (the same in most models).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of scores, rates, similarities and accumulators for a cache of `dtype`: float64 stays, the rest float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Slots:
    """The slots of one layer. A slot whose position is -1 is unused; all heads of a row hold the same number.

    Attributes:
        keys: [B, Hkv, S, D], after RoPE, in the cache's dtype.
        values: [B, Hkv, S, Dv].
        positions: [B, Hkv, S] int64, index of the token in its own row, -1 on an unused slot.
        scores: [B, Hkv, S] float32 (float64 for a float64 cache): attention received, summed over the group; added up
            over queries, or with the score rule `reread` the most that any one query gave.
        rates: [B, Hkv, S]: recent attention received per query, summed over the group.
        log_mass: [B, Hkv, S]: added to the slot's logit; 0 until something is merged by mass.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    rates: Tensor
    log_mass: Tensor

    @property
    def live(self) -> Tensor:
        """[B, Hkv, S] bool: slots that hold a token."""
        return self.positions >= 0

    @property
    def kv_len(self) -> Tensor:
        """[B] int64: tokens held by each row (by each of its heads)."""
        return self.live[:, 0].sum(-1)

    def replace(self, **changes: Tensor) -> Slots:
        """A copy with some tensors exchanged."""
        return dataclasses.replace(self, **changes)

    def map(self, function) -> Slots:
        """`function` applied to each of the six tensors."""
        return Slots(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})

    @classmethod
    def of_heads(cls, parts: Sequence[Slots]) -> Slots:
        """The slots of all these heads."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))

    def for_merge(self, *, keys: bool) -> Slots:
        """What a merge reads of them; without `keys` these have no elements."""
        return self if keys else self.replace(keys=self.keys[..., :0])

    def take(self, index: Tensor, valid: Tensor) -> Slots:
        """The slots at `index` [B, Hkv, K] where `valid` [B, 1 or Hkv, K]; the others unused, with zeros."""
        valid = valid.expand_as(index)
        taken = self.map(lambda tensor: pick(tensor, index, valid))
        return taken.replace(positions=taken.positions.masked_fill_(~valid, -1))

    def in_order(self) -> Slots:
        """The same slots by ascending position, unused ones last."""
        order = self.positions.masked_fill(~self.live, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
        return self.take(order, self.live.gather(2, order))


def pick(tensor: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Of [B, Hkv, S, ...] those at `index` [B, Hkv, K] where `valid` [B, Hkv, K]; the others are zeros."""
    if tensor.dim() == 3:
        return tensor.gather(2, index).masked_fill_(~valid, 0)
    # Whole rows at once: a gather would look up every element by itself.
    if tensor.device.type != "cpu" or tensor.requires_grad:
        row = torch.arange(index.shape[0], device=index.device)[:, None, None]
        head = torch.arange(index.shape[1], device=index.device)[:, None]
        return tensor[row, head, index].masked_fill_(~valid.unsqueeze(-1), 0)
    # A head at a time half as long as by indices of all, and to hide what is there as long again.
    taken = tensor.new_empty(*index.shape, tensor.shape[3])
    for b, h in itertools.product(*map(range, index.shape[:2])):
        torch.index_select(tensor[b, h], 0, index[b, h], out=taken[b, h])
    return taken if bool(valid.all()) else taken.masked_fill_(~valid.unsqueeze(-1), 0)


def join_values(slots: Slots, latent: int | None) -> Slots:
    """Slots as they are stored: with `latent` the value has no tensor of its own, but is the first elements of the key.

    What became of it in a merge becomes of both. Slots that are so stored already stay as they are.
    """
    if latent is None:
        return slots
    keys, values = slots.keys, slots.values
    if values.shape[-1] and values.data_ptr() != keys.data_ptr():
        keys = torch.cat([values, keys[..., latent:]], -1)
    return slots.replace(keys=keys, values=keys.new_empty(*keys.shape[:-1], 0))


def part_values(slots: Slots, latent: int | None) -> Slots:
    """The inverse of `join_values`: with `latent` the value is a view of the key."""
    return slots if latent is None else slots.replace(values=slots.keys[..., :latent])


def unused_slots(
    batch: int, heads: int, capacity: int, keys: Tensor, values: Tensor, dtype: torch.dtype | None = None, *,
    is_empty: bool = False,
) -> Slots:  # fmt: skip
    """Slots that hold nothing: [B, Hkv, capacity, ...] in the dtype, device and last dims of these keys and values.

    Args:
        dtype: of the cache, where keys and values are stored in another one.
        is_empty: keys and values are not made zero, but will be written by whoever fills the slots, or makes them zero
            then: on a CPU memory that was not touched is not taken.
    """
    shape = batch, heads, capacity
    both = [(one.new_empty if is_empty else one.new_zeros)(*shape, one.shape[-1]) for one in (keys, values)]
    positions = torch.full(shape, -1, dtype=torch.int64, device=keys.device)
    statistics = torch.zeros(3, *shape, dtype=stats_dtype(dtype or keys.dtype), device=keys.device)
    return Slots(*both, positions, *statistics.unbind(0))


def compact(mask: Tensor, width: int) -> Tensor:
    """Indices of the first `width` True entries of [..., S], in order, in a [..., width] tensor; the rest is 0."""
    slots = mask.shape[-1]
    target = torch.where(mask, mask.cumsum(-1) - 1, width).clamp_max(width)
    index = torch.arange(slots, device=mask.device).expand_as(mask)
    out = torch.zeros(*mask.shape[:-1], width + 1, dtype=torch.int64, device=mask.device)
    return out.scatter_(-1, target, index)[..., :width]


def last_of(positions: Tensor, kv_len: Sequence[int], count: int) -> Tensor:
    """[B, h, count]: the last of `kv_len` positions of each row [B, h, >= kv_len]; -1 where there are fewer."""
    back = torch.arange(count, device=positions.device) - count
    place = torch.tensor(list(kv_len), device=positions.device)[:, None, None] + back
    place = place.expand(-1, positions.shape[1], -1)
    return positions.gather(-1, place.clamp_min(0)).masked_fill(place < 0, -1)


@dataclass(frozen=True)
class LayerBudget:
    """How many slots a layer may hold: `num_heavy` (sinks included) by score and the `num_recent` newest.

    Both are ints, or int64 tensors [B] when rows differ.

    most_kept, most_evicted: what the fullest row holds after an eviction, and the most that a row loses, where the host
    knows them; the device is asked otherwise.
    """

    num_heavy: int | Tensor
    num_recent: int | Tensor
    most_kept: int | None = None
    most_evicted: int | None = None

    @property
    def num_slots(self) -> int | Tensor:
        """Heavy and recent together: `S_l`."""
        return self.num_heavy + self.num_recent

    def rows(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(num_heavy, num_recent)` as int64 tensors [B]."""

        def expand(value: int | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=torch.int64).expand(batch)
            return torch.full((batch,), value, dtype=torch.int64, device=device)

        return expand(self.num_heavy), expand(self.num_recent)


@dataclass(frozen=True)
class D2OState:
    """What a layer remembers from one eviction to the next. `D2OState()` before the first.

    Attributes:
        threshold: [B] the moving similarity threshold; NaN for a row that has not evicted; None: no row has.
        num_merged: [B] int64, evicted tokens folded into kept ones so far, over all KV heads.
        num_dropped: [B] int64, evicted tokens lost so far, over all KV heads.
    """

    threshold: Tensor | None = None
    num_merged: Tensor | None = None
    num_dropped: Tensor | None = None

    @classmethod
    def cat(cls, states: Sequence[D2OState], rows: Sequence[int]) -> D2OState:
        """The states of several layers, or of several batches of `rows` rows, one after the other; what some have and
        others have not is NaN or 0 there."""

        def join(name: str, nothing: float) -> Tensor | None:
            values = [getattr(state, name) for state in states]
            known = next((value for value in values if value is not None), None)
            if known is None:
                return None
            return torch.cat([
                known.new_full((count,), nothing) if value is None else value
                for value, count in zip(values, rows, strict=True)
            ])  # fmt: skip

        return cls(join("threshold", torch.nan), join("num_merged", 0), join("num_dropped", 0))

    def split(self, rows: int) -> list[D2OState]:
        """The states of layers of `rows` rows: the inverse of `cat`."""
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)]
        count = next(len(tensor) for tensor in tensors if tensor is not None) // rows
        parts = [[None] * count if tensor is None else tensor.split(rows) for tensor in tensors]
        return [D2OState(*of_layer) for of_layer in zip(*parts, strict=True)]

    def map(self, function) -> D2OState:
        """`function` applied to each tensor that is set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return D2OState(**{name: None if value is None else function(value) for name, value in values.items()})

    def map_counts(self, function) -> D2OState:
        """`function` applied to both counts at once, [2, B], if they are set."""
        if self.num_merged is None:
            return self
        return D2OState(self.threshold, *function(torch.stack([self.num_merged, self.num_dropped])).unbind(0))
