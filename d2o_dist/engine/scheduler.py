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

from d2o_dist.comm.agreement import AgreedError
from d2o_dist.engine.encode import Request
from d2o_dist.engine.loop import Generated, Row, Running
from d2o_dist.evict.budgets import NotFiniteError

Ended = tuple[Request, Generated]

# Places are filled once they were free, added up, in so many steps for each row that runs. It moves all slots: one and
# a half steps of eight rows of SmolLM2-135M on a CPU.
FREE_STEPS = 1


# By layer, or by head of each layer, the slots that there are for a row.
Kept = list[float]


@dataclass(frozen=True)
class Room:
    """How much runs at once.

    Tokens are counted as they take memory: a prompt that is read with all of them, or with what it keeps and one layer
    where it is read layer by layer; a row that decodes with the slots that it keeps at most, which are known when it
    was read, in each layer as the widest of the rows. The limit holds
    for both together while a prompt is read, and for what all rows keep that decode together.

    Attributes:
        rows, tokens: at most.
        border: rows of up to so many tokens and longer ones do not run together; None: all may.
        reading: tokens of a prompt -> of how many the cache is in memory at once while it is read.
    """

    rows: int
    tokens: int
    border: int | None = None
    reading: Callable[[int], float] = float

    def reads(self, kept: Sequence[Kept], beside: Sequence[Request], new: Request) -> bool:
        """Whether a prompt can be read beside rows that keep so much. Where there are none it always can."""
        if not beside:
            return True
        sides = {self.border is not None and len(each.input_ids) > self.border for each in (*beside, new)}
        needed = _size(kept) + self.reading(len(new.input_ids))
        return len(beside) < self.rows and len(sides) == 1 and needed <= self.tokens

    def holds(self, kept: Sequence[Kept]) -> bool:
        """Whether rows can decode together. One always can: a row beyond the limit runs alone."""
        return len(kept) <= 1 or _size(kept) <= self.tokens


def _size(kept: Sequence[Kept]) -> float:
    """Tokens of rows that lie side by side, in a layer in the mean."""
    return len(kept) * sum(map(max, zip(*kept, strict=True))) / max(1, len(kept[0])) if kept else 0


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
        # Prompts that were read, and wait for room to join; what each request keeps that was read.
        self._arrived: list[Running] = []
        self._kept: dict[int, Kept] = {}
        # Requests to try again, alone.
        self._again: list[Request] = []
        # Whether nobody joins those that run.
        self._closed = self._stopped = False
        self._ended: list[Ended] = []
        # Steps that places were free for, added up over the places, since the last reading.
        self._num_free = 0

    def run(self) -> Iterator[list[Ended]]:
        """What has ended, as it ends; until all have, or a rank wants to end the run."""
        while not self._stopped and (self._everyone or self._again or self._peek() is not None):
            self._advance()
            self._on_step()
            ended, self._ended = self._ended, []
            if ended:
                yield ended

    @property
    def _going(self) -> list[Request]:
        return [] if self.running is None else [row.request for row in self.running.going]

    @property
    def _everyone(self) -> list[Request]:
        return [*self._going, *(row.request for read in self._arrived for row in read.going)]

    def _peek(self) -> Request | None:
        if self._next is None:
            self._next = next(self._waiting, None)
        return self._next

    def _advance(self) -> None:
        """Read what is admitted, and decode a step."""
        self._join_arrived()
        opens = self._opens()
        # What waits for room is the next to join.
        while opens and not self._waits and (request := self._admit()) is not None:
            read = self._try([request], self._everyone, self._read, [request])
            if read is None:
                continue
            if not self._note(read, read.rows):
                return
            if read.going:
                self._kept[request.index] = read.session.most_kept(0, len(request.input_ids) + request.max_new_tokens)
                self._arrived.append(read)
        self._join_arrived()
        if going := self._going:
            ended = self._try(going, going, self.running.step)
            if ended is not None:
                self._note(self.running, ended)

    @property
    def _waits(self) -> bool:
        """Whether there is no room for all that were read."""
        return bool(self._arrived) and not self._room.holds([self._kept[each.index] for each in self._everyone])

    def _join_arrived(self) -> None:
        """Let those join that there is room for."""
        going, arrived = self._going, self._arrived
        if not arrived:
            return
        count = len(arrived) - self._waits  # only the last one may wait
        self._arrived, joining = arrived[count:], arrived[:count]
        if joining:
            stake = [*going, *(row.request for read in joining for row in read.going)]
            self._try(stake, stake, self._join, joining)

    def _join(self, arrived: list[Running]) -> None:
        if not self._going:
            self.running = arrived.pop(0)
        if arrived:
            self.running.join(*arrived)
        self.rank_bytes = max(self.rank_bytes, self.running.session.rank_bytes)

    def _note(self, running: Running, rows: Iterable[Row]) -> bool:
        """What became of rows; whether the run goes on."""
        self._ended += [(row.request, row.result) for row in rows if row.result.has_ended]
        self._stopped = self._stopped or running.stopped
        return not self._stopped

    def _opens(self) -> bool:
        """Whether prompts may be read now, if there is room for them."""
        going = self._everyone
        if not self._going:
            self.running = None  # its memory goes before more is taken
        if not going:
            self._closed = False
        if self._closed or (self._again and going):
            return False
        self._num_free += self._room.rows - len(going)
        return self._num_free >= FREE_STEPS * len(going)

    def _admit(self) -> Request | None:
        """The next prompt to read."""
        beside = self._everyone
        if self._again:
            if beside:
                return None
            self._closed = True
            return self._again.pop(0)
        new = None if self._closed else self._peek()
        if new is None or (alone := new.index in self._alone) and beside:
            return None
        if not self._room.reads([self._kept[each.index] for each in beside], beside, new):
            return None
        if self.running is not None:
            held = [*beside, *(row.request for row in self.running.rows if row.result.has_ended)]
            if not self._room.reads([self._kept[each.index] for each in held], beside, new):
                self.running.drop_ended()
        self._closed, self._next, self._num_free = alone, None, 0
        return new

    def _try(self, stake: Sequence[Request], beside: Sequence[Request], call: Callable[..., Any], *args: Any) -> Any:
        """What a call gives; None if it failed.

        Args:
            stake: requests that are lost then; beside: those that run meanwhile.
        """
        try:
            return call(*args)
        except Exception as error:
            self._on_failure(stake, error)
            final = isinstance(error, NotFiniteError)
            # What ranks agreed on names the type of the one that failed.
            agreed = isinstance(error, AgreedError)
            message = str(error) if final or agreed else f"{type(error).__name__}: {error}"
        if any(request in stake for request in self._going):
            self.running = None
        if len(stake) == 1 and (final or all(request in stake for request in beside)):
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
