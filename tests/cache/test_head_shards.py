"""KV heads over ranks: each holds some heads of every layer, and all decide as one process that holds them all."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.cache.sequence import CompressedCache
from d2o_dist.comm import ParallelMesh, TrafficCounter, build_mesh
from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.core.softmax import Softmax
from tests.ranks import run_ranks
from tests.spec import spec

LAYERS, STEPS = 3, 40
PRESETS = {
    "d2o": {},
    "paper_minmax": {},
    "paper": {},
    "released": {"protected_layers": (0,)},
    "mass": {"eviction_interval": 5},
    "snapkv": {},
}
SHAPES = [(2, 4, 2), (3, 6, 3), (4, 8, 4), (2, 4, 4), (1, 4, 2)]


def run(preset: str, shape, rank: int, world: int, ranks: RequestRanks | None, ragged: bool):
    """Prefill and decode on this rank's heads; tokens are the same on all ranks. What is kept and put out."""
    _, num_heads, num_kv_heads = shape
    config = spec(preset, **{"keep_ratio": 0.4, "min_layer_tokens": 8, **PRESETS[preset]})
    cache = CompressedCache(config, [None] * LAYERS, ranks)
    generator = torch.Generator().manual_seed(num_heads)
    mask = None
    if ragged:
        mask = torch.ones(2, 61)
        mask[1, :30] = 0

    def heads(count: int, length: int) -> torch.Tensor:
        everything = torch.randn(2, count, length, 8, dtype=torch.float64, generator=generator)
        return everything.chunk(world, 1)[rank]

    outs = []
    for step in range(STEPS):
        for layer in range(LAYERS):
            length = 61 if step == 0 else 1
            q, k, v = heads(num_heads, length), heads(num_kv_heads, length), heads(num_kv_heads, length)
            now = mask if step == 0 else None
            outs.append(cache.attend(layer, q * (1 + layer), k + 0.5, v, Softmax(0.35), now)[:, :, -1])
    slots = [layer.slots for layer in cache.layers]
    return {
        "positions": [one.positions for one in slots],
        "values": [one.values for one in slots],
        "keys": [one.keys for one in slots],
        "outs": outs,
        "budgets": [layer.slot_budgets for layer in cache.layers],
        "thresholds": [layer.state.threshold for layer in cache.layers],
    }


def on_rank(rank: int, world: int, preset: str, shape, ragged: bool):
    counter = TrafficCounter()
    mesh, parallel = build_mesh(dp=1, sp=1, tp=world), ParallelConfig(tp=world)
    ranks = RequestRanks(mesh, parallel, shape[2] // world, counter=counter)
    result = run(preset, shape, rank, world, ranks, ragged)
    return result, counter.total().calls


@pytest.mark.multirank
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_that_share_the_heads_decide_as_one_process(preset, shape):
    world, ragged = shape[0], shape[1] == 6
    expected = run(preset, shape, 0, 1, None, ragged)
    results = run_ranks(world, on_rank, preset, shape, ragged)
    for name in ("positions", "values", "keys", "outs"):
        for number, whole in enumerate(expected[name]):
            joined = torch.cat([result[name][number] for result, _ in results], 1)
            if name == "positions":
                assert torch.equal(joined, whole)
            else:
                torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-10)
    for result, _ in results:
        assert result["budgets"] == expected["budgets"]
        for one, two in zip(result["thresholds"], expected["thresholds"], strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-12, atol=0, equal_nan=True)


def test_exchanges_are_one_a_model_for_the_budgets_and_one_an_eviction():
    calls = []

    class Recorder(RequestRanks):
        def gather_query_heads(self, tensor: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(tensor.shape))
            return tensor

        gather_kv_heads = gather_query_heads

    run("paper_minmax", (1, 4, 2), 0, 1, Recorder(ParallelMesh.local(), ParallelConfig(), 2), False)
    budgets, *evictions = calls
    assert budgets == (2, 4, LAYERS)
    # finalize goes layer by layer; while decoding one exchange carries the layers that are due together.
    assert evictions[:LAYERS] == [(2, 2, 3)] * LAYERS
    # All layers in one, side by side as rows.
    assert evictions[LAYERS:] == [(2 * LAYERS, 2, 3)] * ((STEPS - 1) // 16)
