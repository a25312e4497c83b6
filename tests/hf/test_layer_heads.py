"""Models whose layers differ in their heads: layers with windows have others than those that are compressed."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, LlamaConfig, MinistralConfig

from d2o_dist import D2OCache
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.models.hf.guards import layer_windows
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.shard import mark_replicas, shard_model
from d2o_dist.plan.model_size import size_of
from tests.families import build, tiny_config
from tests.hf.test_hybrids import FULL, PART, close, make, play
from tests.models import left_padded
from tests.ranks import run_ranks
from tests.tiny_types import CHANGES, class_of

# Twice the query heads, and twice the KV heads, in layers with windows.
TYPES = {"step3p7": (4, 2, (8, 2)), "gemma4_text": (4, 2, (4, 4))}


@cache
def model_of(model_type: str, attention: str = "d2o"):
    fields = {**CHANGES[model_type]}
    if model_type == "gemma4_text":  # enough for two ranks
        fields |= {"num_key_value_heads": 4, "num_global_key_value_heads": 2}
    return build(class_of(model_type), tiny_config(CONFIG_MAPPING[model_type], fields), attention)


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_of_a_padded_batch_and_chunks_give_what_a_row_alone_gives(model_type):
    model, own = model_of(model_type), model_of(model_type, "sdpa")
    shape = shape_of(model.config)
    assert (shape.num_heads, shape.num_kv_heads, *shape.other_heads) == TYPES[model_type]
    ids, mask = left_padded([31, 12], seed=4)
    alone = ids[1:, -12:]
    expected = play(own, DynamicCache(config=own.config), alone)
    for chunks in (None, [9, 12, 10]):
        close(play(model, make(model, FULL), ids, mask, chunks)[1:], expected)
        close(play(model, make(model), ids, mask, chunks)[1:], play(model, make(model), alone))


def on_ranks(rank, world):
    """Logits of a ragged prompt and of decode steps, over tensor ranks, and over sequence ranks in two ways."""
    found = []
    for model_type, how in (
        ("gemma4_text", {"tp": world, "tp_engine": "transformers"}),
        ("gemma4_text", {"sp": world}),
        ("step3p7", {"sp": world, "sp_prefill": "ulysses"}),
    ):  # fmt: skip
        parallel = ParallelConfig(**how)
        model, mesh = model_of.__wrapped__(model_type), build_mesh(tp=parallel.tp, sp=parallel.sp)
        model = shard_model(model, mesh, parallel, torch.device("cpu"))
        session = Session(model, PART, mesh, parallel)
        logits = [session.prefill(*left_padded([21, 13], seed=5))]
        found.append(torch.cat(logits + [session.decode([3 + number, 9]) for number in range(4)]))
    return found


@pytest.mark.multirank
def test_two_ranks_give_what_one_process_gives():
    expected = on_ranks(0, 1)
    for found in run_ranks(2, on_ranks, fresh=True):
        for mine, one in zip(found, expected, strict=True):
            close(mine, one, 1e-5)


def llama(**of_layer_1) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=8,
                       per_layer_config={1: of_layer_1})  # fmt: skip


@pytest.mark.parametrize("field", [{"num_key_value_heads": 4}, {"head_dim": 16}])
def test_layers_that_are_compressed_must_have_the_same_heads(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"llama has layers with full attention that differ in {name} "):
        D2OCache(config=llama(**field))


def heads_of_windows(kv_heads: int) -> MinistralConfig:
    types = ["sliding_attention", "full_attention"]
    return MinistralConfig(num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=2, hidden_size=96,
                           head_dim=8, layer_types=types, sliding_window=7,
                           per_layer_config={0: {"num_key_value_heads": kv_heads, "sliding_window": 5}})  # fmt: skip


def test_what_is_said_by_layer_is_read_by_layer():
    config = heads_of_windows(6)
    assert layer_windows(config) == [5, None]
    shape = shape_of(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.other_heads) == (12, 2, ((12, 6),))
    assert shape.kv_heads_of_rank(2) == 1
    with pytest.raises(ValueError, match=r"layers that differ in num_key_value_heads are not planned \(\[6, 2\]\)"):
        size_of(config)


def test_heads_of_windows_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"num_key_value_heads \(3, 1 copies of each\) must be divisible by tp \(2\)"):
        shape_of(heads_of_windows(3)).kv_heads_of_rank(2)
    with pytest.raises(ValueError, match=r"num_key_value_heads \(3\) must be divisible by tp \(2\)"):
        mark_replicas(heads_of_windows(3), ParallelConfig(tp=2))
    with pytest.raises(ValueError, match=r"tp \(6\) is more than the 2 KV heads of some layers, and .*copied: use sp"):
        mark_replicas(heads_of_windows(6), ParallelConfig(tp=6))
    shape_of(heads_of_windows(4)).check_sequence_ranks(2)
    with pytest.raises(ValueError, match="sp .2. cannot share .* have 3 KV heads, which is no multiple of the 2"):
        shape_of(heads_of_windows(3)).check_sequence_ranks(2)
    with pytest.raises(ValueError, match=r"step3p5 has q_proj \(colwise_gather_output\), .*: use sp instead"):
        mark_replicas(model_of("step3p7").config, ParallelConfig(tp=2))
