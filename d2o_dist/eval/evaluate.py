"""A whole evaluation: plan, share of this rank, run, and at the end one set of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.config.evaluate import EvalConfig
from d2o_dist.config.io import dump_yaml
from d2o_dist.engine import model as loading
from d2o_dist.eval.aggregate import summarise
from d2o_dist.eval.plan import Plan
from d2o_dist.eval.plots import draw
from d2o_dist.eval.provenance import environment
from d2o_dist.eval.runner import Runner, batches, pending
from d2o_dist.eval.store import RankFile, merge_records, read_records
from d2o_dist.eval.table import report


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
        ValueError: the ranks are not dp x sp x tp, or a request would be spread over several ranks.
    """
    parallel = config.parallel
    if parallel.tp * parallel.sp != 1:
        raise ValueError(
            f"an evaluation runs every request on one rank: tp ({parallel.tp}) and sp ({parallel.sp}) must be 1; ranks "
            "share the rows (dp)"
        )
    return parallel.replicas(world_size)


def evaluate(
    plan: Plan,
    mesh: ParallelMesh,
    *,
    on_start: Callable[[int], None] = lambda count: None,
    on_results: Callable[[int], None] = lambda count: None,
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Load the weights, run this replica's rows that have no result yet, and write the results of all.

    Every rank calls it. An interruption (Ctrl-C) keeps what is written and makes no report.

    Args:
        on_start: called with the number of results this rank will add; on_results: with how many it just added.
        log: called with lines about rows that failed.

    Raises:
        ValueError: the weights cannot be loaded, or the folder holds something that is not records.
    """
    config, folder = plan.config, Path(plan.config.output).expanduser()
    found = read_records(folder)
    mine = [job for job in plan.jobs if job.index % mesh.dp == mesh.dp_rank]
    todo = pending(mine, plan.methods, found)
    on_start(sum(len(methods) for _, methods in todo))
    interrupted = False
    if todo:
        runner = Runner(plan, loading.load_model(config.infer()), rank=mesh.rank, log=log)
        with RankFile(folder, mesh.rank) as file:
            try:
                for batch in batches(todo, config.batch_size, config.max_batch_tokens):
                    for records in runner.run_batch(batch):
                        file.write(records)
                        on_results(len(records))
            except KeyboardInterrupt:
                interrupted = True
    if interrupted:
        return Outcome(folder, None, len(found), 0, interrupted=True)
    # Rank 0 reads what the others have written: not before they have.
    world = Collectives(mesh.axis("world"))
    world.barrier()
    table = _write(plan, folder, mesh) if mesh.rank == 0 else None
    # And nobody leaves, or counts, before it is done.
    world.barrier()
    found = read_records(folder)
    num_results = sum(job.key(method) in found for job in plan.jobs for method in plan.methods)
    return Outcome(folder, table, num_results, len(plan.jobs) * len(plan.methods) - num_results)


def _write(plan: Plan, folder: Path, mesh: ParallelMesh) -> str:
    """Merge the records and write configuration, environment, metrics, table and pictures."""
    found = read_records(folder)
    order = {name: place for place, name in enumerate([task.name for task in plan.tasks])}
    folder.mkdir(parents=True, exist_ok=True)
    merge_records(folder, sorted(found.values(), key=lambda record: order.get(record["task"], len(order))))
    around = environment(mesh.world_size)
    summary = {**summarise(plan, found), "environment": around}
    (folder / "config.yaml").write_text(dump_yaml(plan.config.to_dict()), encoding="utf-8")
    _write_json(folder / "environment.json", around)
    _write_json(folder / "metrics.json", summary)
    table = report(summary, around)
    (folder / "table.md").write_text(table, encoding="utf-8")
    try:
        draw(summary, folder)
    except ImportError as error:
        table += f"\nNo pictures: {error}.\n"
    return table


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
