"""What all rules of a policy share: a rule is a frozen dataclass, with its limits beside its fields.

A part of a policy (`score`, `budget`, `merge`, and within a merge its `gate` and `targets`) is one of several rules. In
YAML and on the command line it is a mapping: `rule` names it, the rest are its fields. A mapping without `rule` changes
fields of the rule that is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from d2o_dist.fields.io import check_choice, refuse_unknown
from d2o_dist.fields.show import shown


def part(default: Rule, registry: Mapping[str, type[Rule]]) -> Any:
    """A field that is a rule itself."""
    return dataclasses.field(default=default, metadata={"rules": registry})


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule. Fields are declared as in `d2o_dist.fields.declare`, or by `part`.

    Attributes:
        name: what `rule` says in YAML.
        path: the part of a policy that it can be, as in `merge.gate`.
        statistics: names of the statistics of attention that it reads (`policy/statistics.py`).
    """

    name: ClassVar[str]
    path: ClassVar[str]
    statistics: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self, self.path)

    @classmethod
    def fields(cls) -> list[str]:
        """Names of its fields."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; `rule_from` is its inverse."""
        values = {name: getattr(self, name) for name in self.fields()}
        return {"rule": self.name, **{name: plain(value) for name, value in values.items()}}


def plain(value: Any) -> Any:
    """A field's value for YAML."""
    if isinstance(value, Rule):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def check_fields(config: Any, path: str) -> None:
    """Raise `ValueError` for the first field of a dataclass that misses its limit; path: in front of its name."""
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}" if path else field.name
        if "rules" in field.metadata:
            known = field.metadata["rules"]
            if not isinstance(value, Rule):
                object.__setattr__(config, field.name, rule_from(value, known, where, base=field.default))
            elif known.get(value.name) is not type(value):
                raise ValueError(f"{where} ({shown(value)}) must be one of the rules {', '.join(known)}")
        elif "limit" in field.metadata and (wanted := field.metadata["limit"](value)) is not None:
            raise ValueError(f"{where} ({shown(value)}) must be {wanted}")


def registry(*rules: type[Rule]) -> dict[str, type[Rule]]:
    """By name."""
    return {rule.name: rule for rule in rules}


def rule_from(value: Any, rules: Mapping[str, type[Rule]], path: str, *, base: Rule | None = None) -> Rule:
    """The rule that `value` says: a rule, its name, or a mapping of `rule` and fields.

    Args:
        rules: those that may stand here.
        base: what stands here so far. What the mapping does not name stays as it is there: all fields if the rule
            stays, those of the same name if another one is chosen.

    Raises:
        ValueError: an unknown rule or field, with the nearest known one, or a value outside its limits.
    """
    if isinstance(value, Rule):
        if rules.get(value.name) is not type(value):
            raise ValueError(f"{path} ({shown(value)}) must be one of the rules {', '.join(rules)}")
        return value
    if isinstance(value, str):
        value = {"rule": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} ({shown(value)}) must be the name of a rule, or a mapping of its fields")
    name = value.get("rule", None if base is None else base.name)
    if name is None:
        raise ValueError(f"{path} must name its rule: one of {', '.join(rules)}")
    check_choice(f"{path}.rule", name, rules)
    rule = rules[name]
    given = {key: one for key, one in value.items() if key != "rule"}
    _refuse_unknown(given, rule, rules, path)
    fields = {} if base is None else _carried(base, rule)
    for key, one in given.items():
        inner = rule.__dataclass_fields__[key]
        if "rules" in inner.metadata:
            one = rule_from(one, inner.metadata["rules"], f"{path}.{key}", base=fields.get(key, inner.default))
        fields[key] = one
    return rule(**fields)


def _carried(base: Rule, rule: type[Rule]) -> dict[str, Any]:
    """The fields of `base` that the rule has too, as far as they may stand in it."""
    carried = {key: getattr(base, key) for key in rule.fields() if key in base.fields()}
    return {
        key: value
        for key, value in carried.items()
        if not isinstance(value, Rule)
        or rule.__dataclass_fields__[key].metadata["rules"].get(value.name) is type(value)
    }


def _refuse_unknown(given: Mapping[str, Any], rule: type[Rule], rules: Mapping[str, type[Rule]], path: str) -> None:
    """Raise for a field that the rule does not have; it says which rule of this part has it, if any."""
    for key in given:
        if key in rule.fields():
            continue
        owners = [other.name for other in rules.values() if key in other.fields()]
        if owners:
            raise ValueError(
                f"{path}.{key} is a field of {' and '.join(owners)}, but {path}.rule is {rule.name}: set "
                f"{path}.rule={owners[0]}, or leave {key} out"
            )
    refuse_unknown(given, rule.fields(), f"{path} ({rule.name})")
