"""Which rows run when: prompts are read when there is room, join the rows that decode, and leave when they end.

All ranks that share the requests decide alike, for what decides is known to all of them: lengths, limits, and when rows
ended.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from d2o_dist.engine.batching import alike
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

    Tokens are counted as they take memory, each row as the widest beside it. A prompt that is read counts with all its
    tokens, and a row that decodes with what it keeps at most, new tokens included. The limit holds for both together
    while prompts are read beside rows that decode, and for what all of them keep afterwards.

    Attributes:
        rows, tokens: at most.
        border: rows of up to so many tokens and longer ones do not run together; None: all may.
        d2o: says what a row keeps.
    """

    rows: int
    tokens: int
    d2o: D2OConfig
    border: int | None = None

    def fits(self, running: Sequence[Request], read: Sequence[Request], new: Request) -> bool:
        """Whether a prompt can be read together with some that are as long or longer, beside rows that run. Where there
        are neither it always can: a row beyond the limit runs alone."""
        together = [*running, *read]
        if not together:
            return True
        lengths = [len(request.input_ids) for request in (*together, new)]
        if len(lengths) > self.rows or (read and not alike(lengths[-1], lengths[len(running)], self.border)):
            return False
        if self.border is not None and len({length > self.border for length in lengths}) > 1:
            return False
        held = len(running) * max(map(self._kept, running), default=0)
        prompts = (len(read) + 1) * lengths[len(running)]
        kept = len(lengths) * max(map(self._kept, (*together, new)))
        return max(held + prompts, kept) <= self.tokens

    def _kept(self, request: Request) -> int:
        return self.d2o.most_kept(len(request.input_ids), request.max_new_tokens)


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """In the order in which they are admitted: neighbours are alike, and a lack of memory shows at once."""
    return sorted(requests, key=lambda request: (-len(request.input_ids), request.index))


class Scheduler:
    """Runs requests to their end.

    Before a decode step at most one group of prompts is read, so that rows that run do not wait for more. What fails
    beside others is tried again alone, when those that run have ended; what fails alone has an error for its result.

    Args:
        waiting: requests, in the order in which they are admitted. Asked for one when there is a place for it.
        read: reads prompts into a session of their own.
        on_failure: told of requests that have failed together, and why; what it raises ends the run.
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
        on_failure: Callable[[Sequence[Request], Exception], None] = lambda requests, error: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.running: Running | None = None
        self.rank_bytes = 0
        self._waiting, self._read, self._room, self._on_failure, self._log = waiting, read, room, on_failure, log
        self._next: Request | None = None
        # Requests to try alone, and whether those that run are such a one.
        self._alone: list[Request] = []
        self._tried_alone = False
        self._ended: list[Ended] = []
        # What is lost if the call that is made now fails.
        self._at_stake: list[Request] = []
        # Steps that places were free for, added up over the places, since the last reading.
        self._num_free = 0

    def run(self) -> Iterator[list[Ended]]:
        """What has ended, as it ends."""
        while self._going or self._alone or self._peek() is not None:
            failed = False
            try:
                self._advance()
            except Exception as error:
                self._on_failure(self._at_stake, error)
                finite = not isinstance(error, NotFiniteError)
                self._put_aside(f"{type(error).__name__}: {error}" if finite else str(error), alone=not finite)
                failed = True
            if failed:  # out of the except block, so that the traceback lets go of tensors before the next try
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
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
        if group := self._admit(going):
            if not going:
                self.running = None  # its memory goes before more is taken
            self._at_stake = group
            read = self._read(group)
            self._note(read.rows)
            if not going:
                self.running = read
            elif read.going:
                self._at_stake = [*going, *(row.request for row in read.going)]
                self.running.join(read)
            self.rank_bytes = max(self.rank_bytes, self.running.session.rank_bytes)
        self._at_stake = self._going
        if self._at_stake:
            self._note(self.running.step())

    def _note(self, rows: Iterable[Row]) -> None:
        self._ended += [(row.request, row.result) for row in rows if row.result.has_ended]

    def _admit(self, going: Sequence[Request]) -> list[Request]:
        """The prompts to read now."""
        if self._alone or self._tried_alone:
            if going:
                return []
            self._tried_alone = bool(self._alone)
            if self._tried_alone:
                return [self._alone.pop(0)]
        self._num_free += self._room.rows - len(going)
        if self._num_free < FREE_STEPS * len(going):
            return []
        group: list[Request] = []
        while len(going) + len(group) < self._room.rows and (new := self._peek()) is not None:
            if not self._room.fits(going, group, new):
                break
            group.append(new)
            self._next = None
        if group:
            self._num_free = 0
        return group

    def _put_aside(self, error: str, *, alone: bool) -> None:
        """End a request that failed alone, or keep those that failed together to try them alone."""
        failed = self._at_stake
        if any(request in failed for request in self._going):
            self.running = None
        if len(failed) == 1 and (alone or not self._going):
            self._ended.append((failed[0], Generated(error=error)))
            return
        self._log(f"a batch of {len(failed)} rows failed ({error}); its rows are tried one by one")
        self._alone += failed
