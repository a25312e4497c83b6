"""Interleaved timing and reports, shared by the benchmarks."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch


def interleaved_medians(cases: dict[str, Callable[[], object]], reps: int) -> dict[str, float]:
    """Median seconds of each case. Round-robin after one warm-up each, so that a busy machine slows all cases alike."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(reps):
        for name, run in cases.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """What the figures depend on. load_1m above cores: the machine was busy, distrust the seconds."""
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows of one set of keys, as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def write_report(out: Path, name: str, rows: list[dict[str, object]], facts: dict[str, object]) -> Path:
    """Writes OUT/<date>-<name>.json and .md; returns the path of the .md."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{name}"
    stem.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    path = stem.with_suffix(".md")
    path.write_text(f"# {name}\n\n{listed}\n\n{markdown_table(rows)}\n")
    return path
