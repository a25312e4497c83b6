"""Decode steps of one batch: run by Python, or recorded once and replayed for as long as nothing they touch moves.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2o_dist.models.base import ModelAdapter
from d2o_dist.models.cache import ModelCache
from d2o_dist.slots.step import DecodeStep

_logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records what a forward does to memory, so that it can be done again without Python."""

    def warm_up(self, run: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        """Run it as it is: its result, and what in it cannot be recorded, or None."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What replays it, and returns its result, in the same memory each time. Recording itself changes nothing."""


class Stepper:
    """The decode steps of one model, over one cache or several in turn.

    With a recorder, the first step of a kind is run by Python to warm up, the second is recorded, and it and those that
    follow are replays. A step is of another kind when the cache is another or its buffers moved, the batch changed, a
    later turn was read, or a row ended for the first time: then the recording is let go of, and the next one made.
    Evictions are between steps, and never recorded.

    Args:
        recorder: None runs every step by Python.
        required: whether a forward that cannot be recorded is an error. Otherwise steps then run by Python, and a
            warning says why.
        multiple: the rows of a forward are a multiple of it, with padding after those of the cache.

    Attributes:
        num_replayed: steps that were replays.
    """

    def __init__(
        self, model: ModelAdapter, recorder: Recorder | None, *, required: bool = False, multiple: int = 1
    ) -> None:
        self._model, self._recorder, self._required, self._multiple = model, recorder, required, multiple
        self._ids: Tensor | None = None
        self._warm: DecodeStep | None = None
        self._replay: Callable[[], Tensor] | None = None
        self.num_replayed = 0

    def step(self, cache: ModelCache, tokens: Sequence[int] | Tensor, present: Sequence[bool] | None = None) -> Tensor:
        """The rows' newest tokens [B] -> next-token logits [B, V].

        Args:
            present: rows that go on. The others hold no more tokens, and their logits mean nothing. None: all go on.

        Raises:
            ValueError: the forward cannot be recorded, and must be.
        """
        ids = torch.as_tensor(tokens)[:, None]
        step = cache.begin_step(present, -len(ids) % self._multiple)
        if self._recorder is None:
            logits = self._run(cache, ids.to(step.positions.device), step)
        else:
            logits = self._recorded(cache, ids, step)
        cache.end_step()
        return logits

    def _recorded(self, cache: ModelCache, ids: Tensor, step: DecodeStep) -> Tensor:
        if self._warm is not step:
            # Let go of the old recording and its memory before a new one is made.
            self._warm, self._replay = step, None
            self._ids = ids.to(step.positions.device, copy=True)
            logits, obstacle = self._recorder.warm_up(lambda: self._run(cache, self._ids, step))
            if obstacle is not None:
                self._give_up(obstacle)
            return logits
        self._ids.copy_(ids)
        if self._replay is None:
            try:
                self._replay = self._recorder.record(lambda: self._run(cache, self._ids, step))
            except Exception:
                cache.abandon_step()
                raise
        self.num_replayed += 1
        # Whoever takes the logits may keep them; the next replay writes its own into the same memory.
        return self._replay().clone()

    def _run(self, cache: ModelCache, ids: Tensor, step: DecodeStep) -> Tensor:
        rows, padding = len(ids), cache.step_padding
        ids, positions = (pad(one, (0, 0, 0, padding)) for one in (ids, step.positions[:, None]))
        return self._model.forward(ids, positions, cache)[:rows]

    def _give_up(self, obstacle: str) -> None:
        if self._required:
            raise ValueError(f"a decode step of this model cannot be recorded: {obstacle}")
        _warn(f"decode steps are run by Python, not as a CUDA graph: {obstacle}")
        self._recorder = None


@once
def _warn(message: str) -> None:
    """Once, however many batches it is true of."""
    _logger.warning(message)
