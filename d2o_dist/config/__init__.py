"""Frozen, validated configuration. The lowest floor: it imports nothing of the package."""

from d2o_dist.config.d2o import PRESETS, D2OConfig

__all__ = ["PRESETS", "D2OConfig"]
