"""One prefill, many caches: what a prefill gathers does not depend on how the cache is compressed afterwards.

Column sums and the attention of the last queries are statistics of the full attention. So a prompt is read once, under
a configuration that gathers all that any method needs, and every method starts from a copy. Keys, values and statistics
of the copy are those of a prefill of its own, up to the rounding of attention computed with and without column sums.
This file is the only one outside `cache` that knows the private state of its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from d2o_dist.cache.layer import FullLayer
from d2o_dist.config.d2o import D2OConfig
from d2o_dist.integrations.hf import D2OCache


def gathering_config(configs: Sequence[D2OConfig]) -> D2OConfig:
    """A configuration whose prefill gathers what each of `configs` needs, and no more."""
    sums = any(config.needs_column_sums for config in configs)
    rates = any(config.needs_rates for config in configs)
    windows = [config.rate_window for config in configs if config.needs_rates]
    return D2OConfig(
        allocation="uniform",
        selection="mixed" if sums else "window" if rates else "recent",
        merge="none",
        rate_window=max(windows, default=1),
    )


def with_config(cache: D2OCache, config: D2OConfig) -> D2OCache:
    """A copy of a cache that has read a prompt and compressed nothing yet, to be compressed as `config` says.

    The original stays as it is.

    Raises:
        ValueError: the cache was finalized, has seen nothing, or lacks statistics that `config` needs.
    """
    source = cache.compressed
    if source.phase != "prefill" or source.plans is not None or not source.num_seen_columns:
        raise ValueError(
            f"only a cache in its first prefill can change its configuration; this one is in phase {source.phase} and "
            f"has seen {source.num_seen_columns} tokens"
        )
    for name in ("needs_column_sums", "needs_rates"):
        if getattr(config, name) and not getattr(source.config, name):
            raise ValueError(f"the new configuration {name.replace('_', ' ')}, and the prefill did not gather them")
    if config.needs_rates and config.rate_window > source.config.rate_window:
        raise ValueError(
            f"rate_window ({config.rate_window}) must be at most the {source.config.rate_window} of the prefill"
        )
    forked = D2OCache(config=cache.model_config, d2o=config)
    forked._modules, forked._shape = dict(cache._modules), copy.copy(cache._shape)
    target = forked.compressed
    target.num_seen, target.num_seen_columns = list(source.num_seen), source.num_seen_columns
    target.layers = [copy.deepcopy(layer) for layer in source.layers]
    for layer in target.layers:
        if isinstance(layer, FullLayer):
            _adopt(layer, config)
    return forked


def _adopt(layer: FullLayer, config: D2OConfig) -> None:
    """Leave in the layer what a prefill under `config` would have left."""
    layer.config = config
    if not config.needs_column_sums:
        layer._column_sums = None
        layer.store.slots.scores.zero_()
    if not config.needs_rates:
        layer._window = None
    elif layer._window is not None:
        last = config.rate_window
        layer._window.queries = [queries[:, -last:] for queries in layer._window.queries]
        layer._window.lse = [lse[:, -last:] for lse in layer._window.lse]
