"""Dotted overrides, `d2o.keep_ratio=0.1`, on top of the nested mapping of a YAML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from d2o_dist.fields.io import read_yaml
from d2o_dist.fields.show import clip, shown


def parse_override(text: str) -> tuple[str, Any]:
    """`(dotted key, value)` of `key=value`; the value is read as YAML, so that `0.1`, `null` and `[a, b]` mean those.

    Raises:
        ValueError: no `=`, an empty part of the key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ValueError(f'override "{clip(text)}" must have the form key=value, for example d2o.keep_ratio=0.1')
    return key.strip(), read_yaml(value, f'override "{clip(text)}": the value')


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """`values` with the overrides set, in order; missing mappings on the way are made. What was given stays as it is.

    Raises:
        ValueError: a key goes through something that is not a mapping, as in `model.name=x`.
    """
    result = dict(values)
    for key, value in overrides:
        *path, last = key.split(".")
        target = result
        for depth, part in enumerate(path):
            inner = target.get(part)
            if inner is not None and not isinstance(inner, dict):
                where = clip(".".join(path[: depth + 1]))
                raise ValueError(f'override "{clip(key)}": {where} is {shown(inner)}, not a mapping')
            # What is written into is a copy: it may have been given by `values`, or by an earlier override.
            inner = target[part] = dict(inner or {})
            target = inner
        target[last] = value
    return result
