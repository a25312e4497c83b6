"""Fields of `D2OConfig` that only some rules read. To set one where no rule reads it would change nothing.

A configuration may hold such fields: presets name them all, read or not. What is refused is that someone sets one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Of all these a neighbour of the same purpose says whether they are read: fields, the neighbour, its values.
_READ_WHERE: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (("dispersion", "dispersion_sign", "temperature"), "allocation", ("dynamic",)),
    (("pyramid_beta",), "allocation", ("pyramid",)),
    (("selection_reach", "selection_pool", "selection_pool_side"), "selection", ("window", "mixed")),
    (("selection_pool", "selection_pool_side"), "selection_reach", (None,)),
    (("score_query_stride", "score_near_distance"), "score_queries", ("strided",)),
    (("self_weight",), "merge", ("keys_values", "values")),
    (("max_log_mass",), "merge", ("mass",)),
    (("tail_fraction", "max_decode_tail"), "merge_targets", ("tail",)),
    (("drop_quantile",), "gate", ("quantile",)),
    (("ema_beta", "threshold_agg"), "gate", ("threshold",)),
)


def refuse_unread(values: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse given fields that no rule reads; None is never refused, it asks for nothing.

    Args:
        values: all fields.

    Raises:
        ValueError: it names the field, and the one that says whether it is read, with their values.
    """
    for names, reader, read in _READ_WHERE:
        if values[reader] not in read:
            for name in names:
                if name in given and values[name] is not None:
                    _refuse(values, name, reader, read)


def refuse_unread_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """As `refuse_unread`, where it is not known what was given: of what differs from its default while the field that
    says whether it is read does not, and of a pool beside a reach."""
    for names, reader, read in _READ_WHERE:
        if values[reader] not in read and (values[reader] == defaults[reader] or reader == "selection_reach"):
            for name in names:
                if values[name] != defaults[name]:
                    _refuse(values, name, reader, read)


def without_unread(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `base` but for those of which a given field says that they are not read any more."""
    gone = {
        name
        for names, reader, read in _READ_WHERE
        if reader in given and given[reader] not in read
        for name in names
    }
    return {name: value for name, value in base.items() if name not in gone}


def _refuse(values: Mapping[str, Any], name: str, reader: str, read: tuple[Any, ...]) -> None:
    wanted = ["null" if value is None else str(value) for value in read]
    raise ValueError(
        f"{name} ({values[name]}) is read only where {reader} is {' or '.join(wanted)}, and {reader} is "
        f"{values[reader]}: set {reader}={wanted[0]}, or leave {name} out"
    )
