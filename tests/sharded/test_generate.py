"""Hugging Face `generate` on tensor ranks, with nothing but a mesh given to the cache."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache, D2OConfig
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.integrations.tensor_parallel import shard_model
from tests.models import left_padded, tiny_model
from tests.ranks import run_ranks

SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
}


def generate(setting: str, mesh=None) -> tuple[list[list[int]], float]:
    """Tokens of a ragged batch, and the achieved ratio."""
    model = tiny_model()
    if mesh is not None:
        model = shard_model(model, mesh, ParallelConfig(tp=mesh.tp, tp_engine="transformers"), torch.device("cpu"))
    cache = D2OCache(model.config, D2OConfig(keep_ratio=0.4, min_layer_tokens=8), mesh=mesh)
    ids, mask = left_padded([41, 60])
    torch.manual_seed(5)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **{"do_sample": False, **SETTINGS[setting]}
    )
    report = cache.report()
    assert report.held_bytes == sum(layer.num_bytes for layer in report.layers)
    return out.tolist(), report.held_bytes


def on_rank(rank: int, world: int, setting: str) -> tuple[list[list[int]], float]:
    return generate(setting, build_mesh(tp=world))


@pytest.mark.multirank
@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_on_tensor_ranks(setting):
    wanted = generate(setting)
    for found in run_ranks(2, on_rank, setting, fresh=True):
        assert found == wanted
