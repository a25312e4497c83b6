"""Merge rules: folding evicted tokens into kept ones (paper section 3.4, eq. 11-12; by mass: docs/algorithm.md).

Shape legend: B rows, Hkv key/value heads, K kept slots, E evicted tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2o_dist.fields.declare import flag, real
from d2o_dist.policy.gate import GATES, RELEASED_GATES, GateRule, Quantile, RowThreshold, Threshold
from d2o_dist.policy.rule import Rule, part, registry
from d2o_dist.policy.statistics import RATES
from d2o_dist.policy.targets import TARGETS, Kept, Tail, TargetRule
from d2o_dist.slots.slots import Slots, stats_dtype

# Evicted tokens are compared in blocks, so that a similarity matrix never exceeds this many entries.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class MergeRule(Rule):
    """What becomes of evicted tokens.

    Attributes:
        merges: whether any is folded into a kept one.
        averages_keys: whether keys are averaged as well as values.
        keeps_mass: whether a slot draws the attention of all it stands for, by a bias on its logit.
        plain_mean: whether a slot becomes the mean of all that meet there, whatever their weights.
        composes: whether a token that is merged into a slot which is itself merged later weighs there what it would
            have weighed at once.
        gate, targets: which are merged, and into which slots.
    """

    path: ClassVar[str] = "merge"
    merges: ClassVar[bool] = True
    averages_keys: ClassVar[bool] = False
    keeps_mass: ClassVar[bool] = False
    plain_mean: ClassVar[bool] = False
    composes: ClassVar[bool] = False
    gate: ClassVar[GateRule] = Threshold()
    targets: ClassVar[TargetRule] = Kept()

    def evicted_weight(self, evicted: Slots, similarity: Tensor) -> Tensor:
        """[B, Hkv, E] what an evicted token weighs at its target, if it is merged."""
        raise NotImplementedError

    def own_weight(self, kept: Slots) -> Tensor | float:
        """What a kept slot itself weighs: [B, Hkv, K], or one number for all."""
        raise NotImplementedError

    def add_mass(self, kept: Slots, total: Tensor, touched: Tensor) -> Slots:
        """The slots [B, Hkv, K] with the mass of what was folded in.

        Args:
            total: [B, Hkv, K] weight of all that a slot stands for, itself included; touched: bool, where any was.
        """
        return kept


@dataclass(frozen=True)
class Drop(MergeRule):
    """Evicted tokens are lost."""

    name: ClassVar[str] = "drop"
    merges: ClassVar[bool] = False
    composes: ClassVar[bool] = True


@dataclass(frozen=True)
class Average(MergeRule):
    """Values, and keys if asked, averaged with weights `exp(cosine)` (the paper).

    Attributes:
        keys: average keys too (the paper); values alone otherwise.
        self_weight: what a kept token weighs beside the `exp(cosine)` of those merged into it; `e` (the paper) is the
            weight of its own cosine of 1.
    """

    name: ClassVar[str] = "average"
    keys: bool = flag(True)
    self_weight: float = real(math.e, above=0)
    gate: GateRule = part(Threshold(), GATES)
    targets: TargetRule = part(Kept(), TARGETS)

    @property
    def averages_keys(self) -> bool:
        """As `MergeRule.averages_keys`."""
        return self.keys

    def evicted_weight(self, evicted: Slots, similarity: Tensor) -> Tensor:
        """As `MergeRule.evicted_weight`."""
        return similarity.exp()

    def own_weight(self, kept: Slots) -> float:
        """As `MergeRule.own_weight`."""
        return self.self_weight


@dataclass(frozen=True)
class Mass(MergeRule):
    """Values weighted by attention; the slot draws the attention of all it stands for.

    Attributes:
        max_log_mass: most that is added to the logit of a slot.
    """

    name: ClassVar[str] = "mass"
    statistics: ClassVar[frozenset[str]] = frozenset({RATES})
    keeps_mass: ClassVar[bool] = True
    composes: ClassVar[bool] = True
    max_log_mass: float = real(3.0, low=0)
    gate: GateRule = part(Quantile(), GATES)
    targets: TargetRule = part(Tail(), TARGETS)

    def evicted_weight(self, evicted: Slots, similarity: Tensor) -> Tensor:
        """As `MergeRule.evicted_weight`."""
        return evicted.rates

    def own_weight(self, kept: Slots) -> Tensor:
        """As `MergeRule.own_weight`."""
        return kept.rates.clamp_min(torch.finfo(kept.rates.dtype).tiny)

    def add_mass(self, kept: Slots, total: Tensor, touched: Tensor) -> Slots:
        """As `MergeRule.add_mass`."""
        log_mass = (kept.log_mass + (total / self.own_weight(kept)).log()).clamp_max(self.max_log_mass)
        return kept.replace(
            rates=torch.where(touched, total, kept.rates), log_mass=torch.where(touched, log_mass, kept.log_mass)
        )


@dataclass(frozen=True)
class Released(MergeRule):
    """The rule of the published code: the mean of a slot and of what is merged into it, scaled by its cosine."""

    name: ClassVar[str] = "released"
    averages_keys: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True
    gate: GateRule = part(RowThreshold(), RELEASED_GATES)

    def evicted_weight(self, evicted: Slots, similarity: Tensor) -> Tensor:
        """As `MergeRule.evicted_weight`."""
        return similarity

    def own_weight(self, kept: Slots) -> float:
        """As `MergeRule.own_weight`."""
        return 1.0


MERGES = registry(Mass, Average, Drop, Released)


def unit(keys: Tensor) -> Tensor:
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
    left, right = unit(evicted), unit(kept).transpose(-1, -2)
    heads = evicted.shape[0] * evicted.shape[1]
    block = max(1, _BLOCK_ENTRIES // max(1, heads * kept.shape[2]))
    similarity, index = [], []
    for rows in left.split(block, dim=2):
        cosine = (rows @ right).masked_fill_(~is_target.unsqueeze(2), -torch.inf)
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
    evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule, num_kept: int
) -> MergeSums:
    """The weighted sums of the gated evicted tokens at their targets, in the statistics' dtype, in order of index.

    Args:
        evicted: [B, Hkv, E, ...].
        similarity, target: [B, Hkv, E], from `nearest_kept`; merged: [B, Hkv, E] bool, from `GateRule.open`.
        num_kept: K, slots that targets point into.
    """
    dtype = stats_dtype(evicted.keys.dtype)
    batch, heads, length = target.shape
    rows = merged.reshape(-1).nonzero().squeeze(1)
    slots = target.reshape(-1)[rows] + rows // max(1, length) * num_kept
    weight = rule.evicted_weight(evicted, similarity).reshape(-1)[rows]

    def sums(of_rows: Tensor) -> Tensor:
        return _add_up(of_rows, slots, batch * heads * num_kept).unflatten(0, (batch, heads, num_kept))

    def weighted(tensor: Tensor) -> Tensor:
        return sums(weight.unsqueeze(-1) * tensor.flatten(0, 2)[rows].to(dtype))

    return MergeSums(
        count=sums(torch.ones_like(weight)),
        weight=sums(weight),
        keys=weighted(evicted.keys) if rule.averages_keys else None,
        values=weighted(evicted.values),
    )


def apply_merge(kept: Slots, sums: MergeSums, rule: MergeRule) -> Slots:
    """Kept slots [B, Hkv, K, ...] with the sums folded in; a slot into which nothing is merged keeps its bits."""
    dtype = stats_dtype(kept.keys.dtype)
    touched = sums.count > 0

    def average(own_weight: Tensor | float, total: Tensor, old: Tensor, added: Tensor) -> Tensor:
        """`(own_weight * old + added) / total`, where anything was merged."""
        own = own_weight.unsqueeze(-1) if isinstance(own_weight, Tensor) else own_weight
        mean = (own * old.to(dtype) + added) / total.unsqueeze(-1)
        return torch.where(touched.unsqueeze(-1), mean.to(old.dtype), old)

    own = rule.own_weight(kept)
    # The released rule takes the mean of all that meet, whatever their weights.
    total = own + (sums.count if rule.plain_mean else sums.weight)
    kept = rule.add_mass(kept, total, touched)
    kept = kept.replace(values=average(own, total, kept.values, sums.values))
    if sums.keys is None:
        return kept
    return kept.replace(keys=average(own, total, kept.keys, sums.keys))


def merge_into(
    kept: Slots, evicted: Slots, similarity: Tensor, target: Tensor, merged: Tensor, rule: MergeRule
) -> Slots:
    """Kept slots with the gated evicted tokens folded in. Positions and scores of the kept stay as they are.

    Args:
        kept: [B, Hkv, K, ...]; evicted: [B, Hkv, E, ...].
        similarity, target: [B, Hkv, E], from `nearest_kept`.
        merged: [B, Hkv, E] bool, from `GateRule.open`.

    Accumulates in float32 (float64 for a float64 cache) and stores in the cache's dtype. A slot into which nothing is
    merged keeps its bits.
    """
    if not rule.merges:
        return kept
    sums = merge_sums(evicted, similarity, target, merged, rule, kept.positions.shape[-1])
    return apply_merge(kept, sums, rule)
