import pytest
import torch

from d2o_dist.kernels.merge_into import merge_into, naive_merge_into, torch_blocked
from tests.kernels.helpers import DTYPE_IDS, DTYPES, assert_near, make


def inputs(num_evicted, num_kept, dtype, dim=16, fraction=0.6, seed=0):
    kept = tuple(make(2, 3, num_kept, dim, dtype=dtype, seed=seed + s) for s in (0, 1))
    evicted = tuple(make(2, 3, num_evicted, dim, dtype=dtype, seed=seed + s) for s in (2, 3))
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, num_kept, (2, 3, num_evicted), generator=generator)
    merged = torch.rand(2, 3, num_evicted, generator=generator) < fraction
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight = make(2, 3, num_evicted, dtype=acc, seed=seed + 4).abs()
    own = make(2, 3, num_kept, dtype=acc, seed=seed + 5).abs() + 0.1
    return kept, evicted, weight, target, merged, own


def check(kept, evicted, weight, target, merged, own, share=None):
    means, total, touched = merge_into(kept, evicted, weight, target, merged, own, share=share)
    wide = [tuple(x.double() for x in group) for group in (kept, evicted)]
    want = naive_merge_into(*wide, weight.double(), target, merged, own if isinstance(own, float) else own.double(),
                            share=None if share is None else share.double())  # fmt: skip
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for mean, expected, old in zip(means, want[0], kept, strict=True):
        assert mean.dtype == old.dtype and mean.data_ptr() != old.data_ptr()
        assert_near(mean, expected, old.dtype)
        assert torch.equal(mean[~touched], old[~touched])
    assert_near(total, want[1], exact)
    assert torch.equal(touched, want[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("num_evicted, num_kept", [(1, 1), (1, 9), (50, 3), (130, 33)])
@pytest.mark.parametrize("shared", [False, True], ids=["weights", "share"])
def test_equals_naive(dtype, num_evicted, num_kept, shared):
    case = inputs(num_evicted, num_kept, dtype)
    check(*case, share=torch.ones_like(case[2]) if shared else None)


def test_one_weight_for_all_and_many_blocks(monkeypatch):
    monkeypatch.setattr(torch_blocked, "_ROWS", 7)
    kept, evicted, weight, target, merged, _ = inputs(90, 5, torch.float32)
    check(kept, evicted, weight, target, merged, 2.718281828)


def test_what_is_not_merged_may_hold_nan():
    kept, evicted, weight, target, merged, own = inputs(40, 6, torch.float32)
    for x in (*evicted, weight):
        x[~merged] = torch.nan
    means, total, _ = merge_into(kept, evicted, weight, target, merged, own)
    assert all(x.isfinite().all() for x in (*means, total))


def test_nothing_merged_and_nothing_evicted():
    kept, evicted, weight, target, merged, own = inputs(4, 3, torch.bfloat16, fraction=-1.0)
    for part in (slice(None), slice(0, 0)):
        rows = [x[:, :, part] for x in (weight, target, merged)]
        means, total, touched = merge_into(kept, tuple(x[:, :, part] for x in evicted), *rows, own)
        assert all(map(torch.equal, means, kept)) and torch.equal(total, own) and not touched.any()


def test_strided_views():
    kept, evicted, weight, target, merged, own = inputs(40, 6, torch.float64)
    turned = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in group) for group in (kept, evicted)]
    for one, two in zip(
        merge_into(*turned, weight, target, merged, own)[0], merge_into(kept, evicted, weight, target, merged, own)[0],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, two)


def test_errors_name_both_shapes():
    kept, evicted, weight, target, merged, own = inputs(4, 3, torch.float32)
    with pytest.raises(ValueError, match=r"kept tensors \(2\).*evicted ones \(1\)"):
        merge_into(kept, evicted[:1], weight, target, merged, own)
    with pytest.raises(ValueError, match=r"target \(2, 3, 3\).*weight \(2, 3, 4\)"):
        merge_into(kept, evicted, weight, target[:, :, :3], merged, own)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 16\).*\(2, 3, 2, 16\)"):
        merge_into(kept, tuple(x[:, :, :2] for x in evicted), weight, target, merged, own)
