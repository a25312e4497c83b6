"""Peak memory of a process that reads one prompt: the plain model, the whole reading, and layer by layer.

    python -m benchmarks.reading --lengths 16384 32768 --layers 30 --out reading.jsonl --plot reading.png

The model has SmolLM2-135M's shape with positions extended, float32, random weights: memory does not depend on them.
Each case is a process of its own, for a peak only grows. What is printed is the rise over the loaded model, beside
what `prompt_memory` calculates. Lines are written as they are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.plan.memory import prompt_memory
from d2o_dist.plan.meshes import share_of
from d2o_dist.plan.model_size import size_of
from d2o_dist.policy.config import D2OConfig

# (name, preset, keep ratio); `plain` is the model with transformers' own cache.
CASES = (
    ("plain", None, 1.0), ("whole", "d2o", 0.2), ("layerwise", "d2o", 0.2), ("layerwise", "lean", 0.2),
    ("layerwise", "lean", 0.1), ("layerwise", "d2o", 0.1),
)  # fmt: skip
CHUNK = 2048


def config_of(layers: int, length: int) -> LlamaConfig:
    """SmolLM2-135M's shape with a small vocabulary."""
    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip


def peak_mib() -> float:
    """Peak resident memory of this process so far, as Linux says it; `ru_maxrss` would begin at that of the parent."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


@torch.no_grad()
def read(case: tuple[str, str | None, float], layers: int, length: int) -> float:
    """MiB that the peak rises by, over that of the loaded model."""
    reading, preset, ratio = case
    torch.manual_seed(0)
    config = config_of(layers, length)
    config._attn_implementation = "sdpa" if preset is None else "d2o"
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 1024, (1, length))

    def run(ids: torch.Tensor) -> None:
        if preset is not None:
            session = Session(model, D2OConfig.preset(preset, keep_ratio=ratio), reading=reading)
            session.prefill(ids, torch.ones_like(ids), CHUNK)
            return
        cache = DynamicCache(config=config)
        for part in ids.split(CHUNK, 1):
            model(part, past_key_values=cache, logits_to_keep=1)

    run(ids[:, :64])  # libraries and thread pools are loaded before the baseline is read
    before = peak_mib()
    run(ids)
    return peak_mib() - before


def planned(case: tuple[str, str | None, float], layers: int, length: int) -> dict[str, float]:
    """MiB by the formula: of the cache, the hidden states, and the peak without weights."""
    reading, preset, ratio = case
    if preset is None:
        reading, preset = "whole", "full"
    shape, d2o = size_of(config_of(layers, length)), D2OConfig.preset(preset, keep_ratio=ratio)
    found = prompt_memory(
        shape, d2o, share_of(shape, d2o, ParallelConfig()), length, dtype=torch.float32, chunk=CHUNK, reading=reading
    )
    parts = {"kept": found.kept, "one layer": found.one_layer, "whole": found.prompt, "hidden": found.hidden,
             "planned peak": found.peak - found.weights}  # fmt: skip
    return {name: round(count / 2**20, 1) for name, count in parts.items()}


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Measured and planned peaks against the length, a line a case. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    for number, (reading, preset, keep) in enumerate(CASES):
        case = {"reading": reading, "preset": preset, "keep": keep}
        found = [row for row in rows if case.items() <= row.items()]
        if not found:
            continue
        found.sort(key=lambda row: row["tokens"])
        lengths, name = [row["tokens"] for row in found], f"{reading} {preset or ''} {keep:.0%}"
        axis.plot(lengths, [row["measured peak"] for row in found], f"C{number}o-", label=name)
        axis.plot(lengths, [row["planned peak"] for row in found], f"C{number}:")
    axis.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="MiB over the loaded model")
    lengths = sorted({row["tokens"] for row in rows})
    axis.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
    axis.set_xticks([], minor=True)
    axis.set_title(f"{rows[0]['layers']} layers; dotted: planned", fontsize=9)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """A line of JSON a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384], help="prompt tokens")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="places in CASES")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--plot", type=Path, help="draw all lines of --out of so many layers here")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot is not None and args.out is None:
        parser.error("--plot needs --out")
    if args.case is not None:
        print(read(CASES[args.case], args.layers, args.lengths[0]))
        return
    # What is freed goes back to the system at once, so that it is not counted again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    for length in args.lengths:
        for number in args.cases:
            case = CASES[number]
            command = [sys.executable, "-m", "benchmarks.reading", "--lengths", str(length), "--layers"]
            command += [str(args.layers), "--case", str(number)]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            name, preset, ratio = case
            row: dict[str, object] = {"tokens": length, "layers": args.layers, "reading": name, "preset": preset}
            measured = {"keep": ratio, "measured peak": round(float(found.split()[-1]), 1)}
            row |= measured | planned(case, args.layers, length)
            print(json.dumps(row), flush=True)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if args.plot is not None:
        lines = map(json.loads, args.out.read_text(encoding="utf-8").splitlines())
        plot(args.plot, [row for row in lines if row["layers"] == args.layers])


if __name__ == "__main__":
    main()
