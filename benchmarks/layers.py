"""Attention and D2O's own work of one layer, case beside case in one run, after a gate of correctness.

    python -m benchmarks.layers --groups decode --length 32768 --heads 32/8 --head-dim 128 --dtype float32

Ratios are of medians; the case beside which each is put comes first. Shares of the copy and the matmul that this run
measured on this device say what bounds an op.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.groups import GROUPS, Group, Shape
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.timing import CLOCKS, interleaved_medians, machine, markdown_table, write_report

DTYPES = ("float32", "bfloat16", "float16")


def check_gate(group: Group) -> dict[str, float]:
    """The gate's errors.

    Raises:
        SystemExit: one is over its limit; nothing may be timed.
    """
    errors = group.gate().errors
    red = [f"{name}: {error:.1e} > {limit:.0e}" for name, (error, limit) in errors.items() if not error <= limit]
    if red:
        raise SystemExit(f"correctness gate of {group.name} is red, nothing is timed: " + "; ".join(red))
    return {name: float(f"{error:.1e}") for name, (error, _) in errors.items()}


def time_group(group: Group, shape: Shape, ceilings: Ceilings, reps: int, clock: str) -> tuple[list[dict], list[dict]]:
    """Rows of the table of times, and rows of the table of targets."""
    seconds = interleaved_medians(group.cases, reps, clock)
    seconds = {name: value / group.calls.get(name, 1) for name, value in seconds.items()}
    base = seconds[group.baseline]
    rows = []
    for name, value in seconds.items():
        row = {"group": group.name, "shape": shape.name, "case": name, "ms": f"{1e3 * value:.3f}"}
        row["of the first"] = f"{value / base:.3f}x"
        work = group.work.get(name)
        rows.append(row | (work.share(value, ceilings) if work else {"% of copy": "", "% of matmul": ""}))
    targets = []
    for name, other, limit in group.targets:
        ratio = seconds[name] / seconds[other]
        row = {"group": group.name, "shape": shape.name, "case": name, "beside": other, "measured": f"{ratio:.3f}x"}
        targets.append(row | {"target": f"<= {limit:.3f}x", "met": "yes" if ratio <= limit else "NO"})
    return rows, targets


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"comma separated, of {', '.join(GROUPS)}")
    parser.add_argument("--length", type=int, default=8192, help="prompt tokens")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--copies", type=int, default=1, help="caches that decode steps go through in turn")
    parser.add_argument("--name", help="of the shape, in the table")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: processor time, for a busy machine")
    parser.add_argument("--out", type=Path, help="write dated JSON and Markdown here")
    args = parser.parse_args(argv)
    names = args.groups.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"no group is called {unknown[0]!r}; there are {', '.join(GROUPS)}")
    heads = tuple(int(part) for part in args.heads.split("/"))
    shape = Shape(
        f"{args.name + ', ' if args.name else ''}{args.heads} x {args.head_dim}, {args.length} tokens, {args.dtype}",
        heads,
        args.head_dim,
        args.length,
        getattr(torch, args.dtype),
        args.device,
        args.keep_ratio,
        args.copies,
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"device {args.device!r}: this machine has no CUDA device")
    ceilings = measure_ceilings(args.device, shape.dtype, clock=args.clock)
    facts = {**machine(), "reps": args.reps, "clock": args.clock, "copy GB/s": round(ceilings.copy_bytes / 1e9, 1)}
    facts["matmul GFLOP/s"] = round(ceilings.matmul_flops / 1e9, 1)
    rows, targets = [], []
    for name in names:
        group = GROUPS[name](shape)
        facts[f"errors of {name}"] = check_gate(group)
        times, reached = time_group(group, shape, ceilings, args.reps, args.clock)
        rows, targets = rows + times, targets + reached
    facts["load_1m at the end"] = machine()["load_1m"]
    print(*(f"{key}: {value}" for key, value in facts.items()), "", sep="\n")
    print(markdown_table(rows), "", markdown_table(targets), sep="\n")
    if args.out:
        name = "layer-" + "-".join(names)
        print(f"\nwritten: {write_report(args.out, name, rows, facts, targets)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
