"""No decision rests on bits that two ranks computed apart: one rank is a last bit off, and all decide alike."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from d2o_dist.config.parallel import ParallelConfig
from d2o_dist.config.sampling import SamplingConfig
from tests.ranks import run_ranks
from tests.sharded import last_bits

pytestmark = pytest.mark.multirank

# Copies of the one KV head on two tensor ranks, alone and with token shards.
MESHES = {
    "tp": {"tp": 2},
    "tp x allgather": {"tp": 2, "sp": 2, "sp_prefill": "allgather"},
    "tp x ring, local": {"tp": 2, "sp": 2, "sp_prefill": "ring", "merge_scope": "local"},
}
RULES = {
    "d2o": ("d2o", {}),
    "paper": ("paper_minmax", {}),
    "released": ("released", {"protected_layers": ()}),
    "recent": ("streaming", {"merge": "mass"}),
    "ranked": ("d2o", {"allocation": "ranked"}),
}
ONCE = {"reread": ("reread", {"reread_chunk": 25}), "joint": ("d2o", {"selection": "joint", "joint_share": 0.4})}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-9) if one.is_floating_point() else one,
                           two.nan_to_num(-9) if two.is_floating_point() else two)  # fmt: skip
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize(("rule", "mesh"), [*product(RULES, MESHES), *product(ONCE, ["tp"])], ids=str)
def test_copies_of_a_head_decide_as_one(rule, mesh):
    """Positions after every token, budgets, thresholds and counts, where similarities and ranks tie everywhere.

    And what was merged into what: keys and values differ by rounding alone.
    """
    parallel = ParallelConfig(tp_engine="transformers", **MESHES[mesh])
    preset, d2o = {**RULES, **ONCE}[rule]
    size = parallel.tp * parallel.sp
    found = run_ranks(size, last_bits.decided, parallel, preset, d2o, parallel.tp - 1, fresh=True)
    for number, one in enumerate(found):
        first = found[number // parallel.tp * parallel.tp]  # copies: the tensor ranks of a sequence rank
        torch.testing.assert_close(one["held"], first["held"], rtol=1e-9, atol=1e-9)
        for name in one.keys() - {"held"}:
            assert same(one[name], first[name]), (number, name)
        for name in ("budgets", "kv_len", "thresholds"):
            assert same(one[name], found[0][name]), (number, name)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"sp": 2}, {"tp": 2, "sp": 2}], ids=str)
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(temperature=0), SamplingConfig(temperature=1.0, top_k=1, repetition_penalty=1.1)],
    ids=["greedy", "drawn"],
)  # fmt: skip
def test_all_ranks_take_the_token_of_one(mesh, sampling):
    """Rank 1 would take the other of two that tie, and every token of every row is the first rank's; 8 bytes a row."""
    parallel = ParallelConfig(tp_engine="transformers", **mesh)
    size = parallel.tp * parallel.sp
    results = run_ranks(size, last_bits.picked, parallel, sampling, fresh=True)
    (tokens, sent), others = results[0], results[1:]
    assert all(found == tokens and len(found) == 3 for found, _ in others)
    assert sent == {"request": {"all_reduce": {"calls": 12, "bytes": 12 * (2 * 8 * 3 * (size - 1) // size)}}}
    assert all(of_other == sent for _, of_other in others)
