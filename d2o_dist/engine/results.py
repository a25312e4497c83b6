"""Results of a run, from the rows that end to the one file that holds all rows in the order of the input."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.collectives import Collectives
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.encode import Request
from d2o_dist.engine.output import check_parts, check_unchanged, identity, join_files, lock_path, open_writer
from d2o_dist.engine.plan import InferPlan
from d2o_dist.engine.records import Record, error_record, read_records
from d2o_dist.engine.resume import Earlier
from d2o_dist.engine.stop import STATUS_UNWRITTEN, Stop, StoppedError
from d2o_dist.engine.summary import Summary, Times, summarise
from d2o_dist.files.whole import reason


class BatchError(RuntimeError):
    """A batch failed on one of the ranks that hold it, and they cannot go on together; `__cause__` says how.

    Attributes:
        records: of its rows.
    """

    def __init__(self, message: str, records: Sequence[Record] = ()) -> None:
        super().__init__(message)
        self.records = list(records)


class Results:
    """The rows of one run on their way to the output. All ranks make it together, and call the same.

    Args:
        earlier: what earlier runs have left, on rank 0; finished: the indices of its rows, on all ranks.
        quiet: no records on standard output.
        on_rows: see `engine.runner.run`.

    Raises:
        ValueError: the output, or a part of it, cannot be opened.
    """

    def __init__(
        self,
        config: InferConfig,
        plan: InferPlan,
        mesh: ParallelMesh,
        stop: Stop,
        earlier: Earlier,
        finished: Sequence[int],
        *,
        quiet: bool,
        on_rows: Callable[[int], None],
    ) -> None:
        self._config, self._plan, self._mesh, self._stop = config, plan, mesh, stop
        self._earlier, self._finished = earlier, set(finished)
        self._on_rows, self._shown = on_rows, 0
        self._world, self._request = Collectives(mesh.axis("world")), Collectives(mesh.axis("request"))
        self._before = identity(config.output)
        self._interrupted = False
        with agreed(mesh):
            self._writer = open_writer(config.output, mesh, quiet=quiet, earlier=earlier.records.values())

    def work(
        self,
        waiting: Sequence[Request],
        serve: Callable[[Iterator[Request], Callable[[], None]], Iterator[list[Record]]] | None,
    ) -> float:
        """Run the requests and write their records; the seconds it took.

        Args:
            serve: gives the records of rows as they end; called with the requests that this replica takes, which are
                its own as soon as it asks for them, and with what to call after each step. None where there are none.

        Raises:
            StoppedError: the run was stopped, or could not write; finished rows stay.
            BatchError: a rank failed and cannot go on with its peers. The rows that it ran are written as failed, so
                that the next run passes them.
        """
        bad = [row for row in self._plan.bad_rows if row.index not in self._finished]
        queue = WorkQueue(self._mesh, len(waiting))
        total = len(bad) + len(waiting)
        began = time.perf_counter()
        with self._writer:
            try:
                if self._mesh.rank == 0:
                    self._on_rows(len(self._finished))
                    self._write(map(error_record, bad), queue)
                try:
                    for records in serve(self._claimed(queue, waiting), queue.beat) if waiting else ():
                        self._write(records, queue)
                except BatchError as error:
                    self._write(error.records, queue)
                    raise
                if status := self._ends():
                    queue.stop(status)
                status = queue.settle(total, self._config.parallel.timeout, lambda: self._stop.status)
            except KeyboardInterrupt:
                if self._mesh.world_size > 1:
                    raise  # only this rank knows of it; what is written stays in part files
                self._interrupted, status = True, 0
            wall_s = time.perf_counter() - began
            self._writer.check()
        if status:
            queue.leave()
            raise StoppedError(status, self._last_words(len(self._finished) + queue.finish(0)))
        if self._mesh.rank == 0:
            self._on_rows(total - self._shown)
        return wall_s

    def _claimed(self, queue: WorkQueue, waiting: Sequence[Request]) -> Iterator[Request]:
        """The requests that this replica takes, until the run is to end."""
        while not self._ends() and (number := queue.claim()) is not None:
            yield waiting[number]

    def _ends(self) -> int:
        """The status to end with, the same on all ranks of the request; 0: they go on."""
        return min(filter(None, self._request.all_gather_object(self._stop.status)), default=0)

    def _write(self, records: Iterable[Record], queue: WorkQueue) -> None:
        records = list(records)
        if not records:
            return
        try:
            self._writer.write(records)
        except OSError as error:
            name = self._place or self._config.output
            where = "standard output" if name in (None, "-") else f"output {name}"
            self._stop.ask(STATUS_UNWRITTEN, f"{where} cannot be written: {reason(error)}")
            return
        if self._mesh.leads_request:
            done = queue.finish(len(records))
            self._on_rows(done - self._shown)
            self._shown = done

    def _last_words(self, done: int) -> str:
        """What this rank says of a run that ends early; empty: nothing."""
        keeps = lock_path(self._config.output) is not None
        kept = f"{done} of {self._plan.num_rows} rows are done" + (" and stay: the same command goes on" * keeps)
        if self._stop.status == STATUS_UNWRITTEN and self._mesh.leads_request:
            line = f"error: {self._stop.why}; {kept}" + (" when there is room" * keeps)
        elif self._mesh.rank == 0:
            line = f"stopped ({self._stop.why or 'by another rank'}); {kept}"
        else:
            line = ""
        return "; ".join(filter(None, [line, self._writer.lost]))

    def end(self, times: Sequence[Times], rank_bytes: int, wall_s: float, log: Callable[[str], None]) -> Summary:
        """Put all rows in order, in one file, and sum up.

        Args:
            times, rank_bytes: of this rank; see `Summary`.

        Raises:
            ValueError: parts or rows are not there, or something else has written the output.
        """
        mine = (self._place, self._writer.lost, list(times)) if self._mesh.leads_request else None
        leaders = [found for found in self._world.all_gather_object(mine) if found is not None]
        records, lost = [], []
        with agreed(self._mesh):
            if self._mesh.rank == 0:
                records, lost = self._join([(place, what) for place, what, _ in leaders])
        if self._mesh.dp > 1:
            for _, what, _ in leaders:
                if what is not None:
                    log(what)  # all is where it should be: what happened to a part file is news, not an error
        all_bytes = self._world.all_gather_object(rank_bytes)
        summary = None
        if self._mesh.rank == 0:
            summary = summarise(
                records, self._plan.num_rows, wall_s, times=[one for _, _, part in leaders for one in part],
                rank_bytes=all_bytes, earlier=self._finished, interrupted=self._interrupted, lost=lost,
            )  # fmt: skip
        return Summary(**self._world.broadcast_object(None if summary is None else vars(summary)))

    @property
    def _place(self) -> str | None:
        """Where this rank's records are."""
        return None if self._writer.path is None else str(self._writer.path)

    def _join(self, places: Sequence[tuple[str | None, str | None]]) -> tuple[list[Record], list[str]]:
        """All records, and what to tell of files that were lost or could not be joined.

        Raises:
            ValueError: parts or rows are not there, or something else has written the output.
        """
        lost = [what for _, what in places if what is not None]
        everything = [*self._earlier.records.values(), *self._writer.records]
        if lock_path(self._config.output) is None:
            return everything, lost
        target, several = Path(self._config.output), self._mesh.dp > 1
        if None in [path for path, _ in places]:
            if several:
                raise ValueError("; ".join(lost))
            return everything, lost
        files = [Path(path) for path, _ in places]
        if several:
            check_parts(files)
            check_unchanged(self._config.output, self._before)
            lost = []
        elif lost:
            target = files[0]  # the output is somebody else's by now
        files = list(dict.fromkeys([*self._earlier.files, *files]))
        try:
            return join_files(target, files, None if self._interrupted else self._plan.num_rows), lost
        except OSError as error:
            found = [file for file in files if file.exists()]
            lost.append(
                f"output {target} cannot be put in order: {reason(error)}; its rows are in "
                f"{', '.join(map(str, found))}, as they were finished: the same command goes on when there is room"
            )
            return list(read_records(found).values()), lost
