"""Every preset, and every preset with one field changed to another of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from d2o_dist.config import PRESETS, D2OConfig
from d2o_dist.config import d2o as fields

# All values of fields with a choice, and for numbers some on both sides of the presets'.
VALUES: dict[str, tuple] = {
    "keep_ratio": (0.5,),
    "keep_tokens": (64,),
    "allocation": fields.ALLOCATIONS,
    "budget_per": fields.BUDGETS,
    "dispersion": fields.DISPERSIONS,
    "dispersion_sign": (-1, 1),
    "temperature": (0.5,),
    "pyramid_beta": (3.0,),
    "exact_total": (True, False),
    "min_layer_ratio": (0.02,),
    "min_layer_tokens": (5,),
    "protected_layers": ((0,),),
    "heavy_fraction": (0.6,),
    "num_sink_tokens": (0, 7),
    "selection": fields.SELECTIONS,
    "selection_pool": (1, 7),
    "selection_pool_side": fields.SELECTION_POOL_SIDES,
    "selection_reach": (None, 5.0),
    "rate_window": (8,),
    "reread_chunk": (64,),
    "score_queries": fields.SCORE_QUERIES,
    "score_query_stride": (4,),
    "score_near_distance": (3,),
    "merge": fields.MERGES,
    "merge_targets": fields.MERGE_TARGETS,
    "tail_fraction": (0.5, 1.0),
    "max_decode_tail": (None, 1),
    "gate": fields.GATES,
    "drop_quantile": (0.0, 0.6),
    "ema_beta": (0.0, 0.2, 1.0),
    "threshold_agg": fields.THRESHOLD_AGGS,
    "self_weight": (0.25, 10.0),
    "max_log_mass": (0.0, 0.3),
    "eviction_interval": (None, 5),
}


def variations(names: tuple[str, ...] = tuple(VALUES)) -> Iterator[tuple[str, D2OConfig]]:
    """What it is, and the configuration; of those that a preset refuses, since no rule would read the field, none.

    Args:
        names: fields that are changed; all by default.
    """
    assert VALUES.keys() == {field.name for field in dataclasses.fields(D2OConfig)}, "a field has no values here"
    for preset in PRESETS:
        base = D2OConfig.preset(preset)
        yield preset, base
        for name in names:
            for value in VALUES[name]:
                try:
                    config = D2OConfig.preset(preset, **{name: value})
                except ValueError:
                    continue
                if config != base:
                    yield f"{preset}, {name}={value}", config
