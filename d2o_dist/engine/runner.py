"""A whole inference run on one rank of any number: the weights are loaded, batches run, results are joined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from d2o_dist.cache.report import CacheReport
from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.lock import only_writer
from d2o_dist.engine.loop import Generated, Running
from d2o_dist.engine.output import (
    check_output,
    check_unchanged,
    clear_parts,
    identity,
    join_parts,
    lock_path,
    open_writer,
)
from d2o_dist.engine.paths import inputs_of
from d2o_dist.engine.plan import Plan
from d2o_dist.engine.records import Record, error_record, make_record
from d2o_dist.engine.scheduler import Room, Scheduler, longest_first
from d2o_dist.engine.session import Session
from d2o_dist.engine.summary import Summary, summarise
from d2o_dist.engine.trace import Trace
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.models import loading


class BatchError(RuntimeError):
    """A batch failed on one of the ranks that hold it; `__cause__` says how."""


class Runner:
    """Runs the requests of a plan. All ranks that hold one request call it together.

    Args:
        on_text: called with pieces of text as they come; on_report: with the cache's report when all rows are done.
        log: called with a line about something that went wrong and was dealt with.
    """

    def __init__(
        self,
        config: InferConfig,
        model: Any,
        tokenizer: Any,
        mesh: ParallelMesh,
        *,
        trace: Trace | None = None,
        on_text: Callable[[str], None] | None = None,
        on_report: Callable[[CacheReport], None] | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.model = loading.adapt(model)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.parallel = config.parallel if mesh.world_size > 1 else None
        self.eos_ids = loading.eos_ids(self.model, tokenizer)
        self.pad_id = loading.pad_id(tokenizer)
        self._scheduler: Scheduler | None = None
        self._trace = trace
        self._on_text, self._on_report, self._log = on_text, on_report, log

    @property
    def rank_bytes(self) -> int:
        """Buffers of the largest cache that decoded, on this rank."""
        return 0 if self._scheduler is None else self._scheduler.rank_bytes

    def serve(self, waiting: Iterator[Request], max_rows: int) -> Iterator[list[Record]]:
        """The records of rows as they end; `max_rows` run at once at most. Rows that fail together are tried alone.

        Where several ranks hold a request nothing is tried again, unless all of them failed at the same point: they
        may have failed at different ones, and would wait for each other. The error is raised, and ends the job.

        Raises:
            BatchError: only where several ranks hold a request.
        """
        room = Room(max_rows, self.config.max_batch_tokens, self.config.d2o, self.model.shape.border)
        self._scheduler = Scheduler(waiting, self.read, room, on_failure=self._check_failure, log=self._log)
        for ended in self._scheduler.run():
            yield [self._record(request, result) for request, result in ended]
        if self._on_report is not None and self._scheduler.running is not None:
            self._on_report(self._scheduler.running.session.cache.report())

    def read(self, requests: Sequence[Request]) -> Running:
        """Read prompts into a session of their own."""
        counter = None if self._trace is None else self._trace.counter
        session = Session(
            self.model, self.config.d2o, self.mesh, self.parallel, counter, decode_graph=self.config.decode_graph
        )
        return Running(
            session, requests, self.config.sampling, self.tokenizer, eos_ids=self.eos_ids, pad_id=self.pad_id,
            chunk=self.config.prefill_chunk, on_text=self._on_text, trace=self._trace,
        )  # fmt: skip

    def _check_failure(self, requests: Sequence[Request], error: Exception) -> None:
        if self.mesh.axis("request").size > 1 and not isinstance(error, NotFiniteError):
            rows = ", ".join(str(request.index) for request in requests)
            raise BatchError(f"the batch of rows {rows} failed: {type(error).__name__}: {error}") from error

    def _record(self, request: Request, result: Generated) -> Record:
        if result.error is None:
            return make_record(request, result)
        self._log(f"row {request.index} ({request.id!r}) failed: {result.error}")
        return error_record(request, result.error)


def run(
    config: InferConfig,
    plan: Plan,
    mesh: ParallelMesh | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    on_report: Callable[[CacheReport], None] | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Load the weights, run the plan and write the records; an interruption or a failure keeps what is written.

    Every rank of the mesh calls it together, and gets the summary of the whole run.

    Args:
        on_text, on_report, log: see `Runner`; with `on_text` nothing else goes to standard output.
        on_rows: called on the ranks that lead a replica with the number of rows, of all replicas, that were written
            since the last call.

    Raises:
        ValueError: the weights cannot be loaded; another run writes to the output, or did since the plan was made.
            Nothing is written then, and no earlier output is replaced. Or several replicas cannot join their parts.
    """
    mesh = ParallelMesh.local() if mesh is None else mesh
    output = config.output

    def check() -> None:
        if mesh.rank == 0:
            check_output(output, config.overwrite, mesh.dp, inputs_of(config))

    with only_writer(output, lock_path(output) if mesh.rank == 0 else None, mesh, check):
        return _run(config, plan, mesh, check, on_text, on_report, on_rows, log)


def _run(
    config: InferConfig,
    plan: Plan,
    mesh: ParallelMesh,
    check: Callable[[], None],
    on_text: Callable[[str], None] | None,
    on_report: Callable[[CacheReport], None] | None,
    on_rows: Callable[[int], None],
    log: Callable[[str], None],
) -> Summary:
    trace = None if config.trace is None else Trace(config.trace, mesh)
    runner = None
    if plan.requests:
        model = loading.load_model(config, mesh)
        runner = Runner(
            config, model, plan.tokenizer, mesh, trace=trace, on_text=on_text, on_report=on_report, log=log
        )  # fmt: skip
    with agreed(mesh):
        check()  # weights may have taken minutes
        clear_parts(config.output, mesh)
    before = identity(config.output)
    queue = WorkQueue(mesh, len(plan.requests))
    interrupted, shown, began = False, 0, time.perf_counter()

    def write(records: Sequence[Record]) -> None:
        nonlocal shown
        writer.write(records)
        if mesh.leads_request:
            done = queue.finish(len(records))
            on_rows(done - shown)
            shown = done

    with open_writer(config.output, mesh, quiet=on_text is not None) as writer:
        try:
            if mesh.rank == 0:
                write([error_record(row) for row in plan.bad_rows])
            if runner is not None:
                for records in runner.serve(_claimed(queue, plan.requests), _max_rows(config, plan, mesh.dp)):
                    write(records)
            queue.wait(plan.num_rows)
            on_rows(plan.num_rows - shown if mesh.rank == 0 else 0)
        except KeyboardInterrupt:
            if mesh.world_size > 1:
                raise  # only this rank knows of it; what is written stays in part files
            interrupted = True
        wall_s = time.perf_counter() - began
        if mesh.dp == 1:
            writer.sort()
        else:
            writer.check()
    if trace is not None:
        trace.write()
        log(str(trace))
    world = Collectives(mesh.axis("world"))
    places = world.all_gather_object((mesh.dp_rank, writer.path, writer.lost) if mesh.leads_request else None)
    moved = {place[0]: place[1] for place in places if place is not None and place[2] is not None}
    lost = [place[2] for place in places if place is not None and place[2] is not None]
    with agreed(mesh):
        records = writer.records
        if mesh.dp > 1 and mesh.rank == 0:
            if None in moved.values():
                raise ValueError("; ".join(lost))
            check_unchanged(config.output, before)
            records = join_parts(config.output, mesh.dp, plan.num_rows, moved)
    if mesh.dp > 1:
        # All is where it should be: what happened to a part file is news, not an error.
        for what in lost:
            log(what)
        lost = []
    rank_bytes = world.all_gather_object(0 if runner is None else runner.rank_bytes)
    summary = summarise(records, plan.num_rows, wall_s, rank_bytes=rank_bytes, interrupted=interrupted, lost=lost)
    return world.broadcast_object(summary)


def _claimed(queue: WorkQueue, requests: Sequence[Request]) -> Iterator[Request]:
    """The requests that this replica takes."""
    requests = longest_first(requests)
    while (number := queue.claim()) is not None:
        yield requests[number]


def _max_rows(config: InferConfig, plan: Plan, replicas: int) -> int:
    """Rows that a replica runs at once: few enough that every replica has something to do."""
    return min(config.max_batch_size, -(-len(plan.requests) // replicas))
