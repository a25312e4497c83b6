"""What one prefill must gather for all methods that will start from it (`D2OCache.with_config`)."""

from __future__ import annotations

from collections.abc import Sequence

from d2o_dist.config.d2o import D2OConfig, QuerySample

QUERY_FIELDS = ("score_queries", "score_query_stride", "score_near_distance")


def gathering_config(configs: Sequence[D2OConfig]) -> D2OConfig:
    """A configuration whose prefill gathers what each of `configs` needs, and no more; a second reading is not part of
    it, but its chunks are.

    Raises:
        ValueError: second readings in different chunks, or column sums from different queries: one prefill cannot
            serve both.
    """
    scored = [config for config in configs if config.needs_column_sums]
    sums = bool(scored)
    if len({config.query_sample for config in scored}) > 1:
        raise ValueError("one prefill cannot gather column sums from different queries: group_by_queries() first")
    rates = any(config.needs_rates for config in configs)
    windows = [config.rate_window for config in configs if config.needs_rates]
    chunks = {config.reread_chunk for config in configs if config.needs_reread}
    if len(chunks) > 1:
        raise ValueError(f"methods have several reread_chunk ({sorted(chunks)}): one prompt is read again in one way")
    return D2OConfig(
        reread_chunk=max(chunks, default=D2OConfig.reread_chunk),
        allocation="uniform",
        selection="mixed" if sums else "window" if rates else "recent",
        merge="none",
        rate_window=max(windows, default=1),
        **({name: getattr(scored[0], name) for name in QUERY_FIELDS} if scored else {}),
    )


def group_by_queries(configs: Sequence[D2OConfig]) -> list[list[D2OConfig]]:
    """The configurations, in groups that one prefill can serve; those that read no column sums are in the first."""
    groups: dict[QuerySample | None, list[D2OConfig]] = {}
    for config in configs:
        if config.needs_column_sums:
            groups.setdefault(config.query_sample, []).append(config)
    first, *others = groups.values() or [[]]
    return [first + [config for config in configs if not config.needs_column_sums], *others]
