"""A whole inference run on one rank of any number: the weights are loaded, batches run, results are joined."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from d2o_dist.cache.report import CacheReport
from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.batching import make_batches
from d2o_dist.engine.encode import Request
from d2o_dist.engine.lock import only_writer
from d2o_dist.engine.loop import generate
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
from d2o_dist.engine.session import Session
from d2o_dist.engine.summary import Summary, summarise
from d2o_dist.engine.trace import Trace
from d2o_dist.evict.budgets import NotFiniteError
from d2o_dist.fields.show import shown
from d2o_dist.models import loading


class BatchError(RuntimeError):
    """A batch failed on one of the ranks that hold it; `__cause__` says how."""


class Runner:
    """Runs the requests of a plan, batch after batch. All ranks that hold one request call it together.

    Args:
        on_text: called with pieces of text as they come; on_report: with a batch's cache report when it is done.
        log: called with a line about something that went wrong and was dealt with.

    Attributes:
        rank_bytes: buffers of the cache on this rank after the prefill of its largest batch.
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
        self.rank_bytes = 0
        self._trace = trace
        self._on_text, self._on_report, self._log = on_text, on_report, log

    def run_batch(self, batch: Sequence[Request]) -> list[Record]:
        """The records of one batch. If it fails as a whole, its rows are tried one by one.

        Where several ranks hold a request nothing is tried again, unless all of them failed at the same point: they
        may have failed at different ones, and would wait for each other. The error is raised, and ends the job.

        Raises:
            BatchError: only where several ranks hold a request.
        """
        records, error = self._try(batch)
        if error is None:
            return records
        if len(batch) == 1:
            return [self._failed(batch[0], error)]
        self._log(f"a batch of {len(batch)} rows failed ({error}); its rows are tried one by one")
        return [record for request in batch for record in self.run_batch([request])]

    def _failed(self, request: Request, error: str) -> Record:
        self._log(f"row {request.index} ({shown(request.id)}) failed: {error}")
        return error_record(request, error)

    def _try(self, batch: Sequence[Request]) -> tuple[list[Record], str | None]:
        try:
            return self._run(batch), None
        except NotFiniteError as error:
            message = str(error)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if self.mesh.axis("request").size > 1:
                rows = ", ".join(str(request.index) for request in batch)
                raise BatchError(f"the batch of rows {rows} failed: {message}") from error
        # Out of the except block, so that the traceback lets go of the failed batch's tensors before the next try.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [], message

    def _run(self, batch: Sequence[Request]) -> list[Record]:
        counter = None if self._trace is None else self._trace.counter
        session = Session(
            self.model, self.config.d2o, self.mesh, self.parallel, counter, decode_graph=self.config.decode_graph
        )

        def note_size() -> None:
            self.rank_bytes = max(self.rank_bytes, session.rank_bytes)

        results = generate(
            session, batch, self.config.sampling, self.tokenizer, eos_ids=self.eos_ids, pad_id=self.pad_id,
            chunk=self.config.prefill_chunk, on_text=self._on_text, on_prefill=note_size, trace=self._trace,
        )  # fmt: skip
        if self._on_report is not None:
            self._on_report(session.cache.report())
        both = zip(batch, results, strict=True)
        return [self._failed(a, b.error) if b.error is not None else make_record(a, b) for a, b in both]


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
    queue = WorkQueue(mesh, len(batches := _batches(config, plan, mesh.dp)))
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
            while (number := queue.claim()) is not None:
                write(runner.run_batch([plan.requests[place] for place in batches[number]]))
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
    path = None if writer.path is None else str(writer.path)
    places = world.all_gather_object((mesh.dp_rank, path, writer.lost) if mesh.leads_request else None)
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
    return Summary(**world.broadcast_object(vars(summary)))


def _batches(config: InferConfig, plan: Plan, replicas: int) -> list[list[int]]:
    """Places of requests, batch by batch, longest first; small enough that every replica has something to do."""
    lengths = [len(request.input_ids) for request in plan.requests]
    fair = -(-len(lengths) // replicas)
    return make_batches(lengths, max(1, min(config.max_batch_size, fair)), config.max_batch_tokens, plan.border)
