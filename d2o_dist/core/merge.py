"""Folding evicted tokens into kept ones (paper section 3.4, eq. 11-12; mass-preserving merge: docs/algorithm.md).

Shape legend: B rows, Hkv key/value heads, K kept slots, E evicted tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.core.types import Slots, stats_dtype

# Evicted tokens are compared in blocks, so that a similarity matrix never exceeds this many entries.
_BLOCK_ENTRIES = 1 << 22


def _unit(keys: Tensor) -> Tensor:
    """Keys over their norms, in accumulation dtype; a key of norm 0 stays 0, so that its cosines are 0."""
    keys = keys.to(stats_dtype(keys.dtype))
    norm = keys.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, keys / norm, 0)


def nearest_kept(evicted: Tensor, kept: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each evicted key to its nearest target, and which that is; ties: the lowest index.

    Args:
        evicted: [B, Hkv, E, D] keys; kept: [B, Hkv, K, D] keys; is_target: [B, Hkv, K] bool.

    Returns:
        similarity [B, Hkv, E] float32 (float64 for float64 keys), -inf where there is no target; index [B, Hkv, E].
    """
    left, right = _unit(evicted), _unit(kept).transpose(-1, -2)
    heads = evicted.shape[0] * evicted.shape[1]
    block = max(1, _BLOCK_ENTRIES // max(1, heads * kept.shape[2]))
    similarity, index = [], []
    for part in left.split(block, dim=2):
        cosine = (part @ right).masked_fill_(~is_target.unsqueeze(2), -torch.inf)
        best = cosine.amax(-1, keepdim=True)
        # argmax of a 0/1 tensor is not promised to be the first one; the smallest matching index is.
        where = torch.arange(kept.shape[2], device=kept.device).expand_as(cosine)
        index.append(torch.where(cosine == best, where, kept.shape[2]).amin(-1))
        similarity.append(best.squeeze(-1))
    return torch.cat(similarity, 2), torch.cat(index, 2)


def _sorts(device: torch.device) -> bool:
    """Whether rows must be sorted to be added up in order. A CPU takes one after the other anyway."""
    return device.type != "cpu"


def _add_up(rows: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """rows [n, ...] added up at `slots` [n], in order of n: [num_slots, ...], the same bits in every run.

    On CUDA `index_add` and `scatter_add` would add with atomics, in any order; `index_put` sorts.
    """
    out = rows.new_zeros(num_slots, *rows.shape[1:])
    return out.index_put((slots,), rows, accumulate=True) if _sorts(rows.device) else out.index_add(0, slots, rows)


def merges_keys(config: D2OConfig) -> bool:
    """Whether keys are averaged as well as values."""
    return config.merge in ("keys_values", "released")


def evicted_weight(evicted: Slots, similarity: Tensor, config: D2OConfig) -> Tensor:
    """[B, Hkv, E] what an evicted token weighs at its target, if it is merged."""
    if config.merge == "mass":
        return evicted.rates
    return similarity if config.merge == "released" else similarity.exp()


def own_weight(kept: Slots, config: D2OConfig) -> Tensor | float:
    """What a kept slot itself weighs: [B, Hkv, K], or one number for all."""
    if config.merge == "mass":
        return kept.rates.clamp_min(torch.finfo(kept.rates.dtype).tiny)
    return 1.0 if config.merge == "released" else config.self_weight


def add_mass(kept: Slots, total: Tensor, touched: Tensor, config: D2OConfig) -> Slots:
    """Slots [B, Hkv, K] that draw the attention `total` of all they stand for, where `touched`."""
    log_mass = (kept.log_mass + (total / own_weight(kept, config)).log()).clamp_max(config.max_log_mass)
    return kept.replace(
        rates=torch.where(touched, total, kept.rates), log_mass=torch.where(touched, log_mass, kept.log_mass)
    )


@dataclass(frozen=True)
class MergeSums:
    """What evicted tokens bring to each kept slot; the sums of several shards of evicted tokens add up.

    Attributes:
        count, weight: [B, Hkv, K] number and total weight of the tokens merged into the slot.
        keys, values: [B, Hkv, K, D] weighted sums; `keys` is None where the rule leaves keys as they are.
    """

    count: Tensor
    weight: Tensor
    keys: Tensor | None
    values: Tensor

    def pack(self) -> Tensor:
        """[B, Hkv, K, X], to be added up between ranks."""
        wide = [self.count.unsqueeze(-1), self.weight.unsqueeze(-1), self.values]
        return torch.cat(wide if self.keys is None else [*wide, self.keys], -1)

    def unpack(self, packed: Tensor) -> MergeSums:
        """The sums in a tensor that `pack` of sums like these made, perhaps with another K."""
        dim = self.values.shape[-1]
        keys = None if self.keys is None else packed[..., 2 + dim :]
        return MergeSums(packed[..., 0], packed[..., 1], keys, packed[..., 2 : 2 + dim])


def merge_sums(
    evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, config: D2OConfig, num_kept: int
) -> MergeSums:
    """The weighted sums of the gated evicted tokens at their targets, in the statistics' dtype, in order of index.

    Args:
        evicted: [B, Hkv, E, ...].
        similarity, target: [B, Hkv, E], from `nearest_kept`; merged: [B, Hkv, E] bool, from `open_gate`.
        num_kept: K, slots that targets point into.
    """
    dtype = stats_dtype(evicted.keys.dtype)
    batch, heads, length = target.shape
    rows = merged.reshape(-1).nonzero().squeeze(1)
    slots = target.reshape(-1)[rows] + rows // max(1, length) * num_kept
    weight = evicted_weight(evicted, similarity, config).reshape(-1)[rows]

    def sums(of_rows: Tensor) -> Tensor:
        return _add_up(of_rows, slots, batch * heads * num_kept).unflatten(0, (batch, heads, num_kept))

    def weighted(tensor: Tensor) -> Tensor:
        return sums(weight.unsqueeze(-1) * tensor.flatten(0, 2)[rows].to(dtype))

    return MergeSums(
        count=sums(torch.ones_like(weight)),
        weight=sums(weight),
        keys=weighted(evicted.keys) if merges_keys(config) else None,
        values=weighted(evicted.values),
    )


def apply_merge(kept: Slots, sums: MergeSums, config: D2OConfig) -> Slots:
    """Kept slots [B, Hkv, K, ...] with the sums folded in; a slot into which nothing is merged keeps its bits."""
    dtype = stats_dtype(kept.keys.dtype)
    touched = sums.count > 0

    def average(own_weight: Tensor | float, total: Tensor, old: Tensor, added: Tensor) -> Tensor:
        """`(own_weight * old + added) / total`, where anything was merged."""
        own = own_weight.unsqueeze(-1) if isinstance(own_weight, Tensor) else own_weight
        mean = (own * old.to(dtype) + added) / total.unsqueeze(-1)
        return torch.where(touched.unsqueeze(-1), mean.to(old.dtype), old)

    own = own_weight(kept, config)
    # The released rule takes the mean of all that meet, whatever their weights.
    total = own + (sums.count if config.merge == "released" else sums.weight)
    if config.merge == "mass":
        kept = add_mass(kept, total, touched, config)
    kept = kept.replace(values=average(own, total, kept.values, sums.values))
    if sums.keys is None:
        return kept
    return kept.replace(keys=average(own, total, kept.keys, sums.keys))


def merge_into(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, config: D2OConfig
) -> Slots:
    """Kept slots with the gated evicted tokens folded in. Positions and scores of the kept stay as they are.

    Args:
        kept: [B, Hkv, K, ...]; evicted: [B, Hkv, E, ...].
        similarity, target: [B, Hkv, E], from `nearest_kept`.
        merged: [B, Hkv, E] bool, from `open_gate`.

    Accumulates in float32 (float64 for a float64 cache) and stores in the cache's dtype. A slot into which nothing is
    merged keeps its bits.
    """
    if config.merge == "none":
        return kept
    sums = merge_sums(evicted, similarity, target, merged, config, kept.positions.shape[-1])
    return apply_merge(kept, sums, config)
