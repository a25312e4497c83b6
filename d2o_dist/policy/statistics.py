"""Statistics of attention that rules can name, and how they are taken.

Only what a rule of the policy names is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from d2o_dist.fields.declare import integer
from d2o_dist.policy.rule import check_fields

# Attention that each token received, summed over the queries that saw it.
COLUMN_SUMS = "column_sums"
# Attention that each token received from the last queries of the prompt, a query; while decoding a decaying average.
RATES = "rates"
# The most attention that any query of a second reading gave to each token.
PEAKS = "peaks"


@dataclass(frozen=True)
class QuerySample:
    """Column sums from a part of the queries.

    Attributes:
        stride: one query in so many is summed over all keys, and counted as many times.
        near: over keys at less than this distance every query is summed.
    """

    stride: int
    near: int


# Shares of layers need a variance a head, not every query: from so many they are off by 0.5 to 1% in the mean
# (docs/results/shares.md).
FOR_SHARES = QuerySample(stride=32, near=16)


@dataclass(frozen=True)
class StatisticsConfig:
    """How the statistics are taken.

    Attributes:
        rate_window: prompt queries that rates are averaged over, and the decay of their average while decoding.
        query_stride: 1: column sums are exact, from every query of the prompt; n: estimated, from one query in n and,
            for the nearest keys, from all. Cheaper. Rates are exact in either case. None: exact where tokens are ranked
            by them, `FOR_SHARES` where only layers are.
        near_distance: with a stride, keys at less than this distance from a query are summed over all queries.
    """

    rate_window: int = integer(32, low=1)
    query_stride: int | None = integer(None, low=1, optional=True)
    near_distance: int = integer(64, low=0)

    def __post_init__(self) -> None:
        check_fields(self, "statistics")
        if self.query_stride in (None, 1) and self.near_distance != type(self).near_distance:
            raise ValueError(
                f"statistics.near_distance ({self.near_distance}) is read only where statistics.query_stride is above 1"
            )

    def query_sample(self, *, ranks_tokens: bool) -> QuerySample | None:
        """Which queries column sums are taken from; None: all.

        Args:
            ranks_tokens: whether tokens are ranked by the sums, not only layers compared.
        """
        if self.query_stride is None:
            return None if ranks_tokens else FOR_SHARES
        return None if self.query_stride == 1 else QuerySample(self.query_stride, self.near_distance)
