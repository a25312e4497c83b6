import pytest
import torch

from d2o_dist.kernels.nearest_kept import naive_nearest_kept, nearest_kept
from tests.kernels.helpers import DTYPE_IDS, DTYPES, assert_near, make


def check(evicted, kept, mask=None):
    similarity, index = nearest_kept(evicted, kept, mask)
    expected, expected_index = naive_nearest_kept(evicted.double(), kept.double(), mask)
    assert similarity.dtype == (torch.float64 if evicted.dtype == torch.float64 else torch.float32)
    assert index.dtype == torch.int64
    # Products are exact to acc dtype whatever the input dtype.
    assert_near(similarity, expected, torch.float64 if evicted.dtype == torch.float64 else torch.float32)
    assert torch.equal(index, expected_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("num_evicted", [0, 1, 7, 130])
@pytest.mark.parametrize("num_kept", [1, 2, 33, 65])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_naive(dtype, num_evicted, num_kept, masked):
    mask = make(2, 3, num_kept, seed=2) > 0.3 if masked else None
    check(make(2, 3, num_evicted, 16, dtype=dtype), make(2, 3, num_kept, 16, dtype=dtype, seed=1), mask)


def test_several_blocks():
    check(make(2, 1100, 4), make(2, 4500, 4, seed=1))
    check(make(2, 1100, 4), make(2, 4500, 4, seed=1), make(2, 4500, seed=2) > 0)


@pytest.mark.parametrize("dim", [7, 64, 128])
@pytest.mark.parametrize("num_kept", [2, 5, 33, 513, 2049, 2113])
@pytest.mark.parametrize("num_evicted", [1, 3, 16, 100])
def test_ties_go_to_the_lowest_index(dim, num_kept, num_evicted):
    """Equal keys everywhere, block ends included: float32 sums in another order would break the tie the wrong way."""
    kept = make(1, dim, dtype=torch.float32, seed=1).expand(num_kept, dim)
    _, index = nearest_kept(make(num_evicted, dim, dtype=torch.float32), kept)
    assert torch.equal(index, torch.zeros(num_evicted, dtype=torch.int64))
    mask = torch.ones(num_kept, dtype=torch.bool)
    mask[: num_kept // 2] = False
    _, index = nearest_kept(make(num_evicted, dim, dtype=torch.float32), kept, mask)
    assert torch.equal(index, torch.full((num_evicted,), num_kept // 2))


def test_zero_keys_have_cosine_zero():
    evicted, kept = make(3, 4), make(5, 4, seed=1)
    evicted[1], kept[3] = 0, 0
    check(evicted, kept)
    assert nearest_kept(evicted, kept)[0][1] == 0
    check(-kept[:1].expand(2, 4), torch.stack([kept[0], torch.zeros(4, dtype=torch.float64)]))


def test_rows_without_a_target():
    mask = torch.tensor([[False] * 5, [False, True, False, True, False]])
    similarity, index = nearest_kept(make(2, 3, 4), make(2, 5, 4, seed=1), mask)
    assert torch.equal(similarity[0], torch.full((3,), -torch.inf, dtype=torch.float64))
    assert torch.equal(index[0], torch.zeros(3, dtype=torch.int64))
    check(make(2, 3, 4), make(2, 5, 4, seed=1), mask)
    check(make(2, 3, 4), make(2, 5, 4, seed=1), torch.zeros_like(mask))


def test_masked_rows_may_hold_nan():
    kept, mask = make(2, 70, 4, seed=1), make(2, 70, seed=2) > 0
    expected = naive_nearest_kept(make(2, 9, 4), kept, mask)
    similarity, index = nearest_kept(make(2, 9, 4), kept.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    torch.testing.assert_close(similarity, expected[0], atol=1e-12, rtol=0)
    assert torch.equal(index, expected[1])


def test_no_kept_and_errors():
    similarity, index = nearest_kept(make(2, 3, 4), make(2, 0, 4))
    assert bool((similarity == -torch.inf).all()) and not index.any()
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(1, 3, 4\)"):
        nearest_kept(make(2, 3, 4), make(1, 3, 4))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.74, 0.9, 1.0])
def test_few_and_many_targets(share):
    """Few targets are copied together first, many are searched where they lie."""
    mask = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < share
    check(make(3, 20, 8), make(3, 200, 8, seed=1), mask)
