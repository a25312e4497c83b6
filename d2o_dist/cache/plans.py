"""What the budgets of a row derive from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from d2o_dist.config.d2o import D2OConfig


@dataclass
class RowPlan:
    """What one row's budgets derive from: set at its first finalize, read again at later ones."""

    log_weights: list[float]
    dispersions: list[float]
    num_tokens: int
    slots: list[int] = field(default_factory=list)

    def copy(self) -> RowPlan:
        """One whose slots may change."""
        return dataclasses.replace(self, slots=list(self.slots))


def on_full_layers(config: D2OConfig, windows: list[int | None]) -> D2OConfig:
    """The configuration with `protected_layers` counted among the compressed layers only.

    Layer indices in a configuration are the model's; sliding-window layers need no protection and take no part in
    the budget.
    """
    full = [index for index, window in enumerate(windows) if window is None]
    protected = config.protected(len(windows))
    return config.replace(protected_layers=tuple(n for n, index in enumerate(full) if index in protected))


def on_units(config: D2OConfig, per_layer: int) -> D2OConfig:
    """The configuration with `protected_layers` counted among the `per_layer` budgets of each layer."""
    if per_layer == 1:
        return config
    layers = config.protected_layers
    return config.replace(protected_layers=tuple(n * per_layer + unit for n in layers for unit in range(per_layer)))
