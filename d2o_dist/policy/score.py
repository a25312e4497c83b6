"""Score rules: what slots are ranked by, higher is kept first (paper section 3.3).

Shape legend: B rows, Hkv key/value heads, S slots in order of position, unused ones (position -1) last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2o_dist.fields.declare import choice, flag, integer, real
from d2o_dist.policy.rule import Rule, registry
from d2o_dist.policy.statistics import COLUMN_SUMS, PEAKS, RATES
from d2o_dist.slots.slots import Slots

# Accumulated attention is divided by the age of a token where it stands beside a rate, but by no less than this.
MIN_AGE = 32


@dataclass(frozen=True)
class ScoreRule(Rule):
    """What slots rank by."""

    path: ClassVar[str] = "score"

    def pooled_rates(self, slots: Slots, num_sink_tokens: int) -> Tensor:
        """The rates [B, Hkv, S] that slots rank by at the end of a prompt, where those of other slots count."""
        return slots.rates

    @property
    def keeps_pooled_rates(self) -> bool:
        """Whether what stays goes on with its pooled rate, and ranks by it while decoding."""
        return False

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """What slots are ranked by: [B, Hkv, S].

        Args:
            rates: [B, Hkv, S], pooled or not; num_seen_tokens: [B] int64.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Accumulated(ScoreRule):
    """Attention that a token received from all queries so far (the paper, H2O).

    Attributes:
        mean: divide it by the number of queries that could see the token, so that early tokens do not rank high by
            their age alone.
    """

    name: ClassVar[str] = "accumulated"
    mean: bool = flag(False)
    # Rates are kept beside the sums: they cost little and are reported.
    statistics: ClassVar[frozenset[str]] = frozenset({COLUMN_SUMS, RATES})

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """As `ScoreRule.rank`."""
        return mean_attention(slots, num_seen_tokens) if self.mean else slots.scores


@dataclass(frozen=True)
class _LastQueries(ScoreRule):
    """Attention from the last queries of the prompt, then its decaying average.

    Attributes:
        add_accumulated: add to that the accumulated attention over the token's age.
    """

    add_accumulated: bool = flag(False)

    @property
    def statistics(self) -> frozenset[str]:
        """As `Rule.statistics`."""
        return frozenset({RATES, COLUMN_SUMS} if self.add_accumulated else {RATES})

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """As `ScoreRule.rank`."""
        if not self.add_accumulated:
            return rates
        return rates + mean_attention(slots, num_seen_tokens)


@dataclass(frozen=True)
class Window(_LastQueries):
    """Rates of the last queries, max-pooled over neighbours at the end of a prompt (SnapKV).

    Attributes:
        pool: neighbours that are pooled over, the token itself among them; odd.
        pool_side: `both`: as many of them before the token as after it; `after`: those before it, so that the
            `pool - 1` tokens after a peak of attention are kept with it, and none before it.
    """

    name: ClassVar[str] = "window"
    pool: int = integer(7, low=1, odd=True)
    pool_side: str = choice("both", "both", "after")

    def pooled_rates(self, slots: Slots, num_sink_tokens: int) -> Tensor:
        """As `ScoreRule.pooled_rates`."""
        return max_pool_positions(slots.rates, slots.positions, self.pool, self.pool_side)


@dataclass(frozen=True)
class Reach(_LastQueries):
    """Rates of the last queries, where what follows a peak of attention ranks with the peak.

    At the end of a prompt a token's rate becomes the mean of its own and of those before it (the sinks' left out), with
    weights that fall by a factor e every `reach` positions. What follows many or strong peaks ranks high for longer
    than what follows one weak peak, while decoding too.

    Attributes:
        reach: in positions.
    """

    name: ClassVar[str] = "reach"
    reach: float = real(20.0, above=0)

    def pooled_rates(self, slots: Slots, num_sink_tokens: int) -> Tensor:
        """As `ScoreRule.pooled_rates`."""
        return decaying_mean(slots.rates, slots.positions, self.reach, num_sink_tokens)

    @property
    def keeps_pooled_rates(self) -> bool:
        """By its own rate the end of an answer would be evicted before it is generated: nothing has looked at it."""
        return True


@dataclass(frozen=True)
class Joint(ScoreRule):
    """Two rankings, each with a share of the slots: that of `reach`, and accumulated attention over age.

    At the end of a prompt the best by one ranking and the best by the other are kept: a token that is high in the
    second gets the rate of the token that is as high in the first, as far as the shares say. While decoding slots rank
    by these rates, as with `reach`.

    Attributes:
        reach: as in `reach`, in positions.
        accumulated_share: share of the slots that go by accumulated attention; what both rankings choose leaves more to
            both.
    """

    name: ClassVar[str] = "joint"
    statistics: ClassVar[frozenset[str]] = frozenset({RATES, COLUMN_SUMS})
    reach: float = real(20.0, above=0)
    accumulated_share: float = real(0.5, above=0, below=1)

    def pooled_rates(self, slots: Slots, num_sink_tokens: int) -> Tensor:
        """As `ScoreRule.pooled_rates`."""
        rates = decaying_mean(slots.rates, slots.positions, self.reach, num_sink_tokens)
        # The newest token is always held.
        means = mean_attention(slots, slots.positions.amax((1, 2)) + 1)
        joined = join_rankings(
            rates.masked_fill(~slots.live, 0), means.masked_fill(~slots.live, -1), self.accumulated_share
        )
        return torch.where(slots.live, joined, rates)

    @property
    def keeps_pooled_rates(self) -> bool:
        """As with `reach`; and what was kept for its accumulated attention stays for a while."""
        return True

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """As `ScoreRule.rank`."""
        return rates


@dataclass(frozen=True)
class Newest(ScoreRule):
    """Newest first: a plain sliding window with sinks (StreamingLLM)."""

    name: ClassVar[str] = "newest"

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """As `ScoreRule.rank`."""
        return slots.positions.to(slots.scores.dtype)


@dataclass(frozen=True)
class Reread(ScoreRule):
    """The most attention that any query gave while the prompt was read a second time (after KVzip).

    Attributes:
        chunk: prompt tokens of one forward of that second reading, each of which stands alone.
    """

    name: ClassVar[str] = "reread"
    statistics: ClassVar[frozenset[str]] = frozenset({PEAKS})
    chunk: int = integer(2048, low=1)

    def rank(self, slots: Slots, rates: Tensor, num_seen_tokens: Tensor) -> Tensor:
        """As `ScoreRule.rank`."""
        return slots.scores


SCORES = registry(Reach, Window, Accumulated, Newest, Reread, Joint)


def mean_attention(slots: Slots, num_seen_tokens: Tensor) -> Tensor:
    """[B, Hkv, S] attention that each slot received a query that could see it; of young tokens, a `MIN_AGE`-th."""
    return slots.scores / (num_seen_tokens[:, None, None] - slots.positions).clamp_min(MIN_AGE)


def join_rankings(rates: Tensor, other: Tensor, share: float) -> Tensor:
    """The rates [B, Hkv, S], raised so that of n slots that rank highest about `share` * n are the highest in `other`.

    A slot that is k-th in `other` gets no less than the rate that is `k * (1 - share) / share`-th: then the n best are
    the union of the best of both rankings, in the proportion of the shares. Slots that are level in `other` but for
    rounding share the best of their places, so that copies of a head on two ranks get the same rates.
    """
    size, rounding = other.shape[-1], torch.finfo(other.dtype).eps ** (2 / 3)
    place = size - torch.searchsorted(other.sort(-1).values, (other * (1 + rounding)).contiguous(), right=True)
    level = (place.double() * ((1 - share) / share)).long().clamp_max(size - 1)
    return torch.maximum(rates, rates.sort(-1, descending=True).values.gather(-1, level))


def max_pool_positions(rates: Tensor, positions: Tensor, width: int, side: str = "both") -> Tensor:
    """Maximum of `rates` over the live slots near by, `width` positions with the slot's own. All [B, Hkv, S], in order.

    Before anything is evicted this is a plain max pooling; later, neighbours that are gone do not count.

    Args:
        side: `both`: half of them before the slot and half after it; `after`: all of them before it, so that what
            follows a peak ranks with the peak.
    """
    before, after = (width - 1, 0) if side == "after" else (width // 2, width // 2)
    pooled = rates
    slots = rates.shape[-1]
    for shift in range(1, min(max(before, after), slots - 1) + 1):
        apart = positions[..., shift:] - positions[..., :-shift]
        live = positions[..., shift:] >= 0
        pooled = pooled.clone() if pooled is rates else pooled
        if shift <= after:
            later = torch.where(live & (apart <= after), rates[..., shift:], -torch.inf)
            pooled[..., :-shift] = torch.maximum(pooled[..., :-shift], later)
        if shift <= before:
            earlier = torch.where(live & (apart <= before), rates[..., :-shift], -torch.inf)
            pooled[..., shift:] = torch.maximum(pooled[..., shift:], earlier)
    return pooled


def decaying_mean(rates: Tensor, positions: Tensor, reach: float, first: int) -> Tensor:
    """Mean of `rates` over a slot and the live slots before it, each weighted by `exp(-distance / reach)`.

    The weights of a prompt without gaps add up to 1, but for its beginning. All [B, Hkv, S], in order of position,
    unused slots (position -1) last. Slots before position `first` lend nothing and keep their own rate: attention rests
    on the first tokens whatever follows them. Distance is in positions, so what is gone neither counts nor moves
    anything nearer.

    Every weight is a quotient of two powers of position, so one cumulative sum does it. It is a sum of logarithms in
    float64, because `exp(position / reach)` overflows; at a million positions and a reach of 5 it is good to 1e-9.
    """
    lends = positions >= first
    shift = positions.double() / reach
    logs = torch.where(lends, rates.double().log() + shift, -torch.inf)
    sums = (logs.logcumsumexp(-1) - shift).exp() * -math.expm1(-1 / reach)
    return torch.where(lends, sums.to(rates.dtype), rates)
