"""What one prefill must gather for all methods that will start from it (`D2OCache.with_config`)."""

from __future__ import annotations

from collections.abc import Sequence

from d2o_dist.config.d2o import D2OConfig


def gathering_config(configs: Sequence[D2OConfig]) -> D2OConfig:
    """A configuration whose prefill gathers what each of `configs` needs, and no more; a second reading is not part of
    it, but its chunks are.

    Raises:
        ValueError: second readings in different chunks.
    """
    sums = any(config.needs_column_sums for config in configs)
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
    )
