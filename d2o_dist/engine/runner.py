"""A whole inference run on one rank of any number: the weights are loaded, batches run, results are joined."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from d2o_dist.cache.report import CacheReport
from d2o_dist.comm.collectives import Collectives, is_left_alone
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.comm.recovery import PeerLostError, Recovery
from d2o_dist.compression.budgets import NotFiniteError
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine import model as loading
from d2o_dist.engine.agreement import agreed
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
from d2o_dist.integrations.tensor_parallel import replace_group


class BatchError(RuntimeError):
    """A batch failed on one of the ranks that hold it, and they cannot go on together; `__cause__` says how.

    Attributes:
        records: of its rows; the job ends with this error, and one that goes on later need not meet them again.
    """

    def __init__(self, message: str, records: Sequence[Record] = ()) -> None:
        super().__init__(message)
        self.records = list(records)


class Runner:
    """Runs the requests of a plan, batch after batch. All ranks that hold one request call it together.

    Args:
        recovery: of the ranks that hold a request; needed where they are several.
        on_text: called with pieces of text as they come; on_report: with a batch's cache report when it is done.
        on_step: called after every token of a batch.
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
        recovery: Recovery | None = None,
        trace: Trace | None = None,
        on_text: Callable[[str], None] | None = None,
        on_report: Callable[[CacheReport], None] | None = None,
        on_step: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.parallel = config.parallel if mesh.world_size > 1 else None
        self.eos_ids = loading.eos_ids(model, tokenizer)
        self.pad_id = loading.pad_id(tokenizer)
        self.rank_bytes = 0
        self._request, self._recovery = Collectives(mesh.axis("request")), recovery
        self._trace = trace
        self._on_text, self._on_report, self._on_step, self._log = on_text, on_report, on_step, log

    def run_batch(self, batch: Sequence[Request]) -> list[Record]:
        """The records of one batch. If it fails as a whole, its rows are tried one by one.

        All ranks that hold it fail together, wherever one of them does, and go on together.

        Raises:
            BatchError: only where several ranks hold a request: one of them died, or they cannot connect anew.
        """
        records, error = self._try(batch)
        if error is None:
            return records
        if len(batch) == 1:
            return [self._failed(batch[0], error)]
        self._log(f"a batch of {len(batch)} rows failed ({error}); its rows are tried one by one")
        for request in batch:
            try:
                records += self.run_batch([request])
            except BatchError as lost:
                raise BatchError(str(lost), records + lost.records) from lost
        return records

    def _failed(self, request: Request, error: str) -> Record:
        self._log(f"row {request.index} ({request.id!r}) failed: {error}")
        return error_record(request, error)

    def _try(self, batch: Sequence[Request]) -> tuple[list[Record], str | None]:
        try:
            return self._run(batch), None
        except NotFiniteError as error:
            message = str(error)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if self._request.size > 1:
                message = self._agree(error, message, batch)
        # Out of the except block, so that the traceback lets go of the failed batch's tensors before the next try.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [], message

    def _agree(self, error: Exception, message: str, batch: Sequence[Request]) -> str:
        """Why the batch failed, the same on all ranks that hold it."""
        try:
            return self._recovery.agree(None if is_left_alone(error) else message)
        except PeerLostError as lost:
            rows = ", ".join(str(request.index) for request in batch)
            records = [error_record(request, f"{lost} while rows {rows} ran") for request in batch]
            raise BatchError(f"the batch of rows {rows} failed: {message}", records) from error

    def _run(self, batch: Sequence[Request]) -> list[Record]:
        counter = None if self._trace is None else self._trace.counter
        session = Session(
            self.model, self.config.d2o, self.mesh, self.parallel, counter, decode_graph=self.config.decode_graph
        )

        def note_size() -> None:
            self.rank_bytes = max(self.rank_bytes, session.rank_bytes)

        results = generate(
            session, batch, self.config.sampling, self.tokenizer, eos_ids=self.eos_ids, pad_id=self.pad_id,
            chunk=self.config.prefill_chunk, on_text=self._on_text, on_prefill=note_size, on_step=self._on_step,
            trace=self._trace,
        )  # fmt: skip
        if self._on_report is not None:
            self._on_report(session.cache.report())
        both = zip(batch, results, strict=True)
        records = [self._failed(a, b.error) if b.error is not None else make_record(a, b) for a, b in both]
        self._request.barrier()  # nobody goes on while a peer may still fail in what it does alone
        return records


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
    queue = WorkQueue(mesh, len(batches := _batches(config, plan, mesh.dp)))
    runner = None
    if plan.requests:
        recovery = Recovery(mesh)  # before an engine is given the groups
        model = loading.load_model(config, mesh)
        recovery.on_renewed = partial(replace_group, model)
        runner = Runner(
            config, model, plan.tokenizer, mesh, recovery=recovery, trace=trace, on_text=on_text, on_report=on_report,
            on_step=queue.beat, log=log,
        )  # fmt: skip
    with agreed(mesh):
        check()  # weights may have taken minutes
        clear_parts(config.output, mesh)
    before = identity(config.output)
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
                try:
                    write(runner.run_batch([plan.requests[place] for place in batches[number]]))
                except BatchError as error:
                    write(error.records)
                    raise
            queue.wait(plan.num_rows, config.parallel.timeout)
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


def _batches(config: InferConfig, plan: Plan, replicas: int) -> list[list[int]]:
    """Places of requests, batch by batch, longest first; small enough that every replica has something to do."""
    lengths = [len(request.input_ids) for request in plan.requests]
    fair = -(-len(lengths) // replicas)
    return make_batches(lengths, max(1, min(config.max_batch_size, fair)), config.max_batch_tokens, plan.border)
