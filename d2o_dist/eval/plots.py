"""Pictures of the results: heat maps over the axes of a task, and quality against what is kept. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLUMNS = 4


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """All pictures of an evaluation, as PNG files in `folder`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.figure  # noqa: F401  fails here, before any file is written

    paths = []
    for name, task in summary["tasks"].items():
        stem = name.replace("/", "-")
        lines = [line for line in task["methods"] if line["n"]]
        if task["axes"] and lines:
            budgets = [budget for budget in dict.fromkeys(line["budget"] for line in lines) if budget != "100%"]
            for budget in budgets or ["100%"]:
                chosen = [line for line in lines if line["budget"] in (budget, "100%")]
                path = folder / f"heatmap-{stem}-{budget.replace('%', 'pct').replace(' ', '-')}.png"
                paths.append(heat_maps(task, chosen, f"{name}: {task['primary']}, {budget}", path))
        if len({line["budget"] for line in lines}) > 2:
            paths.append(curves(task, lines, name, folder / f"curve-{stem}.png"))
    return paths


def heat_maps(task: Mapping[str, Any], lines: list[Mapping[str, Any]], title: str, path: Path) -> Path:
    """One panel a method: the primary metric over the task's two axes."""
    from matplotlib.figure import Figure

    x, y = task["axes"]
    cells = [cell for line in lines for cell in line["cells"]]
    xs, ys = sorted({cell[x] for cell in cells}), sorted({cell[y] for cell in cells})
    columns = min(_COLUMNS, len(lines))
    count = math.ceil(len(lines) / columns)
    figure = Figure(figsize=(1.6 + columns * max(1.6, 0.5 * len(xs)), 0.9 + count * (0.8 + 0.28 * len(ys))))
    panels = figure.subplots(count, columns, squeeze=False).flatten()
    for panel in panels[len(lines) :]:
        panel.set_axis_off()
    for panel, line in zip(panels, lines, strict=False):
        grid = [[math.nan] * len(xs) for _ in ys]
        for cell in line["cells"]:
            grid[ys.index(cell[y])][xs.index(cell[x])] = cell["scores"][task["primary"]]["mean"]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(f"{line['method']} {line['scores'][task['primary']]['mean']:.2f}", fontsize=8)
        panel.set_xticks(range(len(xs)), [f"{value:g}" for value in xs], fontsize=6, rotation=45)
        panel.set_yticks(range(len(ys)), [f"{value:g}" for value in ys], fontsize=6)
    panels[0].set_ylabel(y, fontsize=7)
    panels[0].set_xlabel(x, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.subplots_adjust(hspace=0.75, wspace=0.35, bottom=0.12, right=0.88)
    figure.colorbar(image, ax=list(panels), shrink=0.6)
    figure.savefig(path, dpi=130)
    return path


def curves(task: Mapping[str, Any], lines: list[Mapping[str, Any]], name: str, path: Path) -> Path:
    """The primary metric with its standard error against the share of the cache that was kept, a line a method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    full = next((line for line in lines if line["budget"] == "100%"), None)
    if full is not None:
        axes.axhline(full["scores"][task["primary"]]["mean"], color="black", linewidth=0.8, label="full")
    for method in dict.fromkeys(line["method"] for line in lines if line["budget"] != "100%"):
        points = sorted(
            (
                line["achieved_keep_ratio"],
                line["scores"][task["primary"]]["mean"],
                line["scores"][task["primary"]]["se"] or 0,
            )
            for line in lines
            if line["method"] == method
        )
        kept, means, errors = zip(*points, strict=True)
        axes.errorbar(kept, means, yerr=errors, marker="o", markersize=3, linewidth=1, capsize=2, label=method)
    axes.set(xscale="log", xlabel="achieved keep ratio", ylabel=task["primary"], title=name)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)
    return path
