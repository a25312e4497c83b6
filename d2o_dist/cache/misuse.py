"""Refusals of calls that come at the wrong time, or for rows that there are none of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2o_dist.layout.forward import Chunk, Forward


def check_first_prefill(cache: Any, rule: str) -> None:
    """Refuse where the first prompt was not read yet, or is compressed.

    Raises:
        ValueError: says `rule`.
    """
    if cache.phase != "prefill" or cache.plans is not None or not cache.num_seen_columns or cache.in_forward:
        raise ValueError(f"{rule}; this cache is in phase {cache.phase} and has seen {cache.num_seen_columns} tokens")


def check_looks(cache: Any, rereads: bool) -> None:
    """Refuse to read a prompt twice for a model some of whose layers attend to keys of others.

    Raises:
        ValueError: says so.
    """
    if rereads and cache.order.looks:
        raise ValueError(
            f"a prompt cannot be read a second time (score.rule reread) by a model whose layers share keys and values: "
            f"{len(cache.order.looks)} of them have none of their own"
        )


def check_rereading(cache: Any) -> None:
    """Refuse a second reading of a prompt.

    Raises:
        ValueError: the first is not done, or is compressed, or was not by heads (`sp_prefill`); see `check_looks`.
    """
    check_looks(cache, rereads=True)
    check_first_prefill(cache, "a prompt is read a second time after the first and before it is compressed")
    if cache.dealing.layout.is_spread:
        raise ValueError(
            f"sp_prefill ({cache.ranks.parallel.sp_prefill}) must be ulysses to read a prompt a second time with sp "
            f"({cache.ranks.sp.size})"
        )


def check_step(cache: Any, present: Sequence[bool] | None) -> None:
    """Refuse to announce a decode step.

    Raises:
        ValueError: nothing was read yet, other rows than the cache has, or another step is open.
    """
    if cache.in_forward or cache.step_announced:
        raise ValueError("a decode step was announced in the middle of another forward or step")
    if not cache.num_seen_columns:
        raise ValueError("a decode step was announced before any token was seen")
    if present is not None and len(present) != len(cache.num_seen):
        raise ValueError(f"a step of {len(present)} rows was announced, but the cache has {len(cache.num_seen)}")


def check_finalize(cache: Any) -> None:
    """Refuse to end a prompt.

    Raises:
        ValueError: in the middle of a forward; nothing was read yet, or not a second time where that is needed.
    """
    if cache.in_forward:
        raise ValueError("finalize() was called in the middle of a forward")
    if not cache.num_seen_columns:
        raise ValueError(
            "finalize() was called before any token was seen: no forward of the model was given this cache. Read the "
            "prompt first, with past_key_values=cache"
        )
    if cache.config.needs_reread and cache.plans is None and not any(cache.num_reread):
        raise ValueError(
            'score.rule "reread" ranks tokens by a second reading of the prompt, and there was none: call '
            "cache.reread(model, input_ids) before finalize() or generate()"
        )


def check_joinable(one: Any, other: Any) -> None:
    """Refuse to let rows of two caches share their steps.

    Raises:
        ValueError: one of them is not decoding, or they are of another model, configuration or mesh.
    """
    mine, theirs = ((cache.config, cache.windows, cache.ranks.parallel) for cache in (one, other))
    phases = {one.phase, other.phase}
    if mine != theirs or phases != {"decode"} or one.step_announced or one.in_forward:
        raise ValueError(
            "only caches of one model, configuration and mesh can be joined, which have read their prompts and are "
            f"between two steps: they are in phase {one.phase} and {other.phase}"
        )


def check_rows(rows: Sequence[int], count: int) -> None:
    """Refuse to go on with rows that are not among the cache's `count`, or with none.

    Raises:
        ValueError: names the row.
    """
    if not rows:
        raise ValueError(f"no row was selected of the cache's {count}: others need a new cache")
    for row in rows:
        if not 0 <= row < count:
            raise ValueError(f"row {row} was selected, but the cache has {count} rows")


def check_blocks(cache: Any, forward: Forward) -> None:
    """Refuse a forward in which tokens attend to each other both ways.

    Raises:
        ValueError: ranks share its tokens.
    """
    if cache.ranks.deals_tokens or not isinstance(forward, Chunk):
        raise ValueError(
            f"sp ({cache.ranks.sp.size}) cannot share a text in which tokens attend to later ones (images): use tp, dp"
        )
