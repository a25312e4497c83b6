"""What a configuration says of each layer, where its layers differ (`per_layer_config`, `..._per_layer`)."""

from __future__ import annotations

from typing import Any


def of_layers(config: Any, name: str) -> list[Any]:
    """The field `name` of every layer of a decoder, or once where all have the same; None: there is no such field."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    else:
        values = getattr(config, f"{name}_per_layer", None) or [getattr(config, name, None)]
    return values[:1] if all(value == values[0] for value in values) else list(values)


def of_each_layer(config: Any, name: str) -> list[Any]:
    """The field `name` of every layer of a decoder; None: there is no such field."""
    values = of_layers(config, name)
    return values * config.num_hidden_layers if len(values) == 1 else values
