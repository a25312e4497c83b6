"""Merging by the kernel against `policy.merge`, under every rule."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.evict.merge import merge_evicted
from d2o_dist.policy import merge as core_merge
from d2o_dist.policy.merge import merge_into
from d2o_dist.slots.slots import Slots, stats_dtype
from tests.spec import spec


def slots(batch: int, heads: int, count: int, dtype: torch.dtype, seed: int) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, count, 8, generator=generator, dtype=torch.float64).to(dtype)
    positions = torch.arange(count).expand(batch, heads, count)
    scores, rates, log_mass = torch.rand(3, batch, heads, count, generator=generator, dtype=torch.float64).to(
        stats_dtype(dtype)
    )
    return Slots(keys, values, positions, scores, rates, log_mass)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["keys_values", "values", "mass", "released", "none"])
@pytest.mark.parametrize("num_evicted", [0, 1, 40])
def test_equals_the_core(rule, num_evicted, dtype):
    """Several evicted tokens a target, targets that take nothing, tokens that are not merged and hold rubbish."""
    config = spec("paper_minmax", merge=rule)
    kept, evicted = slots(2, 3, 11, dtype, 1), slots(2, 3, num_evicted, dtype, 2)
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, num_evicted)
    similarity = torch.rand(shape, generator=generator, dtype=torch.float64).to(stats_dtype(dtype))
    target = torch.randint(0, 9, shape, generator=generator)
    merged = torch.rand(shape, generator=generator) > 0.4
    similarity[~merged] = -torch.inf
    found = merge_evicted(kept, evicted, similarity, target, merged, config.merge)
    wanted = merge_into(kept, evicted, similarity, target, merged, config.merge)
    exact = dtype == torch.float64
    for name in ("keys", "values", "rates", "log_mass", "scores", "positions"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        # In bfloat16 the two orders of addition may round to neighbours.
        bound = 1e-12 if exact else 1e-2 if mine.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
    untouched = torch.ones(2, 3, 11, dtype=torch.bool)
    untouched.scatter_reduce_(2, target, ~merged, "amin")
    assert torch.equal(found.values[untouched], kept.values[untouched])
    assert torch.equal(found.keys[untouched], kept.keys[untouched])


@pytest.mark.parametrize("sorts", [False, True], ids=["in turn", "sorted"])
@pytest.mark.parametrize("rule", ["keys_values", "mass", "released"])
def test_sums_in_order_and_their_gradients(monkeypatch, rule, sorts):
    """The way of CPUs and the way of CUDA (run here on a CPU): against a loop over the tokens, bit for bit."""
    monkeypatch.setattr(core_merge, "_sorts", lambda device: sorts)
    config = spec("paper_minmax", merge=rule)
    kept, evicted = slots(2, 3, 11, torch.float64, 1), slots(2, 3, 40, torch.float64, 2)
    similarity = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = torch.randint(0, 9, (2, 3, 40), generator=torch.Generator().manual_seed(4))
    merged = similarity > 0.3
    evicted.values[~merged] = torch.nan  # is not read
    sums = core_merge.merge_sums(evicted, similarity, target, merged, config.merge, 11)
    weight = config.merge.evicted_weight(evicted, similarity)
    expected = torch.zeros(2, 3, 11, 8, dtype=torch.float64)
    for b, h, i in merged.nonzero().tolist():
        expected[b, h, target[b, h, i]] += weight[b, h, i] * evicted.values[b, h, i]
    assert torch.equal(sums.values, expected)
    assert int(sums.count.sum()) == int(merged.sum())

    def values(kept_values, evicted_values):
        old, new = kept.replace(values=kept_values), evicted.replace(values=evicted_values)
        return merge_into(old, new, similarity, target, merged, config.merge).values.square()

    leaves = [kept.values.clone().requires_grad_(), evicted.values.nan_to_num().requires_grad_()]
    torch.autograd.gradcheck(values, leaves, fast_mode=True)
    gradient = torch.autograd.grad(values(*leaves).sum(), leaves)[1]
    assert bool(((gradient != 0).any(-1) == merged).all())
