"""A whole evaluation on one rank of any number: run what is missing, and at the end make one set of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.queue import WorkQueue
from d2o_dist.config.eval_tasks import TaskConfig
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.engine.lock import only_writer
from d2o_dist.engine.output import check_shared
from d2o_dist.engine.paths import inputs_of
from d2o_dist.engine.stop import Stop, StoppedError
from d2o_dist.eval.aggregate import summarise
from d2o_dist.eval.plan import EvalPlan
from d2o_dist.eval.plots import draw
from d2o_dist.eval.provenance import environment
from d2o_dist.eval.runner import EvalRunner, batches, pending
from d2o_dist.eval.store import LOCK, MERGED, RankFile, Record, check_folder, merge_records, read_records
from d2o_dist.eval.table import report
from d2o_dist.fields.io import dump_yaml, to_json
from d2o_dist.files.whole import replace_text
from d2o_dist.models import loading


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        folder: of the results; table: the Markdown report, on the rank that wrote it, else None.
        num_results, num_missing: results of the plan that exist now, and that failed or were not reached.
    """

    folder: Path
    table: str | None
    num_results: int
    num_missing: int
    interrupted: bool = False


def check_parallel(config: EvalConfig, world_size: int) -> int:
    """The number of replicas.

    Raises:
        ValueError: the ranks are not dp x sp x tp, or a task cannot be run by several ranks that share a request.
    """
    parallel = config.parallel
    for task in config.tasks:
        if parallel.tp * parallel.sp > 1 and getattr(task, "continuation", None) == "chunk":
            raise ValueError(
                f"task {task.name}: continuation (chunk) needs a request on one rank, but tp is {parallel.tp} and sp "
                f"{parallel.sp}: set continuation to decode"
            )
    return parallel.replicas(world_size)


def evaluate(
    plan: EvalPlan,
    mesh: ParallelMesh,
    *,
    config_file: str | None = None,
    on_start: Callable[[int], None] = lambda count: None,
    on_results: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda line: None,
    stop: Stop | None = None,
) -> Outcome:
    """Load the weights, run the rows that have no result yet, and write the results of all.

    Every rank calls it with the same plan. Replicas take the next batch when they are free. An interruption (Ctrl-C)
    keeps what is written and makes no report.

    Args:
        config_file: what the configuration was read from, so that it is not written over.
        on_start: called with the number of results that are missing.
        on_results: called, on the ranks that lead a replica, with how many results of all replicas were just added.
        log: called with lines about what went wrong and was dealt with; with each on one rank.
        stop: when it is asked, the run ends after the running batch of a method.

    Raises:
        StoppedError: the run was stopped; results that were written stay.
        ValueError: the weights cannot be loaded, the folder holds something that is not records, or files that the run
            reads or that no evaluation wrote would be replaced, or another evaluation writes to it; several replicas
            whose machines do not share the folder.
    """
    folder = Path(plan.config.output).expanduser()

    def check() -> None:
        check_folder(folder, [*inputs_of(plan.config.infer(), config_file), *data_of(plan.config.tasks)])

    with only_writer(folder, folder / LOCK, mesh, check):
        return _evaluate(plan, mesh, folder, on_start, on_results, log, Stop() if stop is None else stop)


def data_of(tasks: Iterable[TaskConfig]) -> Iterator[tuple[str, str]]:
    """(what it is, path) of the files that tasks read; texts and data sets that are not files here left out."""
    for task in tasks:
        for name in ("data", "text", "haystack", "qa_1_file", "qa_2_file"):
            path = getattr(task, name, None)
            if path is not None and Path(path).expanduser().is_file():
                yield f"{name} of task {task.name}", str(Path(path).expanduser())


def _evaluate(
    plan: EvalPlan,
    mesh: ParallelMesh,
    folder: Path,
    on_start: Callable[[int], None],
    on_results: Callable[[int], None],
    log: Callable[[str], None],
    stop: Stop,
) -> Outcome:
    config, world = plan.config, Collectives(mesh.axis("world"))
    check_shared(str(folder / MERGED), mesh)
    # What rank 0 sees counts: another machine may not share the folder where one replica writes.
    with agreed(mesh):
        finished = list(read_records(folder)) if mesh.rank == 0 else []
    todo = pending(plan.jobs, plan.methods, world.broadcast_object(finished))
    on_start(sum(len(methods) for _, methods in todo))
    if todo:
        log_rows = log if mesh.leads_request else lambda line: None
        runner = EvalRunner(plan, loading.load_model(config.infer(), mesh), mesh, log=log_rows)
        work = batches(todo, config.batch_size, config.max_batch_tokens, plan.border)
        queue, request, shown = WorkQueue(mesh, len(work)), Collectives(mesh.axis("request")), 0

        def ends() -> int:
            """The status to end with, the same on all ranks of the request; 0: they go on."""
            return min(filter(None, request.all_gather_object(stop.status)), default=0)

        try:
            with RankFile(folder, mesh.rank) if mesh.leads_request else nullcontext() as file:
                while not (status := ends()) and (number := queue.claim()) is not None:
                    for records in runner.run_batch(work[number]):
                        if file is not None:
                            file.write(records)
                            done = queue.finish(len(records))
                            on_results(done - shown)
                            shown = done
                        if ends():
                            break
                if status:
                    queue.stop(status)
                # Rank 0 reads what the others have written: not before they have.
                total = sum(len(methods) for _, methods in todo)
                status = queue.settle(total, config.parallel.timeout, lambda: stop.status)
                if file is not None:
                    file.check()
        except KeyboardInterrupt:
            if mesh.world_size > 1:
                raise  # only this rank knows of it
            return Outcome(folder, None, len(read_records(folder)), 0, interrupted=True)
        if status:
            queue.leave()
            count = len(plan.jobs) * len(plan.methods)
            done = f"{count - total + queue.finish(0)} of {count} results are done and stay: the same command goes on"
            why = stop.why or "by another rank"
            raise StoppedError(status, f"stopped ({why}); {done}" if mesh.rank == 0 else "")
        lost = world.all_gather_object(None if file is None else file.lost)
        for line in filter(None, lost if mesh.rank == 0 else []):
            log(line)
    table, num_results = None, 0
    with agreed(mesh):
        if mesh.rank == 0:
            found = read_records(folder)
            table = _write(plan, folder, mesh, found)
            num_results = sum(job.key(method) in found for job in plan.jobs for method in plan.methods)
    num_results = world.broadcast_object(num_results)
    return Outcome(folder, table, num_results, len(plan.jobs) * len(plan.methods) - num_results)


def _write(plan: EvalPlan, folder: Path, mesh: ParallelMesh, found: Mapping[str, Record]) -> str:
    """Merge the records and write configuration, environment, metrics, table and pictures."""
    order = {name: place for place, name in enumerate([task.name for task in plan.tasks])}
    folder.mkdir(parents=True, exist_ok=True)
    merge_records(folder, sorted(found.values(), key=lambda record: order.get(record["task"], len(order))))
    around = environment(mesh.world_size)
    summary = {**summarise(plan, found), "environment": around}
    replace_text(folder / "config.yaml", dump_yaml(plan.config.to_dict()))
    _write_json(folder / "environment.json", around)
    _write_json(folder / "metrics.json", summary)
    table = report(summary, around)
    replace_text(folder / "table.md", table)
    try:
        draw(summary, folder)
    except ImportError as error:
        table += f"\nNo pictures: {error}.\n"
    return table


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_text(path, to_json(values, indent=1, ensure_ascii=False) + "\n")
