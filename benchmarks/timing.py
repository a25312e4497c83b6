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

# Wall clock, or the processor time of this process, which does not count waiting for a machine that others use. With
# more than one thread the latter adds up what each spent, spinning included: use it with one.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# On a GPU a case is called so often that it takes at least this long: clocks and launches are microseconds.
_LEAST_SECONDS = 5e-3


def interleaved_medians(cases: dict[str, Callable[[], object]], reps: int, clock: str = "wall") -> dict[str, float]:
    """Median seconds of each case. Round-robin after one warm-up each, so that a busy machine slows all cases alike."""
    calls = {}
    for name, run in cases.items():
        run()
        calls[name] = max(1, round(_LEAST_SECONDS / _seconds(run, 1, "wall"))) if torch.cuda.is_available() else 1
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(reps):
        for name, run in cases.items():
            seconds[name].append(_seconds(run, calls[name], clock) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: what it costs the GPU, without the time that Python takes to launch it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Callable[[], object], calls: int, clock: str) -> float:
    now = CLOCKS[clock]
    _synchronize()
    start = now()
    for _ in range(calls):
        run()
    _synchronize()
    return now() - start


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


def write_report(
    out: Path,
    name: str,
    rows: list[dict[str, object]],
    facts: dict[str, object],
    *more: list[dict[str, object]],
) -> Path:
    """Writes OUT/<date>-<name>.json and .md; returns the path of the .md. `more`: further tables, left out if empty."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{name}"
    values = {"facts": facts, "rows": rows} | ({"more": more} if any(more) else {})
    stem.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    path = stem.with_suffix(".md")
    tables = "\n\n".join(markdown_table(table) for table in (rows, *more) if table)
    path.write_text(f"# {name}\n\n{listed}\n\n{tables}\n")
    return path
