"""Presets as models of many layers take them: models that are measured may have few."""

from __future__ import annotations

from typing import Any

from d2o_dist.policy.budget import Dispersion
from d2o_dist.policy.config import D2OConfig


def preset_of_many(name: str, **fields: Any) -> D2OConfig:
    """`D2OConfig.preset`, but layers share by dispersion however few they are."""
    config = D2OConfig.preset(name, **fields)
    return config.replace(budget={"min_layers": 0}) if isinstance(config.budget, Dispersion) else config
