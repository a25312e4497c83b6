"""The rows of an evaluation as JSON lines, for programs that answer the same prompts in another way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2o_dist.engine.records import to_line
from d2o_dist.eval.plan import EvalPlan, Job
from d2o_dist.files.whole import replace_text


def rows_of(plan: EvalPlan) -> Iterator[dict[str, Any]]:
    """One mapping a row: what is read, what is compressed, and what is generated or predicted.

    `context` and `question` are token ids: with `question: hidden` the cache is compressed between them, else after
    both. A row whose next tokens are predicted has `continuation` instead, the tokens after its `context`.
    """
    for job in plan.jobs:
        yield {
            "task": job.task.name,
            "row": job.row.id,
            "digest": job.digest,
            "groups": dict(job.row.groups),
            "hidden": job.encoded is not None and plan.config.question == "hidden",
            "keep_ratios": list(plan.config.keep_ratios),
            **_tokens(job),
        }


def _tokens(job: Job) -> dict[str, Any]:
    row = job.row
    if job.encoded is None:
        return {"context": list(row.tokens[: row.num_prompt]), "continuation": list(row.tokens[row.num_prompt :])}
    return {
        "context": list(job.encoded.context),
        "question": list(job.encoded.question),
        "templated": job.encoded.templated,
        "context_text": row.context,
        "question_text": row.question,
        "prefix_text": row.prefix,
        "answers": list(row.answers),
        "max_new_tokens": row.max_new_tokens,
        "stop": list(row.stop),
    }


def write_rows(plan: EvalPlan, path: Path) -> int:
    """Write all rows, as a whole or not at all; how many.

    Raises:
        ValueError: something that is no file of rows has the name.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is not a regular file: name another one for the rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(map(to_line, rows_of(plan))))
    return len(plan.jobs)
