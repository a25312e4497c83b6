"""Rows whose tokens are shared by ranks: losses, gradients, budgets and thresholds of one process."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.comm import Collectives, ParallelMesh, build_mesh
from d2o_dist.config.distill import DistillConfig
from d2o_dist.train.model import enable_activation_checkpointing
from d2o_dist.train.ulysses import check_heads
from tests.models import tokens
from tests.ranks import run_ranks
from tests.spec import spec
from tests.train.helpers import cut, parts, tiny_objective

HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
DOCUMENTS = [[9, 1, 38], [20, 28]]
PRESETS = {
    "paper_minmax": {},
    "mass": {"tail_fraction": 0.3},
    "released": {"protected_layers": (0,)},
}


def run(kind: str, mesh: ParallelMesh, checkpointing: bool, **heads):
    """Loss and gradients of a step, summed over the ranks."""
    rank, sp = mesh.sp_rank, mesh.sp
    weights = DistillConfig(lm_weight=0.5, context_lm_weight=0.25)
    objective = tiny_objective(mesh=mesh, distill=weights, **heads)
    if checkpointing:
        enable_activation_checkpointing(objective.model)
    if kind == "lm":
        row = cut(tokens(2, 48), 0, 48, rank, sp)
        losses = objective("lm", row=row, documents=DOCUMENTS)
    else:
        context, continuation = parts(2, 36, 48, rank=rank, sp=sp)
        d2o = spec(kind, keep_ratio=0.3, min_layer_tokens=8, **PRESETS[kind])
        losses = objective("d2o_distill", context=context, continuation=continuation, d2o=d2o)
    losses.total.backward()
    everyone = Collectives(mesh.axis("world"))
    gradients = {name: everyone.all_reduce(p.grad) for name, p in objective.named_parameters()}
    sums = {name: float(everyone.all_reduce(value)) for name, value in losses.sums.items()}
    return sums, gradients, losses.achieved_keep_ratio


def on_rank(rank, world, kind, checkpointing, heads):
    return run(kind, build_mesh(sp=world), checkpointing, **heads)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("world", "kind", "heads"),
    [
        *((world, kind, HEADS) for world in (2, 4) for kind in ("lm", *PRESETS)),
        (4, "lm", dict(num_attention_heads=8, num_key_value_heads=2)),
        (2, "lm", dict(num_attention_heads=4, num_key_value_heads=1)),
    ],
    ids=lambda value: f"kv{value['num_key_value_heads']}" if isinstance(value, dict) else str(value),
)
def test_losses_and_gradients_equal_one_process(world, kind, heads):
    expected = run(kind, ParallelMesh.local(), False, **heads)
    for sums, gradients, achieved in run_ranks(world, on_rank, kind, world == 2, heads):
        assert sums == pytest.approx(expected[0], rel=1e-9)
        assert achieved == expected[2]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("heads", "compressed", "message"),
    [
        ((9, 3, 2), False, r"num_attention_heads \(9\) must be divisible by sp \(2\)"),
        ((8, 3, 2), False, r"num_key_value_heads \(3\) must be divisible by sp \(2\), or sp by them"),
        ((8, 2, 4), True, r"num_key_value_heads \(2\) must be divisible by sp \(4\)$"),
    ],
)
def test_heads_that_cannot_be_dealt_are_refused(heads, compressed, message):
    with pytest.raises(ValueError, match=message):
        check_heads(*heads, compressed=compressed)
    check_heads(8, 2, 4, compressed=False)
