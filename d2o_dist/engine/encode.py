"""From rows to token ids, with every limit checked. It needs a tokenizer and a configuration, not the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.messages import render, uses_template
from d2o_dist.engine.prompts import PromptRow
from d2o_dist.fields.checks import check_utf8
from d2o_dist.models.shape import BORDER, ModelShape, check_side


@dataclass(frozen=True)
class Request:
    """A row that can be run.

    Attributes:
        index, id: of the row it came from.
        input_ids: token ids of the prompt, as the model sees them.
        max_new_tokens, stop: where it ends at the latest.
    """

    index: int
    id: str | int
    input_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be run; `num_prompt_tokens` is None when it did not come as far as tokens."""

    index: int
    id: str | int
    error: str
    num_prompt_tokens: int | None = None


def encode_rows(
    rows: Sequence[PromptRow], tokenizer: Any, config: InferConfig, shape: ModelShape
) -> list[Request | BadRow]:
    """A request, or the reason why there is none, for every row, in the order of the rows."""
    return [encode_row(row, tokenizer, config, shape) for row in rows]


def encode_row(row: PromptRow, tokenizer: Any, config: InferConfig, shape: ModelShape) -> Request | BadRow:
    """One row; see `encode_rows`."""
    if row.error is not None:
        return BadRow(row.index, row.id, row.error)
    max_new = config.sampling.max_new_tokens if row.max_new_tokens is None else row.max_new_tokens
    max_prompt = config.max_prompt_tokens if row.max_prompt_tokens is None else row.max_prompt_tokens
    count = None
    try:
        ids = _tokenize(row, tokenizer, config)
        count = len(ids)
        ids = _fit(ids, max_prompt, max_new, shape.max_positions, config.truncation)
        if shape.border is not None:
            _check_border(len(ids), max_new, shape.border, config)
        if shape.vocab_size is not None and max(ids) >= shape.vocab_size:
            # On a GPU such an id would end the process, and all rows with it.
            raise ValueError(
                f"token id {max(ids)} is outside the model's vocabulary ({shape.vocab_size}): the tokenizer is not "
                "this model's"
            )
    except ValueError as error:
        return BadRow(row.index, row.id, str(error), count)
    return Request(row.index, row.id, tuple(ids), max_new, config.sampling.stop if row.stop is None else row.stop)


def _tokenize(row: PromptRow, tokenizer: Any, config: InferConfig) -> list[int]:
    templated = uses_template(tokenizer, config.chat_template, row.messages is not None)
    if templated:
        messages = row.messages or ({"role": "user", "content": row.prompt},)
        text = render(tokenizer, messages, config.system_prompt)
    elif config.system_prompt is not None:
        raise ValueError("system_prompt is given, but the tokenizer has no chat template")
    else:
        text = row.prompt
    # A template writes the special tokens itself.
    ids = tokenize(tokenizer, text, config.max_prompt_bytes, special=not templated)
    if not ids:
        raise ValueError("the prompt has no tokens")
    return ids


def tokenize(tokenizer: Any, text: str, max_bytes: int, *, special: bool) -> list[int]:
    """Token ids of a text; special: with those that the tokenizer adds by itself.

    Raises:
        ValueError: it is longer than `max_prompt_bytes`, or no valid Unicode.
    """
    check_utf8("the prompt", text)
    if (size := len(text.encode("utf-8"))) > max_bytes:
        raise ValueError(f"the prompt has {size} bytes, above max_prompt_bytes ({max_bytes}): shorten it or raise that")
    # `verbose=False`: lengths are checked elsewhere, and named better.
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _fit(ids: list[int], max_prompt: int | None, max_new: int, max_positions: int | None, how: str) -> list[int]:
    """The ids, cut to the limits where `how` allows it.

    Raises:
        ValueError: they are too long and `how` is `error`, or no prompt at all would fit.
    """
    if max_positions is not None and max_new >= max_positions:
        raise ValueError(
            f"max_new_tokens ({max_new}) leaves no room for a prompt: the model's max_position_embeddings is "
            f"{max_positions}"
        )
    room = None if max_positions is None else max_positions - max_new
    limit = min((n for n in (max_prompt, room) if n is not None), default=None)
    if limit is None or len(ids) <= limit:
        return ids
    if how == "left":
        return ids[-limit:]
    if how == "middle":
        tail = limit // 2
        return ids[: limit - tail] + (ids[-tail:] if tail else [])
    if max_prompt is not None and len(ids) > max_prompt:
        raise ValueError(f"the prompt has {len(ids)} tokens, above max_prompt_tokens ({max_prompt})")
    raise ValueError(
        f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new}: together above the model's "
        f"max_position_embeddings ({max_positions})"
    )


def _check_border(count: int, max_new: int, border: int, config: InferConfig) -> None:
    """Refuse a prompt of `count` tokens whose row would not be read on one side of the border.

    Raises:
        ValueError: names the border and what crosses it.
    """
    if count > border:
        if config.prefill_chunk is not None and config.prefill_chunk <= border:
            raise ValueError(
                f"the prompt has {count} tokens, beyond the model's {BORDER} ({border}): its first chunk must be too. "
                f"prefill_chunk ({config.prefill_chunk}) must be above it, or null"
            )
        if config.parallel.sp > 1:
            raise ValueError(
                f"the prompt has {count} tokens, beyond the model's {BORDER} ({border}), and sp ({config.parallel.sp}) "
                "ranks that share it would not all read it as such: use sp 1"
            )
        return
    check_side(border, count, count + max_new - 1)  # the last token is not fed
    if config.d2o.needs_reread:
        check_side(border, count, count + min(count, config.d2o.score.chunk))
