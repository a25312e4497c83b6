"""What one prefill must gather for all methods that will start from it (`D2OCache.with_config`)."""

from __future__ import annotations

from collections.abc import Sequence

from d2o_dist.policy.budget import Uniform
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.merge import Drop
from d2o_dist.policy.score import Newest, Reach
from d2o_dist.policy.statistics import QuerySample, StatisticsConfig


def gathering_config(configs: Sequence[D2OConfig]) -> D2OConfig:
    """A configuration whose prefill gathers what each of `configs` needs, and no more; a second reading is not part of
    it.

    Raises:
        ValueError: second readings in different chunks, or column sums from different queries: one prefill cannot
            serve both.
    """
    scored = [config for config in configs if config.needs_column_sums]
    if len({config.query_sample for config in scored}) > 1:
        raise ValueError("one prefill cannot gather column sums from different queries: group_by_queries() first")
    second_reading(configs)
    rates = [config.statistics.rate_window for config in configs if config.needs_rates]
    sample = scored[0].query_sample if scored else None
    queries = {"query_stride": 1} if sample is None else {"query_stride": sample.stride, "near_distance": sample.near}
    return D2OConfig(
        score=Reach(add_accumulated=bool(scored)) if scored or rates else Newest(),
        budget=Uniform(),
        merge=Drop(),
        statistics=StatisticsConfig(max(rates, default=1), **queries),
    )


def second_reading(configs: Sequence[D2OConfig]) -> int | None:
    """In forwards of how many tokens the prompt is read a second time; None: no configuration needs it.

    Raises:
        ValueError: second readings in different chunks.
    """
    chunks = {config.score.chunk for config in configs if config.needs_reread}
    if len(chunks) > 1:
        raise ValueError(f"methods have several score.chunk ({sorted(chunks)}): one prompt is read again in one way")
    return max(chunks, default=None)


def group_by_queries(configs: Sequence[D2OConfig]) -> list[list[D2OConfig]]:
    """The configurations, in groups that one prefill can serve; those that read no column sums are in the first."""
    groups: dict[QuerySample | None, list[D2OConfig]] = {}
    for config in configs:
        if config.needs_column_sums:
            groups.setdefault(config.query_sample, []).append(config)
    first, *others = groups.values() or [[]]
    return [first + [config for config in configs if not config.needs_column_sums], *others]
