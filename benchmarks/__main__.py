"""The benchmarks by name: python -m benchmarks NAME [its own arguments; --help tells them]."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "layers": "kernels and layers: prefill, decode, eviction, beside SDPA, with shares of a measured roofline",
    "lengths": "the cost of each part against the length of the prompt, with a plot",
    "model": "a whole model of real shape with random weights: first token, tokens/s, memory, full against compressed",
    "largest": "the largest batch that fits, and tokens/s there, full against compressed",
    "jobs": "prompts and answers of mixed lengths: rows that come and go, against fixed batches",
    "text": "a model on text, over the plain model: reading a prompt, and a step",
    "reading": "peak memory of reading a prompt: plain, whole, layer by layer",
    "prefill": "prompt attention with and without column sums, one and two passes",
    "memory": "peak memory of one layer",
    "checks": "every Triton kernel against its oracle",
    "sharded": "one long prompt over ranks beside one process: equality, memory, traffic (under torchrun)",
    "training": "time and peak memory of one training step against the length of the row",
    "gpu_check": "all checks and timings of one GPU in one report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmark with the rest of the arguments."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in BENCHMARKS:
        asked = name in ("-h", "--help")
        print(__doc__, *(f"  {key:<10} {text}" for key, text in BENCHMARKS.items()), sep="\n")
        if not asked:
            print(f"\nbenchmarks: error: there is no benchmark {name!r}", file=sys.stderr)
        return 0 if asked else 2
    module = "benchmarks." + ("checks.__main__" if name == "checks" else name)
    return importlib.import_module(module).main(rest) or 0


if __name__ == "__main__":
    raise SystemExit(main())
