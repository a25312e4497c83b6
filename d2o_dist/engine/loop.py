"""Rows that decode together: read them, pick their tokens, end them, let go of those that have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2o_dist.comm.agreement import failing_alike
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.sampling import LOST, STOPPED, Sampler
from d2o_dist.engine.session import RowUsage, Session, left_pad
from d2o_dist.engine.text import TextStream, decode_tokens
from d2o_dist.engine.trace import Trace
from d2o_dist.evict.budgets import NOT_FINITE_BECAUSE

# Rows that have ended are dropped once they were padding, added up, in so many steps for each row that goes on. It
# moves all slots that stay: half a step of SmolLM2-135M on a CPU, where eight rows cost little more than seven.
PADDING_STEPS = 4


@dataclass
class Generated:
    """What one row became.

    Attributes:
        tokens: ids generated, an end-of-sequence token included.
        text: their text without special tokens, cut before a stop string.
        finish_reason: `eos`, `stop` (a stop string) or `length` (`max_new_tokens`).
        error: why the row ended with nothing to choose from; its other attributes then mean nothing. None: it did not.
        time_to_first_token_s: from the start of the row's reading to its first token: prefill, finalize, one choice.
            Rows that were read together share it.
        tokens_per_s: the row's tokens after the first, over the time from the first to its last, readings of other rows
            meanwhile included; None for one token.
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


class Row:
    """A row on its way.

    Attributes:
        request: what it was made from; result: what it has become so far.
    """

    def __init__(self, request: Request, tokenizer: Any, on_text: Callable[[str], None] | None = None) -> None:
        self.request = request
        self.result = Generated()
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._began = time.perf_counter()
        self._first = 0.0
        # Text is decoded along the way only for those who look at it.
        self._stream = TextStream(tokenizer, request.stop) if request.stop or on_text else None

    def take(self, token: int, eos_ids: frozenset[int], now: float) -> bool:
        """Add a token; whether the row ends with it."""
        result = self.result
        if not result.tokens:
            self._first = now
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

    def end(self, now: float, usage: RowUsage) -> None:
        """Settle text, times and memory. A stop string that the last held back piece completes still counts."""
        result = self.result
        if self._stream is None:
            result.text = decode_tokens(self._tokenizer, result.tokens)
        else:
            self._say(self._stream.finish())
            result.text = self._stream.text
            if self._stream.stopped:
                result.finish_reason = "stop"
        result.time_to_first_token_s = self._first - self._began
        steps = len(result.tokens) - 1
        result.tokens_per_s = steps / (now - self._first) if steps and now > self._first else None
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


class Running:
    """Rows that decode together: those that were read together, and those that joined them since.

    Each row picks by itself, so what becomes of it does not depend on the others. A row whose logits are NaN or
    infinite ends with an error, on all ranks of the request. All of them make the same calls.

    Args:
        session: a fresh one, into which the prompts are read.
        eos_ids: ids that end a row, unless `sampling.ignore_eos`.
        chunk: prompt tokens of one forward; None: all at once.
        on_text: called with every new piece of text; for one row.
        trace: told of every decode step.
        stops: whether this rank wants to end the run; asked at every choice of tokens.

    Attributes:
        rows: of the session, in its order; those that have ended stay among them until they are dropped.
        stopped: whether a rank wants to end the run. Rows that are not at their end then stay without one.
    """

    @torch.inference_mode()
    def __init__(
        self,
        session: Session,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        tokenizer: Any,
        *,
        eos_ids: frozenset[int] = frozenset(),
        pad_id: int = 0,
        chunk: int | None = None,
        on_text: Callable[[str], None] | None = None,
        trace: Trace | None = None,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        self.session, self._pad_id, self._trace = session, pad_id, trace
        self.stopped = False
        self._eos_ids = frozenset() if sampling.ignore_eos else eos_ids
        self.rows = [Row(request, tokenizer, on_text) for request in requests]
        prompts, indices = [request.input_ids for request in requests], [request.index for request in requests]
        self._sampler = Sampler(sampling, indices, prompts, session.device, session.cache.ranks, stops)
        self._num_padding = 0
        self._take(session.prefill(*left_pad(prompts, pad_id), chunk))

    @property
    def live(self) -> list[bool]:
        """Which of the rows go on."""
        return [not row.result.has_ended for row in self.rows]

    @property
    def going(self) -> list[Row]:
        """The rows that go on."""
        return [row for row in self.rows if not row.result.has_ended]

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token more for each row that goes on, of which there is one; those that have ended with it."""
        live = self.live
        self._num_padding += live.count(False)
        if self._num_padding >= PADDING_STEPS * sum(live):
            self.drop_ended()
            live = self.live
        # A row that has ended and stays is fed padding, which the cache does not store.
        fed = [token if goes_on else self._pad_id for token, goes_on in zip(self._tokens, live, strict=True)]
        with nullcontext() if self._trace is None else self._trace.step():
            logits = self.session.decode(fed, live)
        return self._take(logits)

    @torch.inference_mode()
    def join(self, *others: Running) -> None:
        """Go on with the rows of others too, which are not used afterwards; rows that have ended are dropped. All have
        rows that go on.

        Raises:
            AgreedError: on all ranks of the request, if it fails on one, for it copies all slots. None of the rows can
                go on then.
        """
        with failing_alike(self.session.cache.ranks.request):
            for one in (self, *others):
                one.drop_ended()
            self.session.join(*(other.session for other in others))
            for other in others:
                self._sampler.join(other._sampler)
                self.rows, self._tokens = self.rows + other.rows, self._tokens + other._tokens

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Free the memory of the rows that have ended; others must be there."""
        places = [place for place, goes_on in enumerate(self.live) if goes_on]
        self._num_padding = 0
        if len(places) < len(self.rows):
            self.session.keep_rows(places)
            self._sampler.keep_rows(places)
            self.rows, self._tokens = [self.rows[n] for n in places], [self._tokens[n] for n in places]

    def _take(self, logits: Tensor) -> list[Row]:
        """Pick the next tokens; the rows that end with them."""
        going = [(place, row) for place, row in enumerate(self.rows) if not row.result.has_ended]
        self._tokens = tokens = self._sampler.pick(logits)
        if tokens[0] == STOPPED:
            self.stopped = True
            return []
        # The tokens are on the host, so the device has done all that this clock should count.
        now = time.perf_counter()
        lost = [(place, row) for place, row in going if tokens[place] == LOST]
        layers = self.session.layers_not_finite() if lost else []
        for place, row in lost:
            row.lose(layers[place])
        for place, row in going:
            if tokens[place] != LOST and row.take(tokens[place], self._eos_ids, now):
                row.end(now, self.session.row_usage(place))
        return [row for _, row in going if row.result.has_ended]


def generate(
    session: Session, requests: Sequence[Request], sampling: SamplingConfig, tokenizer: Any, **options: Any
) -> list[Generated]:
    """Run some rows to their end, without others; the results are in the order of the requests.

    Args:
        options: see `Running`, the other arguments too.
    """
    running = Running(session, requests, sampling, tokenizer, **options)
    rows = list(running.rows)
    while running.going and not running.stopped:
        running.step()
    return [row.result for row in rows]
