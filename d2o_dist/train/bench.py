"""Time and peak memory of one training step against sequence length, on a random model of a small Llama's shape.

    python -m d2o_dist.train.bench --lengths 1024 2048 4096 --output training.json --plot training.png

Every case runs in a process of its own, because a process's peak memory only ever grows. On a GPU it is PyTorch's own
count. Beside the time by the clock stands the processor time of all threads, which other processes do not lengthen.
Wants nothing downloaded; `--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from d2o_dist.comm import Collectives, ParallelMesh
from d2o_dist.config import D2OConfig
from d2o_dist.config.distill import DistillConfig
from d2o_dist.config.train_parts import OptimizerConfig
from d2o_dist.train.attention import TRAINING_ATTENTION, register
from d2o_dist.train.batches import make_batch
from d2o_dist.train.engine import TorchEngine
from d2o_dist.train.log import peak_memory_bytes
from d2o_dist.train.model import enable_activation_checkpointing
from d2o_dist.train.objective import Objective
from d2o_dist.train.rows import make_row
from d2o_dist.train.ulysses import GradientExchange

OBJECTIVES = ("lm", "d2o_lm", "d2o_distill")
CONTEXT_FRACTION = 0.75
SHAPE = dict(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=1 << 20,
)  # fmt: skip


def run_case(objective: str, length: int, checkpointing: bool, keep_ratio: float, repeats: int) -> dict[str, Any]:
    """One warm-up step of a short row, then `repeats` steps: the shortest times, and the peak of the process."""
    torch.manual_seed(0)
    register()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = TRAINING_ATTENTION
    model = LlamaForCausalLM(config).to(device).train()
    if checkpointing:
        enable_activation_checkpointing(model)
    local = ParallelMesh.local()
    losses = Objective(model, GradientExchange(Collectives(local.axis("sp"))), DistillConfig(), loss_tile=1024)
    engine = TorchEngine(losses, OptimizerConfig(), Collectives(local.axis("world")), None)

    def step(tokens: int) -> tuple[float, float]:
        ids = torch.randint(SHAPE["vocab_size"], (tokens,)).numpy()
        context = None if objective == "lm" else int(tokens * CONTEXT_FRACTION)
        batch = make_batch([make_row([(ids, ids >= 0)])], context, 0, 1, device)
        extra = {} if objective == "lm" else {"d2o": D2OConfig(keep_ratio=keep_ratio, min_layer_tokens=32)}
        started, cpu_started = time.perf_counter(), time.process_time()
        engine.micro_step(objective, **batch.arguments, **extra, counts=batch.counts)
        engine.update(1e-5)
        return time.perf_counter() - started, time.process_time() - cpu_started

    step(128)
    before = peak_memory_bytes()
    seconds, cpu_seconds = map(min, zip(*(step(length) for _ in range(repeats)), strict=True))
    return {
        "objective": objective,
        "length": length,
        "activation_checkpointing": checkpointing,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_mib": round(peak_memory_bytes() / 2**20),
        "above_short_row_mib": round((peak_memory_bytes() - before) / 2**20),
        "load_average": round(os.getloadavg()[0], 1),
    }


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: processor time (on a GPU, time) a step and memory above a short row, by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clock, word = ("seconds", "seconds") if torch.cuda.is_available() else ("cpu_seconds", "processor seconds")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for kind in sorted({(row["objective"], row["activation_checkpointing"]) for row in results}):
        rows = [row for row in results if (row["objective"], row["activation_checkpointing"]) == kind]
        label = kind[0] + (", recomputed activations" if kind[1] else "")
        for panel, name in zip(panels, (clock, "above_short_row_mib"), strict=True):
            panel.plot([row["length"] for row in rows], [row[name] for row in rows], "o-", label=label)
    for panel, title in zip(panels, (f"{word} a step", "peak memory above a row of 128 tokens, MiB"), strict=True):
        panel.set(xlabel="tokens of a row", title=title, xscale="log", yscale="log")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a row")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=2, help="steps of a case; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON of the results")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(run_case(**json.loads(args.case))))
        return
    results = []
    for objective in args.objectives:
        for checkpointing in (False, True):
            for length in args.lengths:
                case = {"objective": objective, "length": length, "checkpointing": checkpointing,
                        "keep_ratio": args.keep_ratio, "repeats": args.repeats}  # fmt: skip
                command = [sys.executable, "-m", "d2o_dist.train.bench", "--case", json.dumps(case)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(results[-1]), flush=True)
    facts = {"shape": SHAPE, "keep_ratio": args.keep_ratio, "context_fraction": CONTEXT_FRACTION,
             "torch": torch.__version__, "threads": torch.get_num_threads(),
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
