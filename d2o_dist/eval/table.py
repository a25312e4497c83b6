"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show(value: Mapping[str, float | None] | None, key: str = "mean") -> str:
    """`0.812 ± 0.035`; without an error where there is none; `-` where there is no value."""
    if value is None or value[key] is None:
        return "-"
    number = _digits(value[key])
    return number if value["se"] is None else f"{number} ± {_digits(value['se'])}"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.0995 or value == 0 else f"{value:.4f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def task_table(summary: Mapping[str, Any], reference: str | None = None) -> str:
    """One line a method and budget: what was kept, every metric, the ratio to the full cache, and how far from the
    reference, where there is one. A method all of whose rows failed has no figure."""
    lines = summary["methods"]
    metrics = next((list(line["scores"]) for line in lines if line["n"]), None)
    if metrics is None:
        return "no results"
    primary = summary["primary"]
    metrics = [primary] + [name for name in metrics if name != primary]
    compared = [] if reference is None else [f"{primary}: minus {reference}"]
    head = ["method", "budget", "kept", "MiB", *metrics, f"{primary}: ratio to full", *compared, "n"]
    rows = [
        [
            line["method"],
            line["budget"],
            f"{line['achieved_keep_ratio']:.4f}" if line["n"] else "-",
            f"{line['held_bytes'] / 2**20:.2f}" if line["n"] else "-",
            *(show(line["scores"][name] if line["n"] else None) for name in metrics),
            show(line.get("to_full"), "ratio"),
            *(show(line.get("to_reference")) for _ in compared),
            str(line["n"]),
        ]
        for line in lines
    ]
    return markdown(head, rows)


def group_table(summary: Mapping[str, Any], group: str) -> str | None:
    """The primary metric by the values of one group; None where there is one value or none."""
    lines = [line for line in summary["methods"] if line["n"]]
    values = sorted({cell[group] for line in lines for cell in line["by"].get(group, [])})
    if len(values) < 2:
        return None
    rows = []
    for line in lines:
        cells = {cell[group]: cell for cell in line["by"][group]}
        shown = [show(cells[value]["scores"][summary["primary"]]) if value in cells else "-" for value in values]
        rows.append([line["method"], line["budget"], *shown])
    return markdown(["method", "budget", *(f"{group} {value:g}" for value in values)], rows)


def suite_tables(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For tasks named `suite/task`: suite -> a table of methods by tasks with the unweighted average over tasks.

    A method without results in one of the tasks has no average.
    """
    suites: dict[str, list[str]] = {}
    for name in tasks:
        suite, slash, _ = name.partition("/")
        if slash:
            suites.setdefault(suite, []).append(name)
    tables = {}
    for suite, names in suites.items():
        rows = []
        for place, line in enumerate(tasks[names[0]]["methods"]):
            lines = [tasks[name]["methods"][place] for name in names]
            means = [
                one["scores"][tasks[name]["primary"]] if one["n"] else None
                for name, one in zip(names, lines, strict=True)
            ]
            average = sum(mean["mean"] for mean in means) / len(means) if all(means) else None
            shown = "-" if average is None else _digits(average)
            rows.append([line["method"], line["budget"], shown, *(show(mean) for mean in means)])
        tables[suite] = markdown(["method", "budget", "average", *(name.partition("/")[2] for name in names)], rows)
    return tables


def report(summary: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        f"# {summary['model']}",
        f"Question {summary['question']}. Errors are standard errors of the mean over rows. `kept` and `MiB` are means "
        "over rows, right after the compression. `full` ran on the same rows.",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
    ]
    for suite, table in suite_tables(summary["tasks"]).items():
        parts += [f"## {suite}", table]
    for name, task in summary["tasks"].items():
        missing = [f"{line['label']} {line['n']}" for line in task["methods"] if line["n"] < task["num_rows"]]
        parts += [f"## {name}", task.get("note"), task_table(task, summary.get("reference"))]
        if missing:
            failed = [f"{line['label']} {line['num_failed']}" for line in task["methods"] if line["num_failed"]]
            parts.append(f"Incomplete, of {task['num_rows']} rows: {', '.join(missing)}. Failed: {', '.join(failed)}.")
        groups = next((list(line["by"]) for line in task["methods"] if line["n"]), [])
        for group in groups:
            if (table := group_table(task, group)) is not None:
                parts += [f"{task['primary']} by {group}:", table]
    return "\n\n".join(filter(None, parts)) + "\n"
