"""Tables of an evaluation with the answers of a peer beside ours, row by row (studies/kvpress_peer.py).

    python studies/peer_table.py --config studies/hidden.yaml --answers runs/kvpress.jsonl --reference reread

Takes what launch/evaluate.py takes; our records are those in its output folder. Answers are scored as ours are, and a
difference is a mean over the rows that both have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o_dist.cli.evaluate import load_essays, make_parser, read_config
from d2o_dist.config.eval_tasks import ESSAYS
from d2o_dist.config.evaluate import FULL
from d2o_dist.eval.aggregate import summarise_task
from d2o_dist.eval.plan import EvalPlan, Job, prepare
from d2o_dist.eval.store import Record, read_records
from d2o_dist.eval.table import task_table


@dataclass(frozen=True)
class Peer:
    """A method of somebody else's, at one budget; as `config.evaluate.Method` for tables."""

    name: str
    budget: str

    @property
    def label(self) -> str:
        """Name and budget."""
        return f"{self.name}@{self.budget}"


def record_of(job: Job, answer: Mapping[str, Any], full: Record) -> Record:
    """An answer as a record of ours; what it holds is told by its ratio and the bytes of our full cache."""
    held = answer["achieved_keep_ratio"] * full["full_bytes"]
    scores = answer["scores"] if job.encoded is None else job.task.score(job.row, answer["text"])
    ratio = answer["achieved_keep_ratio"]
    return {
        "scores": scores, "achieved_keep_ratio": ratio, "held_bytes": held, "full_bytes": full["full_bytes"],
        "groups": dict(job.row.groups),
    }  # fmt: skip


def tables(plan: EvalPlan, ours: Mapping[str, Record], answers: Iterable[Mapping[str, Any]], reference: str) -> str:
    """All tasks as Markdown.

    Raises:
        ValueError: answers to other rows than those of the plan.
    """
    by_digest: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_digest.setdefault(answer["digest"], []).append(answer)
    strange = set(by_digest) - {job.digest for job in plan.jobs}
    if strange:
        raise ValueError(f"{len(strange)} rows of the answers are none of this evaluation, such as {min(strange)}")
    parts = []
    for task in plan.tasks:
        jobs = [job for job in plan.jobs if job.task is task]
        results = {
            method.label: {job.row.id: ours[key] for job in jobs if (key := job.key(method)) in ours}
            for method in plan.methods
        }
        peers: dict[str, Peer] = {}
        for job in jobs:
            full = results[FULL].get(job.row.id)
            for answer in by_digest.get(job.digest, ()) if full is not None else ():
                peer = Peer(answer["method"], f"{100 * answer['keep_ratio']:g}%")
                peers[peer.label] = peer
                results.setdefault(peer.label, {})[job.row.id] = record_of(job, answer, full)
        summary = summarise_task(task, [*plan.methods, *peers.values()], results, len(jobs), reference)
        parts += [f"## {task.name}", task_table(summary, reference)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Print the tables; 2 for bad usage."""
    parser = make_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--answers", nargs="+", required=True, type=Path, help="files of studies/kvpress_peer.py")
    parser.add_argument("--reference", required=True, help="the method of ours that the others are compared with")
    args = parser.parse_args()
    try:
        plan = prepare(read_config(args), {ESSAYS: load_essays})
        if args.reference not in {method.name for method in plan.methods}:
            raise ValueError(f"reference ({args.reference}) is none of the methods")
        ours = read_records(Path(plan.config.output).expanduser())
        lines = [line for path in args.answers for line in path.read_text(encoding="utf-8").splitlines()]
        print(tables(plan, ours, map(json.loads, lines), args.reference), end="")
    except (OSError, ValueError) as error:
        print(f"peer_table.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
