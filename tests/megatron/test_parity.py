"""One set of weights as a Hugging Face model and as a Megatron one, over tensor and context ranks: the same cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.sharded.play import Play, assert_same, play, play_on

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.multirank
STEPS = 64
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention"] * 2
PLAYS = {
    "d2o": Play("qwen3", lengths=(97, 41), steps=STEPS),
    "paper": Play("llama", "paper", lengths=(90,), steps=STEPS),
    "released": Play("qwen2", "released", lengths=(90,), steps=STEPS, chunk=37),
    "reread": Play("llama", "reread", lengths=(80, 33), steps=STEPS, d2o={"reread_chunk": 24}),
    "turns": Play("llama", "mass", lengths=(61, 44), steps=20, turn=(30, 17), ends=(1,),
                  model={"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "windows": Play("qwen3", lengths=(97, 41), steps=STEPS,
                    model={"use_sliding_window": True, "sliding_window": 24, "layer_types": WINDOWS}),
    "one KV head": Play("qwen2", lengths=(70,), steps=STEPS, model={"num_key_value_heads": 1}),
    # Tiles that the prompts do not divide.
    "tiles": Play("qwen3", "lean", lengths=(61, 97), chunk=20, turn=(33, 40), steps=8, reading="layerwise"),
    "trimmed": Play("llama", lengths=(64, 97), chunk=20, steps=8, reading="layerwise"),
}  # fmt: skip
CASES = [
    *(((1, 1), name) for name in ("d2o", "windows", "tiles")),
    *(((2, 1), name) for name in ("d2o", "reread", "one KV head", "tiles")),
    *(((1, 2), name) for name in ("paper", "released", "turns", "tiles", "trimmed")),
    ((2, 2), "d2o"),
]


def on_megatron(rank, world, one, tp, cp):
    """The request on this rank of a mesh of Megatron: what the cache decided."""
    from d2o_dist.models.megatron import MegatronModel
    from tests.megatron.gpt import gpt_of, megatron_ranks

    with megatron_ranks(tp, cp) as mesh, torch.no_grad():
        model = tiny_model(one.family, seed=one.seed, num_hidden_layers=one.layers, **one.model)
        gpt = MegatronModel(gpt_of(model), model.config.vocab_size)
        parallel = ParallelConfig(tp=tp, sp=cp)
        return play_on(Session(gpt, one.config, mesh, parallel, reading=one.reading), one)


@pytest.mark.parametrize(("mesh", "name"), CASES, ids=str)
def test_the_cache_is_that_of_the_hugging_face_model(mesh, name):
    one, (tp, cp) = PLAYS[name], mesh
    # Where budgets are known before the prompt is read, a layer at a time leaves what all at once leave.
    wanted = play(replace(one, reading="whole") if one.config.knows_budgets else one)
    for found in run_ranks(tp * cp, on_megatron, one, tp, cp, timeout_s=300):
        assert_same(found, wanted)
