"""What prompts need in memory, by model, length and GPU, calculated: the tables of docs/memory.md.

    python -m benchmarks.sizes
"""

from __future__ import annotations

from benchmarks.timing import markdown_table
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.plan.gpus import find_gpu
from d2o_dist.plan.memory import prompt_memory
from d2o_dist.plan.meshes import all_meshes, share_of
from d2o_dist.plan.model_size import known_config, size_of
from d2o_dist.plan.planner import Workload, most_rows
from d2o_dist.policy.config import D2OConfig

MODELS = ("llama-3.2-1b", "qwen2.5-7b", "llama-3-8b", "qwen3-32b", "llama-3-70b")
TOKENS = {"32K": 32768, "128K": 131072, "1M": 1_000_000}
GPUS = {"24 GB": "rtx-4090", "80 GB": "h100-80gb", "141 GB": "h200-141gb"}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 16384


def fewest(work: Workload) -> str:
    """How many GPUs hold a prompt, and as which sp x tp with the least tp; one fits where any mesh does."""
    for count in COUNTS:
        for mesh in all_meshes(ParallelConfig(dp=1), count):
            try:
                share = share_of(work.model, work.d2o, mesh)
            except ValueError:
                continue
            if most_rows(work, share):
                return str(count) if count == 1 else f"{count} ({mesh.sp} x {mesh.tp})"
    return f"more than {COUNTS[-1]}"


def main() -> None:
    """A line for each model and length: parts on one GPU in GiB, then the fewest GPUs of each kind."""
    d2o, alone, rows = D2OConfig(keep_ratio=0.2), ParallelConfig(), []
    for name in MODELS:
        model = size_of(known_config(name))
        for said, tokens in TOKENS.items():
            share = share_of(model, d2o, alone)
            whole, by_layer = (
                prompt_memory(model, d2o, share, tokens, chunk=CHUNK, reading=reading)
                for reading in ("whole", "layerwise")
            )
            parts = {
                "weights": whole.weights,
                "whole cache": whole.prompt,
                "kept": whole.kept,
                "one layer": whole.one_layer,
                "statistics": whole.statistics,
                "forward": whole.forward,
                "peak": whole.peak,
                "peak by layer*": by_layer.peak,
            }
            row: dict[str, object] = {"model": name, "tokens": said}
            row |= {part: f"{size / 2**30:.1f}" for part, size in parts.items()}
            for label, kind in GPUS.items():
                row[label] = fewest(Workload(model, d2o, find_gpu(kind), tokens, chunk=CHUNK))
            rows.append(row)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
