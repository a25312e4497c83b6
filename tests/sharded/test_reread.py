"""Prompts that are read twice, budgets of heads and budgets by rank, over ranks: what one process decides."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.comm import build_mesh
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.evict.agree import DisagreementError
from d2o_dist.models.hf.shard import shard_model
from tests.models import tiny_model, tokens
from tests.ranks import RankError, run_ranks
from tests.sharded.play import Play, on_rank
from tests.sharded.test_parity import LAYERS, LAYOUTS, check

pytestmark = pytest.mark.multirank

DROP = {"merge": "none", "merge_targets": "kept", "gate": "threshold"}
# Every way to rank, to share, and to merge that only these configurations have.
RULES = {
    "reread": {},
    "chunks": {"reread_chunk": 25, "eviction_interval": 5},
    "drop": DROP,
    "by layers": {"budget_per": "layer", "reread_chunk": 40},
    "dynamic layers": {"budget_per": "layer", "allocation": "dynamic", **DROP},
    "dynamic heads": {"selection": "cumulative", "allocation": "dynamic", "temperature": 0.3, "merge": "keys_values",
                      "merge_targets": "kept", "gate": "threshold"},
    "uniform heads": {"selection": "window", "allocation": "uniform", "protected_layers": (1,), "keep_ratio": 0.5},
    "ranked by rate": {"selection": "window", "eviction_interval": 4},
    "ranked by sums": {"selection": "mixed", "budget_per": "layer", "score_queries": "strided"},
    "tokens": {"keep_ratio": None, "keep_tokens": 50, "eviction_interval": 3},
    "full": {"keep_ratio": 1.0, "eviction_interval": None},
}  # fmt: skip
# Of "tokens" budgets are beyond a prompt: heads are then due at different times.
SIZES = {rule: {"lengths": (70, 33), "steps": 10} for rule in RULES} | {"tokens": {"lengths": (61, 12), "steps": 20}}


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 16 * num_heads}


@pytest.mark.parametrize(
    ("tp", "kinds", "engine"),
    [(2, (4, 2), "deepspeed"), (3, (6, 3), "transformers"), (4, (8, 4), "transformers"), (2, (4, 4), "transformers"),
     (3, (6, 1), "transformers"), (4, (8, 2), "deepspeed")],
    ids=str,
)  # fmt: skip
def test_tensor_ranks(tp, kinds, engine):
    """One KV head a rank, two, or copies of one: ragged prompts in chunks, a second turn."""
    one = Play(preset="reread", lengths=(61, 40), steps=17, chunk=23, turn=(9, 14), model=heads(*kinds),
               d2o={"reread_chunk": 27, "eviction_interval": 5})  # fmt: skip
    check(one, ParallelConfig(tp=tp, tp_engine=engine, check_replicas=True))


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_tensor_ranks(rule):
    """Copies of a KV head; a rank with heads of its own is what a sequence rank is."""
    one = Play(preset="reread", turn=(12, 5), model=heads(4, 1), d2o=RULES[rule], ends=(1,), **SIZES[rule])
    check(one, ParallelConfig(tp=2, tp_engine="transformers", check_replicas=True))


@pytest.mark.parametrize(
    ("tp", "sp", "kinds"), [(1, 2, (4, 2)), (1, 2, (6, 3)), (1, 3, (6, 3)), (1, 4, (8, 4)), (2, 2, (8, 4))], ids=str
)
def test_sequence_ranks(tp, sp, kinds):
    """Chunks of both readings that the ranks do not divide; 3 KV heads on 2 ranks are 2 and 1."""
    one = Play(preset="reread", lengths=(61, 40), steps=17, chunk=23, turn=(9, 14), model=heads(*kinds),
               d2o={"reread_chunk": 27, "eviction_interval": 5})  # fmt: skip
    check(one, ParallelConfig(tp=tp, sp=sp, tp_engine="transformers", check_replicas=True))


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_sequence_ranks(rule):
    one = Play(preset="reread", turn=(12, 5), model=heads(4, 2), d2o=RULES[rule], ends=(1,), **SIZES[rule])
    check(one, ParallelConfig(sp=2, check_replicas=True))


@pytest.mark.parametrize("selection", ["window", "mixed"])
@pytest.mark.parametrize("layout", ["moved", "allgather", "ring"])
def test_shares_by_rank_where_slots_of_a_head_are_spread(layout, selection):
    """Ranks that are maxima over neighbours on other ranks, and sums; layers that share by them."""
    one = Play(lengths=(97, 61), turn=(9, 20), steps=10, d2o={"allocation": "ranked", "selection": selection})
    check(one, ParallelConfig(sp=2, check_replicas=True, **LAYOUTS[layout]))


@pytest.mark.parametrize("lengths", [(1,), (2,), (5, 1)], ids=str)
def test_prompts_of_a_few_tokens_on_sequence_ranks(lengths):
    """Ranks without any token of a reading."""
    one = Play(preset="reread", lengths=lengths, model=heads(6, 3), d2o={"keep_ratio": None, "keep_tokens": 12})
    check(one, ParallelConfig(sp=3, check_replicas=True))


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2", "phi3", "gemma3"])
def test_families_on_sequence_ranks(family):
    layers = LAYERS.get(family, Play.layers)
    one = Play(family=family, preset="reread", lengths=(60, 41), turn=(20, 31), steps=10, layers=layers)
    check(one, ParallelConfig(sp=2))


@pytest.mark.parametrize("lengths", [(1,), (2,), (5, 1)], ids=str)
def test_prompts_of_a_few_tokens_on_tensor_ranks(lengths):
    """Copies that get no query of a second reading at all."""
    one = Play(preset="reread", lengths=lengths, model=heads(6, 1), d2o={"keep_ratio": None, "keep_tokens": 12})
    check(one, ParallelConfig(tp=3, tp_engine="transformers", check_replicas=True))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_families_on_tensor_ranks(family):
    layers = LAYERS.get(family, Play.layers)
    one = Play(family=family, preset="reread", lengths=(60, 41), turn=(20, 31), steps=10, layers=layers)
    check(one, ParallelConfig(tp=2, tp_engine="transformers"))


def calls(parallel: ParallelConfig, kinds: tuple[int, int], length: int, **fields) -> dict[str, dict]:
    """By phase, axis and kind what the cache sent on rank 0: calls and bytes."""
    d2o = {"reread_chunk": 50, "eviction_interval": 4}
    one = Play(preset="reread", lengths=(length,), steps=12, model=heads(*kinds), d2o=d2o, **fields)
    sent = run_ranks(parallel.tp * parallel.sp, on_rank, one, parallel, fresh=parallel.tp > 1)[0][1]
    sent.pop("other")  # what the account itself gathers
    return sent


def test_what_is_sent_does_not_grow_with_the_prompt():
    """Tensor ranks with heads of their own: budgets cost some small sums, and nothing else is sent."""
    parallel = ParallelConfig(tp=2, tp_engine="transformers")
    short, long = (calls(parallel, (4, 2), length, dtype=torch.float32) for length in (100, 200))
    assert short == long
    assert short.keys() == {"finalize"} and short["finalize"].keys() == {"tp", "request"}
    # Slots and a weight of each head, from the rank that divides the total.
    assert short["finalize"]["request"] == {"broadcast": {"calls": 1, "bytes": 2 * Play.layers * 2 * 8 // 2}}
    sent = short["finalize"]["tp"]
    assert {kind: one["calls"] for kind, one in sent.items()} == {"all_reduce": 4, "all_gather": 1}
    assert sent["all_reduce"]["bytes"] == 4 * 256 * 8 and sent["all_gather"]["bytes"] == 2 * Play.layers * 8


def test_what_copies_of_a_head_exchange():
    """Queries of the second reading, maxima and rates at its end, probabilities while decoding; and what one of them
    chose, and found to be near, in every eviction."""
    sent = calls(ParallelConfig(tp=2, tp_engine="transformers"), (4, 1), 120)
    forwards = 3  # of the second reading
    assert sent["prefill"]["tp"].keys() == {"all_to_all"}
    assert sent["prefill"]["tp"]["all_to_all"]["calls"] == 2 * Play.layers * forwards
    assert {kind: one["calls"] for kind, one in sent["finalize"]["tp"].items()} == {
        "all_reduce": 8, "all_gather": 1, "all_to_all": (2 + 2) * Play.layers
    }  # fmt: skip
    assert sent["decode"]["tp"]["all_to_all"]["calls"] == 12 * Play.layers
    assert sent["evict"].keys() == {"tp"} and sent["evict"]["tp"].keys() == {"all_to_all"}
    assert sent["evict"]["tp"]["all_to_all"]["calls"] == 2 * 12 // 4


def test_what_sequence_ranks_exchange():
    """Heads for tokens and back in each forward of both readings; a decode step joins the heads; evictions nothing."""
    sent = calls(ParallelConfig(sp=2), (4, 2), 120)
    forwards = 1 + 3
    assert sent["prefill"]["sp"]["all_to_all"]["calls"] == 2 * Play.layers * forwards
    assert {kind: one["calls"] for kind, one in sent["finalize"]["sp"].items()} == {"all_reduce": 8, "all_gather": 1}
    assert sent["decode"]["sp"]["all_gather"]["calls"] == 12 * Play.layers and "evict" not in sent


@torch.no_grad()
def spoil(rank: int, world: int, parallel: ParallelConfig, what: str) -> None:
    """Two ranks of which one comes to hold something else."""
    mesh = build_mesh(dp=1, sp=parallel.sp, tp=parallel.tp)
    model = shard_model(tiny_model(**heads(4, 2 // parallel.tp)), mesh, parallel, torch.device("cpu"))
    session = Session(model, Play(preset="reread").config, mesh, parallel)
    ids = tokens(1, 80)
    session.prefill(ids, torch.ones_like(ids))
    layer = session.cache.compressed.layers[2]
    if rank == 1 and what == "lengths":
        layer.elsewhere[0].kv_len[0] += 1
    if rank == 1 and what == "slots":
        layer.blocks[0].store.buffers.positions[0, 0, 5] += 1
    for _ in range(16):
        session.decode([7])


@pytest.mark.parametrize(
    ("axis", "what", "said"),
    [("sp", "lengths", "lengths or budgets of heads"), ("tp", "slots", "positions of a copied KV head")],
)
def test_ranks_that_differ_are_named(axis, what, said):
    parallel = ParallelConfig(**{axis: 2}, tp_engine="transformers", check_replicas=True)
    with pytest.raises(RankError, match=f"layer 2: rank tp ., sp . differs from the first in {said}") as caught:
        run_ranks(2, spoil, parallel, what, fresh=axis == "tp")
    assert isinstance(caught.value.error, DisagreementError)
