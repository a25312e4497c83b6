"""A whole inference run on one rank of any number: the weights are loaded, rows run, results are joined."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from d2o_dist.cache.report import CacheReport
from d2o_dist.comm.agreement import AgreedError, agreed, failing_alike
from d2o_dist.comm.collectives import Collectives, is_left_alone
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.reasons import peer_reason, tell_peers
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.lock import only_writer
from d2o_dist.engine.loop import Generated, Running
from d2o_dist.engine.output import lock_path
from d2o_dist.engine.paths import inputs_of
from d2o_dist.engine.plan import InferPlan
from d2o_dist.engine.reading import tokens_while_reading
from d2o_dist.engine.records import Record, cut_off_record, error_record, make_record
from d2o_dist.engine.results import BatchError, Results
from d2o_dist.engine.resume import Earlier, begin, check_job, find_earlier
from d2o_dist.engine.room import TOLERANCE, memory_of, try_room
from d2o_dist.engine.scheduler import Room, Scheduler, longest_first
from d2o_dist.engine.session import Session
from d2o_dist.engine.steady import agreed_rows
from d2o_dist.engine.stop import Stop
from d2o_dist.engine.summary import Summary, Times
from d2o_dist.engine.trace import Trace
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.fields.show import shown
from d2o_dist.models import loading
from d2o_dist.models.cache import settle_reading
from d2o_dist.models.rules import settle_rules
from d2o_dist.plan.memory import PromptMemory


class InferRunner:
    """Runs requests. All ranks that hold one request call it together.

    Args:
        num_rows: of the whole job, finished or not.
        on_text: called with pieces of text as they come; on_report: with the cache's report when all rows are done.
        log: called with a line about something that went wrong and was dealt with.
        stop: asked at every step whether the run is to end.
        cut_off: indices of rows that are tried once more, each alone (see `records.cut_off_record`).

    Attributes:
        times: of the rows that were finished.
    """

    def __init__(
        self,
        config: InferConfig,
        model: Any,
        tokenizer: Any,
        mesh: ParallelMesh,
        num_rows: int,
        *,
        trace: Trace | None = None,
        on_text: Callable[[str], None] | None = None,
        on_report: Callable[[CacheReport], None] | None = None,
        log: Callable[[str], None] = lambda line: None,
        stop: Stop | None = None,
        cut_off: Collection[int] = (),
    ) -> None:
        self.config = config
        self.model = loading.adapt(model)
        self.tokenizer = tokenizer
        self.mesh = mesh
        # Few enough that every replica has something to do.
        self._max_rows = max(1, min(config.max_batch_size, -(-num_rows // mesh.dp)))
        # Of the job alone: so that a row is computed alike on any number of replicas, and when the job goes on.
        self._steady = 1
        if min(config.max_batch_size, num_rows) > 1:
            ranks = Collectives(mesh.axis("request"))
            self._steady = agreed_rows(self.model.model, self.model.device, ranks)
        self.parallel = config.parallel if mesh.world_size > 1 else None
        self.eos_ids = loading.eos_ids(self.model, tokenizer)
        self.pad_id = loading.pad_id(tokenizer)
        self.times: list[Times] = []
        self._scheduler: Scheduler | None = None
        self._trace = trace
        self._stop = Stop() if stop is None else stop
        self._cut_off = cut_off
        self._on_text, self._on_report, self._log = on_text, on_report, log

    @property
    def rank_bytes(self) -> int:
        """Buffers of the largest cache that decoded, on this rank."""
        return 0 if self._scheduler is None else self._scheduler.rank_bytes

    def serve(
        self, waiting: Iterator[Request], on_step: Callable[[], None] = lambda: None
    ) -> Iterator[list[Record]]:
        """The records of rows as they end. Rows that fail together are tried one by one. If the run is to end, rows
        that were not finished have none.

        Where several ranks hold a request only what all of them raise at the same step is tried again:
        `NotFiniteError`, for they share the variances of attention, and `AgreedError`, where memory is taken for a
        prompt or for rows that join. After any other error they may stand at different steps, and would wait for each
        other. That error is raised, and ends the job.

        Args:
            waiting: in the order in which they are admitted; on_step: called after every step.

        Raises:
            BatchError: only where several ranks hold a request.
        """
        shape, d2o = self.model.shape, settle_rules(self.config.d2o, self.model.shape)
        reading = settle_reading(self.config.reading, self.model.tile_refusal, d2o)
        needs = partial(tokens_while_reading, reading, d2o, len(shape.windows))
        room = Room(self._max_rows, self.config.max_batch_tokens, shape.border, needs)
        self._scheduler = Scheduler(
            waiting, self.read, room, alone=self._cut_off, on_failure=self._check_failure, on_step=on_step,
            log=self._log,
        )  # fmt: skip
        for ended in self._scheduler.run():
            yield [self._record(request, result) for request, result in ended]
        running = self._scheduler.running
        if self._on_report is not None and running is not None and not running.stopped:
            self._on_report(running.session.cache.report())

    def read(self, requests: Sequence[Request]) -> Running:
        """Read prompts into a session of their own.

        Raises:
            AgreedError: on all ranks of the request, if one of them has no room for it.
        """
        counter = None if self._trace is None else self._trace.counter
        ranks = Collectives(self.mesh.axis("request"), counter)
        with failing_alike(ranks):
            if ranks.size > 1 and self._memory is not None:
                needed = self._memory(max(len(request.input_ids) for request in requests)).beside_weights
                try_room(int(needed * len(requests) / TOLERANCE), self.model.device)
            session = Session(
                self.model, self.config.d2o, self.mesh, self.parallel, counter, decode_graph=self.config.decode_graph,
                reading=self.config.reading, steady=self._steady,
            )  # fmt: skip
        return Running(
            session, requests, self.config.sampling, self.tokenizer, eos_ids=self.eos_ids, pad_id=self.pad_id,
            chunk=self.config.prefill_chunk, on_text=self._on_text, trace=self._trace,
            stops=lambda: self._stop.status > 0,
        )  # fmt: skip

    @cached_property
    def _memory(self) -> Callable[[int], PromptMemory] | None:
        """What a prompt needs on a rank; None: of a model that the planner does not know."""
        try:
            return memory_of(self.config, self.model.device)
        except ValueError:
            return None

    def _check_failure(self, requests: Sequence[Request], error: Exception) -> None:
        if self.mesh.axis("request").size > 1 and not isinstance(error, (NotFiniteError, AgreedError)):
            raise self._give_up(error, f"{type(error).__name__}: {error}", requests) from error

    def _give_up(self, error: Exception, message: str, batch: Sequence[Request]) -> BatchError:
        """Of a rank whose peers are, or will be, left alone."""
        if is_left_alone(error):
            why = peer_reason(self.mesh) or "a peer died or came too late"
        else:
            why = message
            tell_peers(self.mesh, message)
        rows = ", ".join(str(request.index) for request in batch)
        records = [cut_off_record(request, why, batch, request.index in self._cut_off) for request in batch]
        return BatchError(f"the batch of rows {rows} failed: {message}", records)

    def _record(self, request: Request, result: Generated) -> Record:
        if result.error is not None:
            self._log(f"row {request.index} ({shown(request.id)}) failed: {result.error}")
            return error_record(request, result.error)
        self.times.append((result.time_to_first_token_s, result.tokens_per_s))
        if self._trace is not None:
            self._trace.add_row(request.index, *self.times[-1])
        return make_record(request, result)


def run(
    config: InferConfig,
    plan: InferPlan,
    mesh: ParallelMesh | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    on_report: Callable[[CacheReport], None] | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda line: None,
    stop: Stop | None = None,
) -> Summary:
    """Load the weights, run the plan and write the records; an interruption or a failure keeps what is written.

    Every rank of the mesh calls it together, and gets the summary of the whole run. Rows that an earlier run of the
    same job has finished are not run again.

    Args:
        on_text, on_report, log: see `InferRunner`; with `on_text` nothing else goes to standard output.
        on_rows: called on the ranks that lead a replica with the number of rows, of all replicas, that were written
            since the last call.
        stop: when it is asked, the run ends after the running step.

    Raises:
        ValueError: the weights cannot be loaded; another run writes to the output, or did since the plan was made.
            Nothing is written then, and no earlier output is replaced. Or several replicas cannot join their parts.
        StoppedError: the run was stopped, or could not write; finished rows stay.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    lock = lock_path(config.output) if mesh.rank == 0 else None
    goes_on = False

    def check() -> None:
        nonlocal goes_on
        if mesh.rank == 0:
            goes_on = check_job(config, plan.job, mesh.dp, list(inputs_of(config)))

    with only_writer(config.output, lock, mesh, check):
        with agreed(mesh):
            earlier = find_earlier(config, plan.num_rows) if goes_on else Earlier()
        known = sorted(earlier.records), earlier.cut_off
        finished, cut_off = Collectives(mesh.axis("world")).broadcast_object(known)
        waiting = _waiting(plan, set(finished), set(cut_off))
        trace = None if config.trace is None else Trace(config.trace, mesh)
        stop = Stop() if stop is None else stop
        runner = None
        if waiting:
            model = loading.load_model(config, mesh)
            runner = InferRunner(
                config, model, plan.tokenizer, mesh, len(plan.requests), trace=trace, on_text=on_text,
                on_report=on_report, log=log, stop=stop, cut_off=cut_off,
            )  # fmt: skip
        with agreed(mesh):
            check()  # weights may have taken minutes
            if lock is not None:
                begin(config.output, plan.job, earlier.goes_on)
        results = Results(config, plan, mesh, stop, earlier, finished, quiet=on_text is not None, on_rows=on_rows)
        wall_s = results.work(waiting, None if runner is None else runner.serve)
        if trace is not None:
            log(trace.write())
        times, rank_bytes = ([], 0) if runner is None else (runner.times, runner.rank_bytes)
        return results.end(times, rank_bytes, wall_s, log)


def _waiting(plan: InferPlan, finished: Collection[int], alone: Collection[int]) -> list[Request]:
    """The requests to run, in the order in which they are admitted. Rows that may end the job come last."""
    out = {*finished, *alone}
    left = [request for request in longest_first(plan.requests) if request.index not in out]
    return [*left, *(request for request in plan.requests if request.index in alone)]

