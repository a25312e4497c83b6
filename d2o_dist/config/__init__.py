"""Frozen, validated configuration. The lowest floor: it imports nothing of the package."""

from d2o_dist.config.d2o import D2OConfig
from d2o_dist.config.presets import PRESETS

__all__ = ["PRESETS", "D2OConfig"]
