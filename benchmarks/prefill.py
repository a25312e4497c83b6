"""What exact scores cost at prefill: SDPA alone, with the lse, with column sums (in one fused pass, and in two),
with the last 32 queries' sums.

    python -m benchmarks.prefill --lengths 4096,8192 --heads 32/8 --head-dim 128 --dtype float32 --reps 3
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import interleaved_medians, machine, markdown_table, write_report
from d2o_dist.kernels.column_sums import column_sums, naive_column_sums
from d2o_dist.kernels.prefill_attention import naive_prefill_attention, prefill_attention
from d2o_dist.kernels.scored_prefill import scored_prefill_attention

GATE_LENGTH = 300
RATE_WINDOW = 32


def make_inputs(length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str):
    """q [1, Hq, T, D], k and v [1, Hkv, T, D], normal."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, count, length, head_dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for shape in shapes]


def gate(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest errors of a small case against the oracles; raises SystemExit if they are too large to time anything."""
    q, k, v = make_inputs(GATE_LENGTH, heads, head_dim, dtype, device)
    scale = head_dim**-0.5
    out, lse = prefill_attention(q, k, v, scale)
    want, want_lse = naive_prefill_attention(q.double(), k.double(), v.double(), scale)
    errors = {"out": (out - want).abs().max().item(), "lse": (lse - want_lse).abs().max().item()}
    want_all = (want, want_lse, naive_column_sums(q.double(), k.double(), want_lse, scale))
    for name, found, expected in zip(
        ("scored_out", "scored_lse", "scored_sums"), scored_prefill_attention(q, k, v, scale), want_all, strict=True
    ):
        errors[name] = ((found - expected).abs() / (1 + expected.abs())).max().item()
    for name, num_last in (("sums", None), ("last_sums", RATE_WINDOW)):
        sums = column_sums(q, k, lse, scale, num_last=num_last)
        want_sums = naive_column_sums(q.double(), k.double(), want_lse, scale, num_last=num_last)
        errors[name] = ((sums - want_sums).abs() / (1 + want_sums)).max().item()
    half = dtype in (torch.float16, torch.bfloat16)
    limits = {name: 2e-2 if name.endswith("out") else 5e-4 for name in errors} if half else dict.fromkeys(errors, 1e-4)
    red = [f"{name}: {errors[name]:.1e} > {limits[name]:.0e}" for name in errors if not errors[name] <= limits[name]]
    if red:
        raise SystemExit("correctness gate is red, nothing is timed: " + "; ".join(red))
    return {name: float(f"{error:.1e}") for name, error in errors.items()}


def measure(length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str, reps: int) -> dict:
    """One row: seconds, and their ratios to SDPA alone."""
    q, k, v = make_inputs(length, heads, head_dim, dtype, device)
    scale, grouped = head_dim**-0.5, heads[0] != heads[1]

    def two_passes(num_last: int | None) -> None:
        _, lse = prefill_attention(q, k, v, scale)
        column_sums(q, k, lse, scale, num_last=num_last)

    seconds = interleaved_medians(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped),
            "lse": lambda: prefill_attention(q, k, v, scale),
            "sums": lambda: scored_prefill_attention(q, k, v, scale),
            "two_passes": lambda: two_passes(None),
            "last": lambda: two_passes(RATE_WINDOW),
        },
        reps,
    )
    base = seconds["sdpa"]
    return {
        "T": length,
        "heads": f"{heads[0]}/{heads[1]}",
        "D": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "SDPA s": f"{base:.3f}",
        "with lse": f"{seconds['lse'] / base:.2f}x",
        "with column sums": f"{seconds['sums'] / base:.2f}x",
        "the same in two passes": f"{seconds['two_passes'] / base:.2f}x",
        f"with last {RATE_WINDOW} sums": f"{seconds['last'] / base:.2f}x",
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192", help="prompt tokens, comma separated")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write dated JSON and Markdown here")
    args = parser.parse_args(argv)
    heads, dtype = tuple(int(part) for part in args.heads.split("/")), getattr(torch, args.dtype)
    case = (heads, args.head_dim, dtype, args.device)
    facts = {**machine(), "reps": args.reps, "errors": gate(*case)}
    rows = [measure(int(length), *case, args.reps) for length in args.lengths.split(",")]
    print(*(f"{key}: {value}" for key, value in facts.items()), "", markdown_table(rows), sep="\n")
    if args.out:
        print(f"\nwritten: {write_report(args.out, 'prefill', rows, facts)}")


if __name__ == "__main__":
    main()
