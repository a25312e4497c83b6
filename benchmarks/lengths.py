"""What each part of D2O costs against the length of the prompt, and its share of attention, with a plot.

    python -m benchmarks.lengths --lengths 4096,8192,16384 --heads 8/2 --head-dim 128 --out docs/benchmarks

One layer, one row. At the end of a prompt: attention (SDPA), what column sums add to it (exact, and from every eighth
query), the eviction. For each decoded token: attention over the full cache, over the kept slots, and the whole step
with its share of evictions. Attention of a prompt takes time that grows with the square of its length: --prefill-to
says up to where it is measured; nothing is extrapolated.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.groups import STRIDED, Shape, decode_group, evict_group, prefill_group
from benchmarks.layers import DTYPES, check_gate
from benchmarks.timing import CLOCKS, interleaved_medians, machine, markdown_table, write_report

PROMPT = ("attention", "column sums", "eviction")
SAMPLED = "column sums, every 8th query"
STEP = ("attention over the full cache", "attention over the kept slots", "whole step")


def measure(shape: Shape, reps: int, clock: str, *, with_prefill: bool) -> dict[str, float]:
    """Milliseconds of each part at one length; without `with_prefill` not those of the prompt's attention."""
    evict, decode = evict_group(shape), decode_group(shape)
    cases = {
        "eviction": evict.cases["whole eviction, d2o"],
        STEP[0]: decode.cases["SDPA, full cache"],
        STEP[1]: decode.cases["attention"],
        STEP[2]: decode.cases["whole step, d2o"],
    }
    if with_prefill:
        prefill = prefill_group(shape).cases
        scored = {"column sums": prefill["with column sums"], SAMPLED: prefill[STRIDED]}
        cases = {"attention": prefill["SDPA"], **scored, **cases}
    seconds = interleaved_medians(cases, reps, clock)
    seconds[STEP[2]] /= decode.calls["whole step, d2o"]
    for name in ("column sums", SAMPLED) if with_prefill else ():
        seconds[name] = max(0.0, seconds[name] - seconds["attention"])
    return {name: 1e3 * value for name, value in seconds.items()}


def table_row(length: int, part: dict[str, float]) -> dict[str, object]:
    """Milliseconds and shares, "not measured" where they were not."""
    row: dict[str, object] = {"T": length}
    for name in (*PROMPT[:2], SAMPLED, PROMPT[2], *STEP):
        row[f"{name}, ms"] = f"{part[name]:.2f}" if name in part else "not measured"
    whole = sum(part[name] for name in PROMPT) if PROMPT[0] in part else None
    for name in PROMPT:
        row[f"{name} of prompt"] = "not measured" if whole is None else f"{part[name] / whole:.0%}"
    return row | {"step of full attention": f"{part[STEP[2]] / part[STEP[0]]:.2f}x"}


def plot(path: Path, lengths: list[int], parts: list[dict[str, float]], title: str) -> None:
    """Prompt and step beside each other, logarithmic. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    groups = ((*PROMPT[:2], SAMPLED, PROMPT[2]), STEP)
    for axis, names, what in zip(axes, groups, ("end of the prompt", "one decoded token"), strict=True):
        for name in names:
            measured = [(length, part[name]) for length, part in zip(lengths, parts, strict=True) if name in part]
            axis.plot(*zip(*measured, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="ms", title=what)
        axis.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axis.legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="prompt tokens, comma separated")
    parser.add_argument("--prefill-to", type=int, help="prompt tokens up to which its attention is measured; all")
    parser.add_argument("--heads", default="8/2", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: processor time, for a busy machine")
    parser.add_argument("--out", type=Path, help="write dated JSON, Markdown and PNG here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads, lengths = tuple(int(part) for part in args.heads.split("/")), [int(x) for x in args.lengths.split(",")]
    title = f"{args.heads} heads x {args.head_dim}, {args.dtype}, 20% kept, {args.clock} clock"
    facts = {**machine(), "shape": title, "reps": args.reps}
    parts = []
    for length in lengths:
        shape = Shape(title, heads, args.head_dim, length, getattr(torch, args.dtype), args.device)
        if not parts:
            for build in (prefill_group, evict_group, decode_group):
                group = build(shape)
                facts[f"errors of {group.name}"] = check_gate(group)
        with_prefill = args.prefill_to is None or length <= args.prefill_to
        parts.append(measure(shape, args.reps, args.clock, with_prefill=with_prefill))
        print(length, {name: round(value, 2) for name, value in parts[-1].items()}, flush=True)
    rows = [table_row(length, part) for length, part in zip(lengths, parts, strict=True)]
    facts["load_1m at the end"] = machine()["load_1m"]
    print(*(f"{key}: {value}" for key, value in facts.items()), "", markdown_table(rows), sep="\n")
    if args.out:
        path = write_report(args.out, "lengths", rows, facts)
        plot(path.with_suffix(".png"), lengths, parts, title)
        print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
