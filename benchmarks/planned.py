"""The planner's memory beside the allocations of real runs: what tensors take at once, without the weights.

    python -m benchmarks.planned --length 8192

Allocations are those of PyTorch's profiler, so they are exact and the same every time. The model is small and random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.presets import preset_of_many
from benchmarks.timing import markdown_table
from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.cache import CACHE_READINGS
from d2o_dist.plan.memory import prompt_memory
from d2o_dist.plan.meshes import share_of
from d2o_dist.plan.model_size import size_of
from d2o_dist.policy.config import D2OConfig

WIDE = dict(
    hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    num_hidden_layers=6, vocab_size=256, max_position_embeddings=1 << 20,
)  # fmt: skip


def small_model() -> LlamaForCausalLM:
    """A random Llama in float32, whose layers' tensors are large beside what libraries allocate for themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(**WIDE)
    config._attn_implementation = "d2o"
    return LlamaForCausalLM(config).eval()


def measured_peaks(
    model: Any,
    d2o: D2OConfig,
    tokens: int,
    chunk: int | None = None,
    mesh: ParallelMesh | None = None,
    parallel: ParallelConfig | None = None,
    *,
    reading: str = "whole",
) -> tuple[int, int]:
    """Most bytes at once while a prompt is read, and from there to its end; the model's own are not counted.

    Where a prompt is read layer by layer, all but the move into the arena is reading.
    """
    ids = torch.randint(2, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    finalize, compressing = CompressedCache.finalize, "compressing"

    def marked(cache: CompressedCache) -> None:
        with torch.profiler.record_function(compressing):
            finalize(cache)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        session = Session(model, d2o, mesh, parallel, reading=reading)
        with patch.object(CompressedCache, "finalize", marked):
            session.prefill(ids, torch.ones_like(ids), chunk)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    border = next(event["ts"] for event in events if event.get("name") == compressing)
    held, peaks = 0, [0, 0]
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        after = event["ts"] >= border
        peaks[after] = max(peaks[after], held)
    return peaks[0], peaks[1]


def main(argv: Sequence[str] | None = None) -> None:
    """A table of presets, with and without chunks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="prompt tokens")
    parser.add_argument("--presets", nargs="+", default=["lean", "d2o", "reread", "paper", "streaming", "full"])
    args = parser.parse_args(argv)
    model, rows = small_model(), []
    shape = size_of(model.config)
    for preset, reading in itertools.product(args.presets, CACHE_READINGS):
        d2o = preset_of_many(preset)
        if reading == "layerwise" and d2o.needs_reread:
            continue
        for chunk in (None, args.length // 8):
            found = measured_peaks(model, d2o, args.length, chunk, reading=reading)
            share = share_of(shape, d2o, ParallelConfig())
            plan = prompt_memory(shape, d2o, share, args.length, dtype=torch.float32, chunk=chunk, reading=reading)
            row: dict[str, object] = {"preset": preset, "reading": reading, "chunk": chunk or "-"}
            for name, mine, real in zip(
                ("reading", "compressing"), (plan.reading_peak, plan.compressing_peak), found, strict=True
            ):
                row |= {f"{name}, MB": f"{real / 1e6:.1f}", "planned" + " " * (name != "reading"): f"{mine / 1e6:.1f}"}
                row |= {"ratio" + " " * (name != "reading"): f"{mine / real:.2f}"}
            rows.append(row)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
