"""The decode loop of one batch: pick tokens, end rows, let go of finished ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.sampling import LOST, STOPPED, Sampler
from d2o_dist.engine.session import RowUsage, Session, left_pad
from d2o_dist.engine.text import TextStream, decode_tokens
from d2o_dist.engine.trace import Trace
from d2o_dist.evict.budgets import NOT_FINITE_BECAUSE


@dataclass
class Generated:
    """What one row became.

    Attributes:
        tokens: ids generated, an end-of-sequence token included.
        text: their text without special tokens, cut before a stop string.
        finish_reason: `eos`, `stop` (a stop string) or `length` (`max_new_tokens`).
        error: why the row ended with nothing to choose from; its other attributes then mean nothing. None: it did not.
        time_to_first_token_s: from the start of the batch's prefill to its first token: prefill, finalize, one choice.
            Rows of one batch share it.
        tokens_per_s: the row's tokens after the first, over the time from the first to its last; None for one token.
        usage: what the cache held for the row when it ended; None until then.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    time_to_first_token_s: float = 0.0
    tokens_per_s: float | None = None
    usage: RowUsage | None = None
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None or self.error is not None


class _Row:
    """A row on its way."""

    def __init__(self, request: Request, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.request = request
        self.result = Generated()
        self._tokenizer = tokenizer
        self._on_text = on_text
        # Text is decoded along the way only for those who look at it.
        self._stream = TextStream(tokenizer, request.stop) if request.stop or on_text else None

    def take(self, token: int, eos_ids: frozenset[int]) -> bool:
        """Add a token; whether the row ends with it."""
        result = self.result
        result.tokens.append(token)
        if self._stream is not None:
            # An end-of-sequence token too: a stop string may hold it.
            self._say(self._stream.push(token))
            if self._stream.stopped:
                result.finish_reason = "stop"
        if result.finish_reason is None and token in eos_ids:
            result.finish_reason = "eos"
        if result.finish_reason is None and len(result.tokens) >= self.request.max_new_tokens:
            result.finish_reason = "length"
        return result.finish_reason is not None

    def end(self, began: float, first: float, now: float, usage: RowUsage) -> None:
        """Settle text, times and memory. A stop string that the last held back piece completes still counts."""
        result = self.result
        if self._stream is None:
            result.text = decode_tokens(self._tokenizer, result.tokens)
        else:
            self._say(self._stream.finish())
            result.text = self._stream.text
            if self._stream.stopped:
                result.finish_reason = "stop"
        result.time_to_first_token_s = first - began
        steps = len(result.tokens) - 1
        result.tokens_per_s = steps / (now - first) if steps and now > first else None
        result.usage = usage

    def lose(self, layer: int | None) -> None:
        """End without a next token. `layer`: the first whose keys or values are not finite."""
        number = len(self.result.tokens) + 1
        where = "new token 1, right after the prompt," if number == 1 else f"new token {number}"
        since = "" if layer is None else f", and keys or values from layer {layer} on"
        self.result.error = f"the logits of {where} are NaN or infinite{since}: {NOT_FINITE_BECAUSE}"

    def _say(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(piece)


@torch.inference_mode()
def generate(
    session: Session,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    tokenizer: Any,
    *,
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
    chunk: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_prefill: Callable[[], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
    trace: Trace | None = None,
    stops: Callable[[], bool] = lambda: False,
) -> list[Generated]:
    """Run one batch to its end; the results are in the order of the requests.

    A row whose logits are NaN or infinite ends with an error, on all ranks of the request; the others go on.

    Args:
        session: a fresh one.
        eos_ids: ids that end a row, unless `sampling.ignore_eos`.
        chunk: prompt tokens of one forward; None: all at once.
        on_text: called with every new piece of text; for a batch of one row.
        on_prefill: called when the prompts are read and compressed; on_step: after each choice of tokens.
        trace: told of every decode step.
        stops: whether this rank wants to end the run. If one of them does, all return after the same step, and rows
            that are not at their end have no `finish_reason` and no `error`.
    """
    eos_ids = frozenset() if sampling.ignore_eos else eos_ids
    prompts = [request.input_ids for request in requests]
    rows = [_Row(request, tokenizer, on_text) for request in requests]
    began = time.perf_counter()
    indices = [request.index for request in requests]
    sampler = Sampler(sampling, indices, prompts, session.device, session.cache.ranks, stops)
    logits = session.prefill(*left_pad(prompts, pad_id), chunk)
    if on_prefill is not None:
        on_prefill()
    tokens = sampler.pick(logits)
    first = time.perf_counter()
    batch = list(rows)
    while tokens[0] != STOPPED:
        on_step()
        # The tokens are on the host, so the device has done all that this clock should count.
        now = time.perf_counter()
        going = [(place, row) for place, row in enumerate(batch) if not row.result.has_ended]
        lost = [(place, row) for place, row in going if tokens[place] == LOST]
        layers = session.layers_not_finite() if lost else []
        for place, row in lost:
            row.lose(layers[place])
        for place, row in going:
            if tokens[place] != LOST and row.take(tokens[place], eos_ids):
                row.end(began, first, now, session.row_usage(place))
        present = [not row.result.has_ended for row in batch]
        if not any(present):
            break
        if 2 * sum(present) <= len(present):
            places = [place for place, goes_on in enumerate(present) if goes_on]
            session.keep_rows(places)
            sampler.keep_rows(places)
            batch, tokens = [batch[place] for place in places], [tokens[place] for place in places]
            present = [True] * len(batch)
        # A finished row that stays is fed padding, which the cache does not store.
        fed = [token if goes_on else pad_id for token, goes_on in zip(tokens, present, strict=True)]
        with nullcontext() if trace is None else trace.step():
            logits = session.decode(fed, present)
        tokens = sampler.pick(logits)
    return [row.result for row in rows]
