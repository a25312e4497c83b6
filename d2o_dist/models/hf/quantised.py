"""Checkpoints whose weights are quantised: transformers loads them, by packages of which some must be there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

# By how a configuration calls the method. FP8 needs none: without a GPU such weights are turned into ordinary ones.
_PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


def quant_method(config: Any) -> str | None:
    """How a model's weights are quantised; None: they are not."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return None
    fields = quantised if isinstance(quantised, dict) else vars(quantised)
    return str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))


def check_package(config: Any, name: str) -> None:
    """Refuse a checkpoint whose package is missing, before its weights are read.

    Raises:
        ValueError: names the package.
    """
    method = quant_method(config)
    package = _PACKAGES.get(method)
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"the weights of {name} are quantised by {method}: pip install {package.replace('_', '-')} to load them"
        )
