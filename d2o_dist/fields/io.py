"""Strict dictionaries and YAML for frozen config dataclasses: unknown keys are refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from d2o_dist.fields.show import clip, named, shown

T = TypeVar("T")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """`' Did you mean "recent_fraction"?'`, or an empty string when nothing known is near `name`."""
    near = difflib.get_close_matches(clip(name), list(known), n=1, cutoff=0.5) if isinstance(name, str) else []
    return f' Did you mean "{near[0]}"?' if near else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ValueError` naming the first key that is not known to `what`."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(f'{what} has no field "{named(key)}".{did_you_mean(key, known)} Known: {", ".join(known)}')


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} ({shown(value)}) must be one of {', '.join(choices)}.{did_you_mean(value, choices)}")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls(**values)` for a dataclass, with unknown keys refused."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be given as a mapping of fields, not {type(values).__name__}")
    refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], cls.__name__)
    return cls(**values)


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would take the last of several values of a key without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in given:
                raise yaml.constructor.ConstructorError(None, None, f"{clip(key)} is given twice", node.start_mark)
            given.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which puts quotes around text that the loader would take for a number."""


# YAML 1.2 says that 1e-3 is a number; PyYAML, which knows YAML 1.1, takes it for text.
for _one in (_StrictLoader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(text: str, what: str) -> Any:
    """The value that YAML text says.

    Raises:
        ValueError: it says none; `what` begins the message.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError as error:
        raise ValueError(f"{what} is not valid YAML: it is nested too deeply") from error
    # What has the form of a number, a date or a truth value and is none fails in a dozen ways.
    except Exception as error:
        raise ValueError(f"{what} is not valid YAML: {clip(error, 300)}") from error


def read_json(text: str | bytes) -> Any:
    """The value that JSON text says, in UTF-8.

    Raises:
        ValueError: it says none.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {clip(error, 300)}") from error


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ValueError: the file does not exist, is not YAML, holds something else than a mapping, or says a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from error
    values = read_yaml(text, f"config file {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold a mapping, not {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in the order of the fields."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def to_json(value: Any, **options: Any) -> str:
    """JSON as all readers take it: NaN and infinity have no place in it. `options`: those of `json.dumps`.

    Raises:
        FloatingPointError: there is such a number; it says where.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        where = _not_finite(value)
        if where is None:
            raise
        raise FloatingPointError(f"{where} is not a finite number, and JSON has no other") from error


def _not_finite(value: Any, where: str = "value") -> str | None:
    """`value.scores.kl = nan`: the first number that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where} = {value}"
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        parts = ((f"{where}.{name}", part) for name, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"{where}[{place}]", part) for place, part in enumerate(value))
    return next((found for name, part in parts if (found := _not_finite(part, name)) is not None), None)
