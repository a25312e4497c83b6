"""The first thing to run on a GPU: checks every kernel against its oracle, then times them beside PyTorch's attention.

    python -m benchmarks.gpu_check

Needs a checkout, torch with CUDA, triton and transformers.

Prints tables of what serves which op, of checks, of times and of targets, and writes them, dated, as JSON and Markdown.
The checks of an op and a group of timings are processes of their own, so that a kernel that fails, hangs or corrupts
its CUDA context hides no other: what it said is in the report.

Exit status: 0 if all was right and timed; 1 if anything was wrong, failed or ran out of time; 2 without a CUDA device.
"""

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.checks import all_checks
from benchmarks.checks.common import DTYPES
from benchmarks.groups import GROUPS
from benchmarks.serving import serving
from benchmarks.timing import machine, markdown_table, write_report
from d2o_dist.kernels.backend import has_triton

LIMIT_SECONDS = 450
# Arguments of `layers`: a layer of each model at 32K tokens. Eight copies of a kept cache are more than L2 holds.
LAYERS = {
    "Llama-3-8B": ["--heads", "32/8", "--head-dim", "128", "--length", "32768", "--dtype", "bfloat16", "--copies", "8"],
    "Qwen2.5-7B": ["--heads", "28/4", "--head-dim", "128", "--length", "32768", "--dtype", "bfloat16", "--copies", "8"],
}


def run_module(module: str, arguments: Sequence[str], deadline: float) -> tuple[str, str | None]:
    """Standard output of a module that runs in its own process, and what went wrong, or None."""
    left = deadline - time.monotonic()
    if left <= 0:
        return "", "left out: no time left"
    try:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=left)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        return output, f"stopped after {left:.0f} s: no time left"
    if done.returncode:
        return done.stdout, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout, None


def outcomes(output: str) -> list[dict]:
    """What checks have printed, a JSON line each. The last is cut off where their process was ended."""
    found = []
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) and "right" in value else []
    return found


def run_checks(ops: Sequence[str], device: str, deadline: float) -> tuple[list[dict], list[str]]:
    """One row an op: how many cases were right, and which came nearest to its limit; and everything that was wrong.

    All ops at once: most of the time goes into compiling, on the processors.
    """
    calls = [("benchmarks.checks", ["--op", op, "--device", device], deadline) for op in ops]
    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(lambda call: run_module(*call), calls))
    rows, problems = [], []
    for op, (output, failure) in zip(ops, results, strict=True):
        found = outcomes(output)
        wrong = [outcome for outcome in found if not outcome["right"]]
        expected = sum(check.op == op for check in all_checks())
        share, nearest = max(
            (
                (error / limit if limit else error, f"{outcome['name']}, {name}: {error:.1e} of {limit:.0e}")
                for outcome in found
                for name, (error, limit) in outcome.get("errors", {}).items()
            ),
            default=(0.0, ""),
        )
        rows.append({"op": op, "checks": expected, "right": len(found) - len(wrong), "nearest to its limit": nearest})
        problems += [f"{op} {x['name']}: {x.get('traceback') or x['errors']}" for x in wrong]
        if failure and not (wrong and len(found) == expected):
            problems.append(f"{op}, after {len(found)} of {expected} checks: {failure}")
    return rows, problems


def run_timings(
    layers: dict[str, Sequence[str]], groups: Sequence[str], device: str, deadline: float
) -> tuple[list[dict], list[dict], list[str]]:
    """Rows of times, rows of targets, and what failed. One at a time: they would slow each other."""
    rows, targets, problems = [], [], []
    for name, arguments in layers.items():
        for group in groups:
            with tempfile.TemporaryDirectory() as folder:
                call = [*arguments, "--name", name, "--groups", group, "--device", device, "--out", folder]
                _, failure = run_module("benchmarks.layers", call, deadline)
                if failure:
                    problems.append(f"{group}, {name}: {failure}")
                    continue
                (report,) = Path(folder).glob("*.json")
                values = json.loads(report.read_text())
            facts = {key: values["facts"][key] for key in ("copy GB/s", "matmul GFLOP/s")}
            rows += [row | facts for row in values["rows"]]
            targets += values["more"][0]
    return rows, targets, problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the report")
    parser.add_argument("--checks-only", action="store_true", help="do not time")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which nothing new is begun")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: error: this machine has no CUDA device that PyTorch can use", file=sys.stderr)
        return 2
    if not has_triton():
        print("gpu_check: error: the package triton is not installed", file=sys.stderr)
        return 2
    start = time.monotonic()
    facts = {**machine(), "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    facts["triton"] = importlib.metadata.version("triton")
    checks_end = start + 0.6 * args.limit  # checks may not take all the time that timing needs
    print(*(f"{key}: {value}" for key, value in facts.items()), "", sep="\n", flush=True)
    served = serving("cuda", DTYPES)
    print(markdown_table(served), "", sep="\n", flush=True)
    ops = sorted({check.op for check in all_checks()})
    rows, problems = run_checks(ops, "cuda", checks_end)
    facts["seconds of checks"] = round(time.monotonic() - start, 1)
    print(markdown_table(rows), flush=True)
    times, targets = [], []
    if not args.checks_only:
        times, targets, more = run_timings(LAYERS, list(GROUPS), "cuda", start + args.limit)
        problems += more
    facts["seconds"] = round(time.monotonic() - start, 1)
    for table in filter(None, (times, targets)):
        print("\n" + markdown_table(table), flush=True)
    print("", *problems, f"{len(problems)} problems", sep="\n")
    facts["problems"] = problems
    print(f"written: {write_report(args.out, 'gpu-check', rows, facts, times, targets, served)}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
