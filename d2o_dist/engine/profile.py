"""Measure the profile of a model: how its layers share slots by dispersion, averaged over passages of a text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from d2o_dist.engine.reading import read
from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.profile import ModelProfile, identity_of
from d2o_dist.policy.budget import Dispersion
from d2o_dist.policy.config import D2OConfig
from d2o_dist.policy.merge import Drop
from d2o_dist.policy.statistics import StatisticsConfig

# Shares are to be measured, whatever is kept and however few layers there are; half of it, so that nothing is left out
# as not needed.
_MEASURES = D2OConfig(
    keep_ratio=0.5,
    budget=Dispersion(min_layers=0, min_layer_tokens=0),
    merge=Drop(),
    statistics=StatisticsConfig(query_stride=1),
)


def default_text() -> str:
    """The documentation of Python's language that every Python brings along: prose and code, in English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def passages(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """At most `count` pieces of `length` tokens, spread evenly over a text, without overlap.

    Raises:
        ValueError: the text is shorter than one.
    """
    count = min(count, len(ids) // length)
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, but a passage has {length}")
    stride = len(ids) // count
    return [list(ids[n * stride : n * stride + length]) for n in range(count)]


@torch.inference_mode()
def measure_profile(
    model: ModelAdapter, rows: Sequence[Sequence[int]], source: str, revision: str | None, **about: Any
) -> ModelProfile:
    """The profile of a loaded model: the mean over passages of each layer's share.

    Args:
        rows: token ids of the passages, as many in each.
        source, revision: what it was loaded from; about: what else to note of how it was measured.

    Raises:
        ValueError: attention that is not finite.
    """
    total: list[float] = []
    for row in rows:
        ids = torch.tensor([row])
        cache = model.make_cache(_MEASURES)
        read(model, cache, ids, torch.ones_like(ids))
        cache.finalize()
        shares = [math.exp(weight) for weight in cache.compressed.plans[0].log_weights]
        total = [old + new for old, new in zip(total or [0.0] * len(shares), shares, strict=True)]
    rule = _MEASURES.budget
    measured = {
        "passages": len(rows), "tokens_of_each": len(rows[0]),
        "rule": {name: getattr(rule, name) for name in ("statistic", "sign", "temperature")},
        "ids_sha256": hashlib.sha256(repr([list(row) for row in rows]).encode()).hexdigest(), **about,
    }  # fmt: skip
    return ModelProfile(identity_of(source, revision), tuple(one / len(rows) for one in total), measured)
