"""What ranks send while decoding, how level their shards are, and what the cheap merge changes."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch

from d2o_dist.comm import Collectives, TrafficCounter, build_mesh
from d2o_dist.comm.request import RequestRanks
from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.engine.session import Session
from d2o_dist.evict.agree import DisagreementError
from tests.models import tiny_model, tokens
from tests.ranks import RankError, run_ranks
from tests.sharded.play import Play, assert_same, on_rank, play

pytestmark = pytest.mark.multirank
SEQUENCE = {"sp_prefill": "allgather"}
LAYERS, KV_HEADS = Play.layers, 2


def decode_traffic(
    length: int, steps: int, preset: str = "d2o", d2o: dict | None = None, **parallel
) -> dict[str, dict[str, int]]:
    """Calls and bytes of the phases `decode` and `evict` on two sequence ranks, added up over kinds."""
    one = Play(preset=preset, lengths=(length,), steps=steps, d2o=d2o or {})
    _, traffic = run_ranks(2, on_rank, one, ParallelConfig(sp=2, **{**SEQUENCE, **parallel}))[0]
    return {
        phase: {
            name: sum(kind[name] for kinds in traffic.get(phase, {}).values() for kind in kinds.values())
            for name in ("calls", "bytes")
        }
        for phase in ("decode", "evict")
    }


@pytest.mark.parametrize(("preset", "d2o"), [("paper_minmax", {}), ("d2o", {"tail_fraction": 0.5})], ids=str)
def test_collectives_of_a_token_do_not_depend_on_the_context(preset, d2o):
    """One blocking collective a layer; evictions of the whole model in 3, once in 16 tokens: below 0.3 a token.

    The default from where tails reach their bound: here at 32 slots a layer.
    """
    steps = 32
    short, long = (decode_traffic(length, steps, preset, d2o) for length in (200, 800))
    assert short == long
    assert short["decode"]["calls"] == steps * LAYERS
    assert short["evict"]["calls"] == 3 * steps // 16
    assert short["evict"]["calls"] / steps < 0.3


def test_collectives_of_other_merges():
    assert decode_traffic(100, 32, merge_scope="local")["evict"]["calls"] == 2 * 32 // 16
    assert decode_traffic(100, 32, "h2o")["evict"]["calls"] == 32 // 16


def test_only_a_tail_without_bound_makes_evictions_send_more_at_a_longer_context():
    """Each rank offers as many slots as the tail has, 24 bytes each: a tenth of the budget more."""
    steps = 32
    short, long = (decode_traffic(length, steps, d2o={"max_decode_tail": None}) for length in (100, 800))
    assert short["decode"] == long["decode"] and short["evict"]["calls"] == long["evict"]["calls"] == 3 * steps // 16
    longer_tail = Play().config.merge.targets.fraction * Play().config.keep_ratio * 700
    added = long["evict"]["bytes"] - short["evict"]["bytes"]
    assert 0 < added <= 24 * longer_tail * KV_HEADS * LAYERS * steps // 16


def test_tensor_ranks_add_one_collective_an_eviction():
    one = Play(lengths=(100,), steps=32, model={"num_attention_heads": 4, "num_key_value_heads": 4})
    parallel = ParallelConfig(tp=2, sp=2, tp_engine="transformers", **SEQUENCE)
    for _, traffic in run_ranks(4, on_rank, one, parallel, fresh=True):
        assert traffic["decode"]["sp"]["all_gather"]["calls"] == 32 * LAYERS
        assert "tp" not in traffic["decode"]
        calls = sum(kind["calls"] for kinds in traffic["evict"].values() for kind in kinds.values())
        assert calls == 4 * 32 // 16


@pytest.mark.parametrize("sp", [1, 2])
def test_copies_of_a_head_add_one_more(sp):
    """What one of them chose; what it found to be near goes with the reports."""
    one = Play(lengths=(100,), steps=32, model={"num_key_value_heads": 1})
    parallel = ParallelConfig(tp=2, sp=sp, tp_engine="transformers", **(SEQUENCE if sp > 1 else {}))
    for _, traffic in run_ranks(2 * sp, on_rank, one, parallel, fresh=True):
        calls = {axis: {kind: n["calls"] for kind, n in kinds.items()} for axis, kinds in traffic["evict"].items()}
        assert calls.pop("tp") == {"all_to_all": 32 // 16, "all_gather": 32 // 16}
        assert sum(sum(kinds.values()) for kinds in calls.values()) == (3 * 32 // 16 if sp > 1 else 0)
        assert traffic["decode"]["tp"] == {"all_to_all": traffic["decode"]["tp"]["all_to_all"]}
        assert traffic["decode"]["tp"]["all_to_all"]["calls"] == 32 * LAYERS
        assert traffic["finalize"]["request"]["broadcast"]["calls"] == 1


@pytest.mark.parametrize("layout", [SEQUENCE, {"sp_prefill": "ulysses", "cache_layout": "sequence"}], ids=str)
def test_shards_are_level(layout):
    """To one slot when nothing was evicted since the last 16 tokens came; never further apart than what is evicted."""
    model = {"num_attention_heads": 8, "num_key_value_heads": 4}
    for steps, apart in ((0, 1), (15, 1), (31, 1), (40, 16)):
        one = Play(lengths=(120,), steps=steps, model=model)
        for found, _ in run_ranks(3, on_rank, one, ParallelConfig(sp=3, **layout)):
            for held, kv_len in zip(found["held"], found["kv_len"], strict=True):
                assert torch.equal(held.sum(-1), torch.full_like(held[..., 0], kv_len[0]))
                assert int((held.amax(-1) - held.amin(-1)).max()) <= apart


def test_merging_within_a_shard_keeps_the_same_tokens_of_the_prompt():
    """`merge_scope: local` selects as `global` does, and sends less; what is merged into what differs."""
    one = Play(preset="paper_minmax", lengths=(120,), steps=0)
    wanted = play(one)
    for found, traffic in run_ranks(3, on_rank, one, ParallelConfig(sp=3, merge_scope="local", **SEQUENCE)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found["first"], wanted["first"], strict=True))
        assert found["budgets"] == wanted["budgets"]
        local = sum(kind["bytes"] for kind in traffic["finalize"]["sp"].values())
    _, traffic = run_ranks(3, on_rank, one, ParallelConfig(sp=3, **SEQUENCE))[0]
    # What becomes of each of 120 tokens in each layer and head: a byte.
    assert traffic["finalize"]["sp"]["broadcast"]["calls"] == LAYERS
    assert traffic["finalize"]["sp"]["broadcast"]["bytes"] == LAYERS * (KV_HEADS * 120 * 2 // 3)
    assert local < sum(kind["bytes"] for kind in traffic["finalize"]["sp"].values()) / 2
    _, without = run_ranks(3, on_rank, Play(preset="h2o", lengths=(120,), steps=0), ParallelConfig(sp=3, **SEQUENCE))[0]
    assert "all_reduce" not in without["finalize"]["sp"]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_rank_that_keeps_nothing(scope):
    """Sinks and newest tokens only: all of them lie on the rank of the first and the last chunk."""
    d2o = {"keep_ratio": 0.1, "selection": "recent", "merge_targets": "kept", "allocation": "uniform"}
    one = Play(preset="mass", lengths=(120,), d2o=d2o, steps=20)
    wanted = play(one)
    for found, _ in run_ranks(3, on_rank, one, ParallelConfig(sp=3, merge_scope=scope, **SEQUENCE)):
        if scope == "global":
            assert_same(found, wanted)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found["first"], wanted["first"], strict=True))


def test_bfloat16_differs_by_rounding_only():
    """The same budgets; logits within what bfloat16 itself is off by on one process against float32."""
    one = Play(lengths=(120,), steps=0, dtype=torch.bfloat16)
    exact, rounded = play(Play(lengths=(120,), steps=0, dtype=torch.float32)), play(one)
    own = (rounded["logits"].float() - exact["logits"]).abs().mean()
    for found, _ in run_ranks(2, on_rank, one, ParallelConfig(sp=2, **SEQUENCE)):
        between = (found["logits"].float() - rounded["logits"].float()).abs().mean()
        assert between <= own
        for mine, theirs in zip(found["budgets"], rounded["budgets"], strict=True):
            assert abs(mine[0] - theirs[0]) <= 1


def spoil(rank: int, world: int, layout: dict, what: str):
    """Two ranks of which one comes to hold something else."""
    parallel = ParallelConfig(sp=world, check_replicas=True, **layout)
    session = Session(tiny_model(), Play().config, build_mesh(sp=world), parallel)
    ids = tokens(1, 80)
    with torch.no_grad():
        session.prefill(ids, torch.ones_like(ids))
        layer = session.cache.compressed.layers[2]
        if rank == 1 and what == "threshold":
            layer.state.threshold.add_(1e-9)
        if rank == 1 and what == "positions":
            layer.blocks[0].layout.shares.held[..., 0] += 1
        for _ in range(24):  # until the layer is evicted, which lacks some slots
            session.decode([7])


@pytest.mark.parametrize(
    ("layout", "what"), [({}, "threshold"), (SEQUENCE, "threshold"), (SEQUENCE, "positions")], ids=str
)
def test_ranks_that_differ_are_named(layout, what):
    with pytest.raises(RankError, match=f"layer 2: rank tp 0, sp 1 differs from the first in {what}") as caught:
        run_ranks(2, spoil, layout, what)
    assert isinstance(caught.value.error, DisagreementError)


def maxima(rank: int, world: int, dtype: torch.dtype):
    ranks = RequestRanks(build_mesh(sp=world), ParallelConfig(sp=world, sp_prefill="ring"), 1)
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-3, 3, (world, 500), generator=generator).to(dtype) / 4
    values[:, :5] = -torch.inf
    values[0, 5], values[1, 5] = 0.0, -0.0
    positions = torch.randint(0, 9, (world, 500), generator=generator)
    found = ranks.max_with_position(values[rank], positions[rank])
    best = values.amax(0)
    return found, (best, positions.masked_fill(values != best, 99).amin(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_the_largest_value_and_of_equal_ones_the_lowest_position(world, dtype):
    for found, wanted in run_ranks(world, maxima, dtype):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@torch.no_grad()
def refusals(rank: int, world: int) -> list[str]:
    session = Session(tiny_model(), Play().config, build_mesh(sp=world), ParallelConfig(sp=world, **SEQUENCE))
    cache, said = session.cache, []
    ids = tokens(2, 20)

    def attempt(call):
        try:
            call()
        except ValueError as error:
            said.append(str(error))

    attempt(lambda: session.model.forward(ids, None, cache))
    attempt(lambda: cache.deal(ids, torch.zeros_like(ids)))
    attempt(lambda: cache.deal(ids, torch.ones(2, 3)))
    cache.deal(ids)
    attempt(lambda: session.model.forward(ids, None, cache))
    attempt(lambda: Session(session.model, Play().config, build_mesh(sp=world), ParallelConfig(sp=3)))
    attempt(lambda: RequestRanks(build_mesh(sp=world), ParallelConfig(sp=world, sp_prefill="ulysses"), 1))
    Collectives(build_mesh(sp=world).axis("sp")).barrier()
    return said


def test_refusals():
    for said in run_ranks(2, refusals):
        wanted = [
            "a chunk of 20 columns was not dealt: with sp (2)",
            "a chunk must have a token, but its rows have [0, 0]",
            "attention_mask (2, 3) must have input_ids' shape (2, 20)",
            "2 rows of 10 columns were dealt to this rank, but the forward has 2 of 20",
            "sp of the mesh (2) must be 3",
            "sp_prefill (ulysses) gives every rank a KV head, but a tensor rank has 1 and sp is 2",
        ]
        assert len(said) == len(wanted)
        for one, start in zip(said, wanted, strict=True):
            assert one.startswith(start)


def test_a_wrong_account_is_noticed():
    """The comparison itself can fail."""
    one, two = play(Play(steps=3)), play(Play(steps=3, d2o={"keep_ratio": 0.41}))
    with pytest.raises(AssertionError):
        assert_same(one, two)


def reuse(rank: int, world: int, layout: dict) -> bool:
    """One prompt, continued twice from a copy of its cache."""
    session = Session(tiny_model(), Play().config, build_mesh(sp=world), ParallelConfig(sp=world, **layout))
    ids = tokens(2, 60)
    with torch.no_grad():
        session.prefill(ids, torch.ones_like(ids))
        prompt = copy.deepcopy(session.cache)
        first = [session.decode([step + 3, step + 4]) for step in range(20)]
        session.cache = prompt
        second = [session.decode([step + 3, step + 4]) for step in range(20)]
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", [{}, SEQUENCE], ids=str)
def test_a_prompt_is_reused_by_a_copy_of_its_cache(layout):
    assert run_ranks(2, reuse, layout) == [True, True]


def long_prompt(rank: int, world: int, sp_prefill: str) -> set[str]:
    """Kinds of collectives of a prompt of which one gathered head is over the limit."""
    counter = TrafficCounter()
    parallel = ParallelConfig(sp=world, sp_prefill=sp_prefill)
    model = tiny_model(num_key_value_heads=1)
    with patch("d2o_dist.layout.sequence.RING_FROM_BYTES", 1000), torch.no_grad():
        session = Session(model, Play().config, build_mesh(sp=world), parallel, counter)
        ids = tokens(1, 60)
        session.prefill(ids, torch.ones_like(ids))
    return set(counter.to_dict()["prefill"]["sp"])


def test_auto_takes_a_ring_for_prompts_too_long_to_gather():
    assert run_ranks(2, long_prompt, "auto") == [{"ring_shift", "all_reduce"}] * 2
    assert run_ranks(2, long_prompt, "allgather") == [{"all_gather", "all_to_all", "all_reduce"}] * 2
