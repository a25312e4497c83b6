"""Hugging Face `generate` on tensor ranks, with nothing but a mesh given to the cache."""

from __future__ import annotations

import pytest
import torch

from d2o_dist import D2OCache
from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.models.hf import FirstRankScores
from d2o_dist.models.hf.shard import shard_model
from tests.models import VOCABULARY, left_padded, tiny_model, tokens
from tests.ranks import run_ranks
from tests.sharded.last_bits import second_is_likelier, tied
from tests.spec import spec

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
    cache = D2OCache(model.config, spec(keep_ratio=0.4, min_layer_tokens=8), mesh=mesh)
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


def spoiled_on_rank(rank: int, world: int, setting: str) -> tuple[list[list[int]], dict]:
    """Two entries of the vocabulary are always as likely, and rank 1 finds the second a last bit likelier."""
    mesh = build_mesh(tp=world)
    model = shard_model(tiny_model(), mesh, ParallelConfig(tp=world, tp_engine="transformers"), torch.device("cpu"))
    model.register_forward_hook(tied)
    if rank == 1:
        model.register_forward_hook(second_is_likelier)
    cache = D2OCache(model.config, spec(keep_ratio=0.4, min_layer_tokens=8), mesh=mesh)
    ids, mask = left_padded([41, 60])
    torch.manual_seed(5)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, logits_processor=[FirstRankScores(cache)],
        **{"do_sample": False, **SETTINGS[setting], **({"top_k": 1} if setting == "sampling" else {})},
    )  # fmt: skip
    return out.tolist(), cache.ranks.counter.to_dict()["token"]


@pytest.mark.multirank
@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_by_the_scores_of_the_first_rank(setting):
    """All ranks hold its tokens; a score of each entry of the vocabulary is sent, in the float32 of `generate`."""
    (tokens, sent), (others, _) = run_ranks(2, spoiled_on_rank, setting, fresh=True)
    rows = 6 if setting == "beams" else 2
    assert tokens == others
    assert sent == {"request": {"broadcast": {"calls": 20, "bytes": 20 * rows * VOCABULARY * 4 // 2}}}


@torch.no_grad()
def by_hand(mesh=None) -> torch.Tensor:
    """The loop of docs/sharding.md: a dealt prompt, then one token at a time, position ids left to the model."""
    model, ids = tiny_model(), tokens(1, 101)
    cache = D2OCache(config=model.config, d2o=spec(keep_ratio=0.2, min_layer_tokens=32), mesh=mesh)
    model(**cache.deal(ids), past_key_values=cache)
    cache.finalize()
    steps = [model(torch.tensor([[5 + step]]), past_key_values=cache).logits for step in range(20)]
    return torch.cat(steps, 1)


def by_hand_on_rank(rank: int, world: int) -> torch.Tensor:
    return by_hand(build_mesh(sp=world))


@pytest.mark.multirank
def test_the_documented_loop_on_sequence_ranks():
    wanted = by_hand()
    for found in run_ranks(3, by_hand_on_rank):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the models' norms are float32


@torch.no_grad()
def selected(mesh=None, sp_prefill="auto") -> tuple[torch.Tensor, list[int]]:
    """Of two prompts the longer one is let go of while they are read."""
    model, (ids, mask) = tiny_model(), left_padded([97, 40])
    parallel = None if mesh is None else ParallelConfig(sp=mesh.sp, sp_prefill=sp_prefill)
    d2o = spec(keep_ratio=0.2, min_layer_tokens=32)
    cache = D2OCache(config=model.config, d2o=d2o, mesh=mesh, parallel=parallel)
    model(**cache.deal(ids[:, :80], mask[:, :80]), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    model(**cache.deal(ids[1:, 80:], mask[1:, 80:]), past_key_values=cache)
    cache.finalize()
    # The row has 40 tokens in 97 columns, and the cache knows no position ids but those that it is given.
    steps = [
        model(torch.tensor([[5 + step]]), position_ids=torch.tensor([[40 + step]]), past_key_values=cache).logits
        for step in range(20)
    ]
    return torch.cat(steps, 1), cache.layers[0].kv_len


def selected_on_rank(rank: int, world: int, sp_prefill: str) -> tuple[torch.Tensor, list[int]]:
    return selected(build_mesh(sp=world), sp_prefill)


@pytest.mark.multirank
@pytest.mark.parametrize("sp_prefill", ["allgather", "ring", "ulysses"])
def test_a_row_is_let_go_of_while_prompts_are_read(sp_prefill):
    wanted, held = selected()
    for found, found_held in run_ranks(2, selected_on_rank, sp_prefill):
        assert found_held == held
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
