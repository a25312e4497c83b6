"""From records to numbers: means with standard errors, and ratios to the full cache over the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from d2o_dist.config.evaluate import FULL, Method
from d2o_dist.eval.plan import EvalPlan
from d2o_dist.eval.store import Record

# Nats a token beyond which a perplexity is no number in double precision.
_MAX_NLL = 700.0
# Of a method without a result: it has no figure.
_NOTHING = {"n": 0, "scores": None, "achieved_keep_ratio": None, "held_bytes": None, "full_bytes": None}


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` and `se`, the standard error of the mean (None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "se": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return {"mean": mean, "se": math.sqrt(variance / count)}


def ratio_to_full(values: Sequence[float], full: Sequence[float]) -> dict[str, float | None]:
    """Ratio of the means of paired values, with its standard error to first order; None where `full` is all 0.

    The rows are the same, so what varies is `value - ratio * full`: most of the rows' own spread cancels.
    """
    base = math.fsum(full) / len(full)
    if base == 0:
        return {"ratio": None, "se": None}
    ratio = math.fsum(values) / len(values) / base
    spread = mean_and_error([value - ratio * other for value, other in zip(values, full, strict=True)])["se"]
    return {"ratio": ratio, "se": None if spread is None else spread / base}


def summarise_cell(records: Mapping[str, Record], full: Mapping[str, Record], primary: str) -> dict[str, Any]:
    """Numbers of one method over some rows.

    Args:
        records, full: row -> record of the method, and of the full cache; errors left out.
    """
    rows = list(records.values())
    metrics = list(rows[0]["scores"])
    paired = [row for row in records if row in full]
    scores = {name: mean_and_error([row["scores"][name] for row in rows]) for name in metrics}
    if "nll" in scores:
        mean, error = scores["nll"]["mean"], scores["nll"]["se"]
        # To first order; of the mean over passages, so each passage counts the same.
        perplexity = math.exp(mean) if mean < _MAX_NLL else None
        scores["perplexity"] = {"mean": perplexity, "se": None if None in (perplexity, error) else perplexity * error}
    cell: dict[str, Any] = {
        "n": len(rows),
        "scores": scores,
        "achieved_keep_ratio": math.fsum(row["achieved_keep_ratio"] for row in rows) / len(rows),
        "held_bytes": math.fsum(row["held_bytes"] for row in rows) / len(rows),
        "full_bytes": math.fsum(row["full_bytes"] for row in rows) / len(rows),
    }
    if paired:
        cell["to_full"] = ratio_to_full(
            [records[row]["scores"][primary] for row in paired], [full[row]["scores"][primary] for row in paired]
        )
    return cell


def difference_to(records: Mapping[str, Record], other: Mapping[str, Record], primary: str) -> dict[str, Any] | None:
    """Mean of `records - other` over the rows that both have, with its standard error; None where they share none."""
    both = [row for row in records if row in other]
    if not both:
        return None
    return mean_and_error([records[row]["scores"][primary] - other[row]["scores"][primary] for row in both])


def summarise_task(
    task: Any,
    methods: Sequence[Method],
    results: Mapping[str, Mapping[str, Record]],
    num_rows: int,
    reference: str | None = None,
) -> dict[str, Any]:
    """One task: every method over all rows, and by every group value and every pair on the axes. Rows without a result
    are left out, and counted: all were tried, and these failed.

    Args:
        results: label of a method -> row -> record, errors left out.
        reference: name of the method that the others are compared with at their own budgets.
    """
    reference_label = {method.budget: method.label for method in methods if method.name == reference}
    full = results.get(FULL, {})
    out: dict[str, Any] = {"primary": task.primary, "higher_is_better": task.higher_is_better, "num_rows": num_rows}
    out["axes"] = list(task.axes) if task.axes else None
    out["note"] = task.note
    out["methods"] = []
    for method in methods:
        records = results.get(method.label, {})
        about = {"method": method.name, "budget": method.budget, "label": method.label}
        line: dict[str, Any] = {**about, **_NOTHING, "num_failed": num_rows - len(records)}
        if records:
            line |= summarise_cell(records, full, task.primary)
            if method.budget in reference_label and method.name != reference:
                others = results.get(reference_label[method.budget], {})
                line["to_reference"] = difference_to(records, others, task.primary)
            line["by"] = {
                group: [
                    {group: value, **summarise_cell(part, full, task.primary)}
                    for value, part in _split(records, (group,)).items()
                ]
                for group in next(iter(records.values()))["groups"]
            }
            if task.axes:
                line["cells"] = [
                    {**dict(zip(task.axes, _pair(key), strict=True)), **summarise_cell(part, full, task.primary)}
                    for key, part in _split(records, task.axes).items()
                ]
        out["methods"].append(line)
    return out


def _pair(key: Any) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def _split(records: Mapping[str, Record], groups: Sequence[str]) -> dict[Any, dict[str, Record]]:
    parts: dict[Any, dict[str, Record]] = {}
    for row, record in records.items():
        values = tuple(record["groups"][group] for group in groups)
        parts.setdefault(values[0] if len(values) == 1 else values, {})[row] = record
    return dict(sorted(parts.items()))


def summarise(plan: EvalPlan, found: Mapping[str, Record]) -> dict[str, Any]:
    """All tasks of a plan, from its own records among those found (key -> record)."""
    tasks = {}
    for task in plan.tasks:
        jobs = [job for job in plan.jobs if job.task is task]
        results = {
            method.label: {job.row.id: found[key] for job in jobs if (key := job.key(method)) in found}
            for method in plan.methods
        }
        tasks[task.name] = summarise_task(task, plan.methods, results, len(jobs), plan.config.reference)
    known = {"model": plan.config.model, "model digest": plan.weights}
    known |= {"question": plan.config.question, "reference": plan.config.reference}
    return {**known, "tasks": tasks}
