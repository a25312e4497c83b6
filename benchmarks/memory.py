"""Peak memory of one layer of Llama-3-8B's shape, prefilled, scored and compressed: linear in T, never T x T.

    python -m benchmarks.memory --length 32768

ru_maxrss only ever grows, so one process measures one length: run it as a subprocess, and read the last line (JSON).
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence

import torch

from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.core.softmax import Softmax
from d2o_dist.policy.config import D2OConfig

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3-8B
LIMIT_GIB = 3.0  # whole process, at 32K


def peak_gib() -> float:
    """Peak resident memory of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_layer(length: int) -> float:
    """One bf16 prompt through a compressed cache of one layer; the relative error of `sum of scores = Hq * T`."""
    shapes = [(1, count, length, HEAD_DIM) for count in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    config = D2OConfig(keep_ratio=0.2, budget={"min_layer_tokens": 32}, statistics={"query_stride": 1})
    cache = CompressedCache(config, [None])
    cache.attend(0, q, k, v, Softmax(HEAD_DIM**-0.5), None)
    total = cache.layers[0].slots.scores.double().sum().item()
    cache.finalize()
    assert length < 100 or cache.layers[0].kv_len == [length // 5]
    return abs(total / (NUM_HEADS * length) - 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="prompt tokens")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    run_layer(64)  # libraries and thread pools are loaded before the baseline is read
    before, start = peak_gib(), time.perf_counter()
    error = run_layer(args.length)
    result = {
        "length": args.length,
        "peak_gib": round(peak_gib(), 3),
        "increase_gib": round(peak_gib() - before, 3),
        "dense_float32_matrix_gib": round(NUM_HEADS * args.length**2 * 4 / 2**30, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "mass_error": float(f"{error:.1e}"),
    }
    print(json.dumps(result))
    if error > 1e-3:
        raise SystemExit(f"scores do not add up to Hq * T: relative error {error:.1e}")
    if args.length <= 32768 and result["peak_gib"] > LIMIT_GIB:
        raise SystemExit(f"peak memory ({result['peak_gib']} GiB) is over the promise ({LIMIT_GIB} GiB)")


if __name__ == "__main__":
    main()
