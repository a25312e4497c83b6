"""Which rows run when: prompts are read when there is room, join the rows that decode, and leave when they end.

All ranks that share the requests decide alike, for what decides is known to all of them: lengths, limits, and when rows
ended.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import Generated, Row, Running
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.policy.config import D2OConfig

Ended = tuple[Request, Generated]

# Places are filled once they were free, added up, in so many steps for each row that runs. It moves all slots: one and
# a half steps of eight rows of SmolLM2-135M on a CPU.
FREE_STEPS = 1


@dataclass(frozen=True)
class Room:
    """How much runs at once.

    Tokens are counted as they take memory, rows that decode each as the widest of them. A prompt that is read counts
    with all its tokens, and a row that decodes with what it keeps at most, new tokens included. The limit holds for
    both together while a prompt is read beside rows that decode, and for what all of them keep afterwards.

    Attributes:
        rows, tokens: at most.
        border: rows of up to so many tokens and longer ones do not run together; None: all may.
        d2o: says what a row keeps.
    """

    rows: int
    tokens: int
    d2o: D2OConfig
    border: int | None = None

    def fits(self, running: Sequence[Request], new: Request) -> bool:
        """Whether a prompt can be read beside rows that run. Where there are none it always can: a row beyond the limit
        runs alone."""
        if not running:
            return True
        everyone = [*running, new]
        if len(everyone) > self.rows:
            return False
        if self.border is not None and len({len(each.input_ids) > self.border for each in everyone}) > 1:
            return False
        kept = max(map(self._kept, running))
        return max(len(running) * kept + len(new.input_ids), len(everyone) * max(kept, self._kept(new))) <= self.tokens

    def _kept(self, request: Request) -> int:
        return self.d2o.most_kept(len(request.input_ids), request.max_new_tokens)


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """In the order in which they are admitted: neighbours are alike, and a lack of memory shows at once."""
    return sorted(requests, key=lambda request: (-len(request.input_ids), request.index))


class Scheduler:
    """Runs requests to their end.

    Each prompt is read by itself, so that its reading is always the same computation. What fails beside others is tried
    again alone, when those that run have ended; what fails alone has an error for its result.

    Args:
        waiting: requests, in the order in which they are admitted. Asked for one when there is a place for it.
        read: reads prompts, here one, into a session of their own.
        alone: indices of requests that are run alone.
        on_failure: told of requests that have failed together, and why; what it raises ends the run.
        on_step: called after every step.
        log: called with a line about requests that are tried again.

    Attributes:
        running: the rows that decode, those that ended with the last step among them; None if there are none.
        rank_bytes: buffers of the largest cache that decoded, on this rank.
    """

    def __init__(
        self,
        waiting: Iterator[Request],
        read: Callable[[Sequence[Request]], Running],
        room: Room,
        *,
        alone: Collection[int] = (),
        on_failure: Callable[[Sequence[Request], Exception], None] = lambda requests, error: None,
        on_step: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.running: Running | None = None
        self.rank_bytes = 0
        self._waiting, self._read, self._room, self._alone = waiting, read, room, alone
        self._on_failure, self._on_step, self._log = on_failure, on_step, log
        self._next: Request | None = None
        # Requests to try again, alone.
        self._again: list[Request] = []
        # Whether nobody joins those that run.
        self._closed = self._stopped = False
        self._ended: list[Ended] = []
        # Steps that places were free for, added up over the places, since the last reading.
        self._num_free = 0

    def run(self) -> Iterator[list[Ended]]:
        """What has ended, as it ends; until all have, or a rank wants to end the run."""
        while not self._stopped and (self._going or self._again or self._peek() is not None):
            self._advance()
            self._on_step()
            ended, self._ended = self._ended, []
            if ended:
                yield ended

    @property
    def _going(self) -> list[Request]:
        return [] if self.running is None else [row.request for row in self.running.going]

    def _peek(self) -> Request | None:
        if self._next is None:
            self._next = next(self._waiting, None)
        return self._next

    def _advance(self) -> None:
        """Read what is admitted, and decode a step."""
        going = self._going
        admitted = self._admit(going)
        if admitted and not going:
            self.running = None  # its memory goes before more is taken
        arrived: list[Running] = []
        for request in admitted:
            beside = [*going, *(row.request for read in arrived for row in read.going)]
            read = self._try([request], beside, self._read, [request])
            if read is not None and self._note(read, read.rows) and read.going:
                arrived.append(read)
        if self._stopped:
            return
        if arrived:
            stake = [*going, *(row.request for read in arrived for row in read.going)]
            self._try(stake, stake, self._join, arrived)
        if going := self._going:
            ended = self._try(going, going, self.running.step)
            if ended is not None:
                self._note(self.running, ended)

    def _join(self, arrived: list[Running]) -> None:
        if self._going:
            self.running.join(*arrived)
        else:
            self.running = arrived[0]
            if len(arrived) > 1:
                self.running.join(*arrived[1:])
        self.rank_bytes = max(self.rank_bytes, self.running.session.rank_bytes)

    def _note(self, running: Running, rows: Iterable[Row]) -> bool:
        """What became of rows; whether the run goes on."""
        self._ended += [(row.request, row.result) for row in rows if row.result.has_ended]
        self._stopped = self._stopped or running.stopped
        return not self._stopped

    def _admit(self, going: Sequence[Request]) -> list[Request]:
        """The prompts to read now."""
        if not going:
            self._closed = False
        if self._closed or (self._again and going):
            return []
        if self._again:
            self._closed = True
            return [self._again.pop(0)]
        self._num_free += self._room.rows - len(going)
        if self._num_free < FREE_STEPS * len(going):
            return []
        admitted: list[Request] = []
        while not self._closed and (new := self._peek()) is not None:
            alone = new.index in self._alone
            beside = [*going, *admitted]
            if (alone and beside) or not self._room.fits(beside, new):
                break
            self._closed = alone
            admitted.append(new)
            self._next = None
        if admitted:
            self._num_free = 0
        return admitted

    def _try(self, stake: Sequence[Request], beside: Sequence[Request], call: Callable[..., Any], *args: Any) -> Any:
        """What a call gives; None if it failed.

        Args:
            stake: requests that are lost then; beside: those that run meanwhile.
        """
        try:
            return call(*args)
        except Exception as error:
            self._on_failure(stake, error)
            finite = not isinstance(error, NotFiniteError)
            message = f"{type(error).__name__}: {error}" if finite else str(error)
        if any(request in stake for request in self._going):
            self.running = None
        if len(stake) == 1 and (not finite or all(request in stake for request in beside)):
            self._ended.append((stake[0], Generated(error=message)))
        else:
            if len(stake) > 1:
                self._log(f"a batch of {len(stake)} rows failed ({message}); its rows are tried one by one")
            else:
                self._log(f"row {stake[0].index} failed beside others ({message}); it is tried alone")
            self._again += stake
        # Out of the except block, so that the traceback lets go of tensors before the next try.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
