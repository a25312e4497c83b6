"""The planner's bytes beside those of real caches and models, on one process and on ranks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.planned import measured_peaks, small_model
from benchmarks.presets import preset_of_many
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.plan.memory import prompt_memory
from d2o_dist.plan.meshes import share_of
from d2o_dist.plan.model_size import size_of
from d2o_dist.policy import D2OConfig
from tests.plan.runs import Case, measure_all

TP = {"tp_engine": "transformers"}
FOUR = {"num_key_value_heads": 4}
ALONE = [
    Case("d2o"),
    Case("lean", batch=3),
    Case("lean", chunk=128, dtype=torch.float64),
    Case("paper"),
    Case("released"),
    Case("reread", d2o={"score": {"chunk": 128}}),
    Case("full"),
    Case("streaming", dtype=torch.bfloat16),
    Case("pyramidkv"),
    Case("lean", d2o={"budget": {"min_layer_tokens": 900}}),
    Case("lean", d2o={"keep_ratio": None, "keep_tokens": 100}),
    Case("lean", "gemma3"),
    Case("d2o", "mistral_sliding", length=400),
    Case("lean", "deepseek"),
    Case("lean", "gemma3n", length=400),
    Case("lean", "llama4", length=400, model={"moe_layers": [1], "num_local_experts": 4}),
    Case("lean", d2o={"budget": {"protected_layers": (0, -1), "min_layer_ratio": 0.01}, "keep_ratio": 0.7}),
]
RANKS = [
    Case("d2o", parallel=ParallelConfig(sp=2)),
    Case("d2o", length=601, parallel=ParallelConfig(sp=2, sp_prefill="allgather")),
    Case("lean", length=601, chunk=200, parallel=ParallelConfig(sp=2, sp_prefill="ring")),
    Case("lean", parallel=ParallelConfig(sp=2, cache_layout="sequence")),
    Case("full", parallel=ParallelConfig(sp=2, sp_prefill="allgather")),
    Case("lean", "gemma3", parallel=ParallelConfig(sp=2, sp_prefill="allgather")),
    Case("lean", "gemma3", parallel=ParallelConfig(sp=2, cache_layout="sequence")),
    Case("d2o", model={**FOUR, "num_attention_heads": 8}, parallel=ParallelConfig(sp=3)),
    Case("d2o", "qwen2", parallel=ParallelConfig(tp=2, **TP)),
    Case("lean", "qwen2", model={"num_key_value_heads": 1}, parallel=ParallelConfig(tp=2, **TP)),
    Case("lean", "deepseek", parallel=ParallelConfig(tp=2, **TP)),
    pytest.param(Case("lean", "qwen2", parallel=ParallelConfig(tp=2)), marks=pytest.mark.slow),
]


def close(found: int, wanted: int, tolerance: float) -> None:
    assert abs(found / wanted - 1) <= tolerance, (found, wanted, found / wanted)


def check(case: Case) -> None:
    ranks = measure_all(case)
    shape = case.shape
    planned = prompt_memory(shape, case.config, case.share(shape), case.length, case.batch, dtype=case.dtype)
    # What is measured on the prompt decides where the slots are, not how many; heads may look up most on one rank.
    close(planned.prompt, max(one["prompt"] for one in ranks), 0.01)
    close(planned.kept, max(one["kept"] for one in ranks), 0.1 if case.config.budget.statistics else 0.01)
    close(planned.weights, max(one["weights"] for one in ranks), 1e-9)


@pytest.mark.parametrize("case", ALONE, ids=lambda case: f"{case.preset}-{case.family}")
def test_one_process(case):
    check(case)


@pytest.mark.multirank
@pytest.mark.parametrize("case", RANKS, ids=lambda case: f"{case.preset}-{case.family}-{case.parallel.sp_prefill}")
def test_ranks(case):
    check(case)


@pytest.mark.parametrize(("preset", "chunk"), [("lean", None), ("lean", 256), ("reread", None), ("full", 256)])
def test_peaks_of_a_run(preset, chunk):
    """Everything that is allocated while a prompt is read and compressed, not the cache alone."""
    model, d2o = small_model(), D2OConfig.preset(preset)
    read, compressed = measured_peaks(model, d2o, 1536, chunk)
    shape = size_of(model.config)
    share = share_of(shape, d2o, ParallelConfig())
    planned = prompt_memory(shape, d2o, share, 1536, dtype=torch.float32, chunk=chunk)
    close(planned.reading_peak, read, 0.1)
    close(planned.compressing_peak, compressed, 0.1)


@pytest.mark.parametrize("preset", ["lean", "d2o"])
def test_the_peak_of_a_run_that_is_compressed_layer_by_layer(preset):
    """At a length at which the cache is most of it; the whole reading takes more."""
    model, d2o = small_model(), preset_of_many(preset)
    found = max(measured_peaks(model, d2o, 4096, 256, reading="layerwise"))
    shape = size_of(model.config)
    share = share_of(shape, d2o, ParallelConfig())
    planned, whole = (
        prompt_memory(shape, d2o, share, 4096, dtype=torch.float32, chunk=256, reading=reading)
        for reading in ("layerwise", "whole")
    )
    close(max(planned.reading_peak, planned.compressing_peak), found, 0.1)
    assert found < whole.reading_peak
