"""The configuration of a compression as a model takes it: what depends on the model, settled once."""

from __future__ import annotations

from d2o_dist.models.profile import with_profile
from d2o_dist.models.shape import ModelShape
from d2o_dist.policy.config import D2OConfig


def settle_rules(d2o: D2OConfig, shape: ModelShape) -> D2OConfig:
    """With the shares of the model's profile, and the budget rule of as many layers as it has with full attention.

    Raises:
        ValueError: see `with_profile`.
    """
    d2o = with_profile(d2o, shape.source, shape.revision)
    return d2o.for_layers(shape.windows.count(None), shape.num_kv_heads)
