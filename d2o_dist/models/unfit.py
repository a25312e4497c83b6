"""How an error names the weights of a checkpoint that do not fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# How many names an error shows of each kind.
_SHOWN = 3


def refuse_keys(
    what: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    other: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """Raise for keys that do not fit, if there are any.

    Args:
        what: how the message begins.
        missing: keys that the model needs; unexpected: that it has no place for.
        other: (key, shape in the file, shape in the model) where these differ.

    Raises:
        ValueError: it names some keys of each kind and says how many.
    """
    shapes = [f"{key}: {list(found)} in the file, {list(wanted)} in the model" for key, found, wanted in sorted(other)]
    kinds = [(sorted(missing), "missing"), (sorted(unexpected), "unexpected"), (shapes, "of another shape")]
    wrong = [f"{len(keys)} {'is' if len(keys) == 1 else 'are'} {kind} ({_some(keys)})" for keys, kind in kinds if keys]
    if wrong:
        raise ValueError(f"{what}: of their keys {', '.join(wrong)}")


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
