"""What a configuration says of each layer, where transformers lets layers differ (`per_layer_config`)."""

from __future__ import annotations

from typing import Any


def of_layers(config: Any, name: str) -> list[Any]:
    """The field `name` of every layer of a decoder, or once where all have the same; None: there is no such field."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [getattr(config, name, None)]


def of_each_layer(config: Any, name: str) -> list[Any]:
    """The field `name` of every layer of a decoder; None: there is no such field."""
    values = of_layers(config, name)
    return values * config.num_hidden_layers if len(values) == 1 else values
