"""Strict dictionaries and YAML for frozen config dataclasses: unknown keys are refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean "keep_ratio"?'`, or an empty string when nothing known is near `name`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ValueError` naming the first key that is not known to `what`."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(f'{what} has no field "{key}".{did_you_mean(str(key), known)} Known: {", ".join(known)}')


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}.{did_you_mean(str(value), choices)}")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls(**values)` for a dataclass, with unknown keys refused."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be given as a mapping of fields, not {type(values).__name__}")
    refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], cls.__name__)
    return cls(**values)


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would take the last of several values of a key without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ValueError: the file does not exist, is not YAML, holds something else than a mapping, or says a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold a mapping, not {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in the order of the fields."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
