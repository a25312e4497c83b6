"""Budget rules: how layers (or KV heads) share the slots (paper section 3.2, eq. 4-5, made exact).

All of it on the host, in float64. Where heads have budgets of their own, a "layer" is one KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from d2o_dist.fields.checks import MAX_INTEGER, is_integer, is_number
from d2o_dist.fields.declare import choice, flag, integer, real
from d2o_dist.fields.show import shown
from d2o_dist.policy.rule import Rule, registry
from d2o_dist.policy.statistics import COLUMN_SUMS

# Keeps a min-max normalisation finite when all values agree (released code).
MINMAX_EPSILON = 1e-6
# A product such as 0.29 * 100 is 28.999999999999996 in binary; the user meant 29.
_FLOOR_SLACK = 1e-9


def floor_tokens(tokens: float) -> int:
    """`floor` of a token count that was computed from decimal fractions."""
    return math.floor(tokens + _FLOOR_SLACK)


@dataclass(frozen=True)
class Size:
    """How much is kept, said in one of two ways.

    Attributes:
        keep_ratio: fraction of the full cache's tokens, averaged over the compressed layers; None where the other is
            given.
        keep_tokens: slots a layer, on average.
    """

    keep_ratio: float | None
    keep_tokens: int | None

    def times(self, factor: float) -> dict[str, float | int]:
        """`factor` times as much, at most everything, as fields of a configuration."""
        if self.keep_ratio is not None:
            return {"keep_ratio": min(factor * self.keep_ratio, 1.0)}
        return {"keep_tokens": math.ceil(factor * self.keep_tokens)}

    def ratio_of(self, num_tokens: int) -> float:
        """The fraction that this is of a prompt."""
        return self.keep_ratio or min(self.keep_tokens / max(num_tokens, 1), 1.0)


@dataclass(frozen=True)
class BudgetRule(Rule):
    """How layers share the total.

    Attributes:
        per_head: each KV head has a budget of its own, rather than all heads of a layer holding as many slots; wherever
            these rules speak of a layer, one KV head is meant then.
        exact_total: water-fill the layers so that the total is exactly what was asked for; only `min_layer_tokens` can
            exceed it.
        min_layer_ratio: no layer's ratio falls below this, or below that of all where `keep_tokens` makes it smaller.
        min_layer_tokens: no layer gets fewer slots, whatever the ratio or `keep_tokens`; a shorter prompt may grow to
            it while decoding.
        protected_layers: layers that keep everything; negative indices count from the last layer.
    """

    path: ClassVar[str] = "budget"
    # Whether what `min_layer_tokens` gives to some comes from the others, as far as the total goes.
    counts_minimum: ClassVar[bool] = False
    per_head: bool = flag(False)
    exact_total: bool = flag(True)
    min_layer_ratio: float = real(0.01, low=0, high=1)
    min_layer_tokens: int = integer(256, low=0)
    protected_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers = self.protected_layers
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"budget.protected_layers ({shown(layers)}) must be a list of layer indices")
        object.__setattr__(self, "protected_layers", tuple(layers))
        for index in self.protected_layers:
            if not is_integer(index):
                raise ValueError(f"budget.protected_layers has {shown(index)}; layer indices are integers")
            if abs(index) > MAX_INTEGER:
                raise ValueError(f"budget.protected_layers has {shown(index)}; it must be at most {MAX_INTEGER}")
        super().__post_init__()

    def protected(self, num_layers: int) -> frozenset[int]:
        """Indices in `[0, num_layers)` of the layers that keep everything.

        Raises:
            ValueError: an index outside `[-num_layers, num_layers)`.
        """
        for index in self.protected_layers:
            if not -num_layers <= index < num_layers:
                raise ValueError(f"budget.protected_layers has {index}, but the model has {num_layers} layers")
        return frozenset(index % num_layers for index in self.protected_layers)

    @property
    def by_ranking(self) -> bool:
        """Whether shares follow from a ranking of all tokens of the model (`highest_of_heads`)."""
        return False

    @property
    def is_known_before(self) -> bool:
        """Whether shares are known before a prompt is read: nothing of it is measured for them."""
        return not self.statistics and not self.by_ranking

    def check_layers(self, num_layers: int) -> None:
        """Raise `ValueError` where the rule does not fit a model of so many compressed layers."""

    def for_layers(self, num_layers: int) -> BudgetRule:
        """The rule by which so many compressed layers share: this one, or a simpler one where they are few."""
        return self

    def dispersions(self, variances: Tensor) -> Tensor | None:
        """[L, Hq] variances of the column sums of all query heads, of one row -> [L]; None where shares need none."""
        return None

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """Log of each layer's share of the total, before clamps; normalised: `logsumexp = 0`.

        Args:
            measured: per layer what the rule measures: its dispersion, or how many of the highest ranked tokens it has.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Dispersion(BudgetRule):
    """Shares by how a layer's attention is spread: a softmax over the dispersions of the layers (the paper).

    Attributes:
        statistic: a layer's scalar statistic of its column sums: `layers_minmax`, `heads_minmax`, `raw`, `log_zscore`.
        sign: -1 gives even attention more (the paper), +1 gives uneven attention more.
        temperature: divides the exponent of the softmax.
        min_layers: where fewer layers share they share equally (`for_layers`), for what a dispersion is worth depends
            too much on the few others; 0: never.
    """

    name: ClassVar[str] = "dispersion"
    statistics: ClassVar[frozenset[str]] = frozenset({COLUMN_SUMS})
    statistic: str = choice("log_zscore", "layers_minmax", "heads_minmax", "raw", "log_zscore")
    sign: int = choice(1, -1, 1)
    temperature: float = real(3.3, above=0)
    min_layers: int = integer(12, low=0)

    def for_layers(self, num_layers: int) -> BudgetRule:
        """As `BudgetRule.for_layers`."""
        if num_layers >= self.min_layers:
            return self
        return Uniform(**{name: getattr(self, name) for name in Uniform.fields()})

    def dispersions(self, variances: Tensor) -> Tensor:
        """As `BudgetRule.dispersions`."""
        return layer_dispersions(variances, self.statistic)

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """As `BudgetRule.log_weights`."""
        assert measured is not None and len(measured) == num_layers
        return _normalised(np.asarray(measured, dtype=np.float64) * (self.sign / self.temperature))


@dataclass(frozen=True)
class Uniform(BudgetRule):
    """Equal shares."""

    name: ClassVar[str] = "uniform"

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """As `BudgetRule.log_weights`."""
        return _normalised(np.zeros(num_layers))


@dataclass(frozen=True)
class Pyramid(BudgetRule):
    """Shares that fall with depth (PyramidKV).

    Attributes:
        beta: the last layer gets `1/beta` of the average.
    """

    name: ClassVar[str] = "pyramid"
    beta: float = real(20.0, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_head:
            raise ValueError("budget.per_head (True) must be false where budget.rule is pyramid, which is by depth")

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """As `BudgetRule.log_weights`."""
        low = 1 / self.beta
        depth = np.arange(num_layers) / max(num_layers - 1, 1) if num_layers > 1 else np.array([0.5])
        return _normalised(np.log(2 - low - (2 - 2 * low) * depth))


@dataclass(frozen=True)
class Ranked(BudgetRule):
    """Shares by how many of a layer's tokens are among the highest ranked of all layers."""

    name: ClassVar[str] = "ranked"
    counts_minimum: ClassVar[bool] = True  # many heads have hardly any of the best

    @property
    def by_ranking(self) -> bool:
        """As `BudgetRule.by_ranking`."""
        return True

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """As `BudgetRule.log_weights`."""
        shares = torch.tensor(measured, dtype=torch.float64)
        # A layer without any gets the least there is, whose logarithm must be finite. A row without tokens has none.
        return (shares / shares.sum().clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny).log().tolist()


@dataclass(frozen=True)
class Profile(BudgetRule):
    """Shares that were measured once for a model, on any text: then nothing is measured in a prompt.

    Attributes:
        shares: of each layer with full attention, in order, in any unit; None: those of the profile that
            `d2o-dist profile MODEL` wrote (`models/profile.py`), which the cache of the model looks up.
    """

    name: ClassVar[str] = "profile"
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_head:
            raise ValueError("budget.per_head (True) must be false where budget.rule is profile, which is by layer")
        if self.shares is None:
            return
        if not isinstance(self.shares, (list, tuple)):
            raise ValueError(f"budget.shares ({shown(self.shares)}) must be a list of numbers, one a layer")
        for share in self.shares:
            if not is_number(share) or share <= 0:
                raise ValueError(f"budget.shares has {shown(share)}; shares are numbers above 0")
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))

    def check_layers(self, num_layers: int) -> None:
        """As `BudgetRule.check_layers`."""
        if self.shares is None:
            raise ValueError("budget.rule (profile) needs budget.shares, or `d2o-dist profile MODEL` once")
        if len(self.shares) != num_layers:
            what = f"{len(self.shares)} numbers, but the model has {num_layers} layers with full attention"
            raise ValueError(f"budget.shares has {what}")

    def log_weights(self, num_layers: int, measured: Sequence[float] | None) -> list[float]:
        """As `BudgetRule.log_weights`."""
        self.check_layers(num_layers)
        return _normalised(np.log(np.asarray(self.shares, dtype=np.float64)))


BUDGETS = registry(Dispersion, Uniform, Pyramid, Ranked, Profile)


def _normalised(raw: np.ndarray) -> list[float]:
    """Logs of weights less the log of their sum."""
    peak = raw.max()
    return list(raw - peak - math.log(np.exp(raw - peak).sum()))


def layer_dispersions(variances: Tensor, rule: str) -> Tensor:
    """The scalar statistic `F_l` of each layer, from the variances of all its query heads.

    Args:
        variances: [L, Hq], of one row, over all tensor shards.
        rule: `heads_minmax`, `layers_minmax`, `raw` or `log_zscore`.

    Returns:
        [L], in the dtype of `variances`.
    """

    def minmax(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (x - low) / (high - low + MINMAX_EPSILON)

    if rule == "heads_minmax":
        return minmax(variances).mean(-1)
    mean = variances.mean(-1)
    if rule == "layers_minmax":
        return minmax(mean)
    if rule == "raw":
        return mean
    assert rule == "log_zscore", rule
    # A layer of exactly uniform attention has variance 0: its log must not be -inf.
    log = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    if log.numel() < 2:
        return torch.zeros_like(log)
    deviation = log.std(unbiased=True)
    return (log - log.mean()) / deviation if deviation > 0 else torch.zeros_like(log)


def num_ranked(num_tokens: int, num_heads: int, size: Size) -> int:
    """How many of the highest ranked tokens decide the shares of a row: the budget's fraction of the `num_tokens`
    tokens of `num_heads` KV heads in all layers, at least 1."""
    return max(floor_tokens(size.ratio_of(num_tokens) * num_heads * num_tokens), 1)
