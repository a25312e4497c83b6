import pytest
import torch

from d2o_dist.kernels.column_peaks import column_peaks, naive_column_peaks
from d2o_dist.kernels.column_peaks.torch_blocked import blocked_column_peaks
from d2o_dist.kernels.prefill_attention import naive_prefill_attention
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make

SCALE = 0.3


def inputs(heads, tq, q_start, dtype, dim=16, batch=2):
    """q, k and the lse of their attention (from the oracle, in acc dtype)."""
    q = make(batch, heads[0], tq, dim, dtype=dtype)
    k = make(batch, heads[1], q_start + tq, dim, dtype=dtype, seed=1)
    lse = naive_prefill_attention(q.double(), k.double(), k.double(), SCALE, q_start=q_start)[1]
    return q, k, lse.to(torch.float64 if dtype == torch.float64 else torch.float32)


def oracle(q, k, lse, **kwargs):
    return naive_column_peaks(q.double(), k.double(), lse.double(), SCALE, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("tq", [1, 7, 33, 130])
@pytest.mark.parametrize("q_start", [0, 45], ids=["whole", "chunk"])
def test_equals_naive(dtype, heads, tq, q_start):
    q, k, lse = inputs(heads, tq, q_start, dtype)
    peaks = column_peaks(q, k, lse, SCALE, q_start=q_start)
    assert peaks.dtype == lse.dtype
    # bf16 inputs, float32 arithmetic: as exact as float32.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(peaks, oracle(q, k, lse, q_start=q_start), exact)
    # What one query gives all keys of a group is G.
    assert float(peaks.max()) <= heads[0] / heads[1] + 1e-5


def test_by_hand():
    """Two query heads of one group; key 0 gets 1 + 1 from the first query, and no later query gives it more."""
    q = torch.tensor([[[[0.0], [9.0]], [[0.0], [-9.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64)
    lse = naive_prefill_attention(q, k, k, 1.0)[1]
    peaks = column_peaks(q, k, lse, 1.0)
    assert float(peaks[0, 0, 0]) == pytest.approx(2.0)
    # 0.99988 from one head, 0.00012 from the other, of the same query: their sum, not twice the larger.
    assert float(peaks[0, 0, 1]) == pytest.approx(1.0)


@pytest.mark.parametrize("num_queries, num_logits", [(1, 1), (3, 7), (16, 200), (64, 1 << 12)])
@pytest.mark.parametrize("q_start", [0, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks(num_queries, num_logits, q_start, causal):
    q, k, _ = inputs((8, 4), 33, 9, torch.float64, batch=1)
    lse = make(1, 8, 33, seed=3).abs() + 4
    kwargs = dict(q_start=q_start, causal=causal)
    peaks = blocked_column_peaks(q, k, lse, SCALE, bias=None, num_queries=num_queries, num_logits=num_logits, **kwargs)
    assert_near(peaks, oracle(q, k, lse, **kwargs), torch.float64)
    if causal and q_start == 0:
        assert bool((peaks[..., 33:] == 0).all())  # behind all queries


def test_chunks_of_queries_are_the_whole():
    q, k, lse = inputs((8, 2), 65, 0, torch.float64)
    parts = [
        column_peaks(q[:, :, a:b], k[:, :, :b], lse[:, :, a:b], SCALE, q_start=a)
        for a, b in ((0, 20), (20, 21), (21, 65))
    ]
    found = torch.zeros_like(parts[-1])
    for part in parts:
        found[..., : part.shape[-1]] = torch.maximum(found[..., : part.shape[-1]], part)
    torch.testing.assert_close(found, column_peaks(q, k, lse, SCALE), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_bias_dead_rows_and_unused_keys(causal):
    q, k, _ = inputs((8, 2), 33, 4, torch.float64)
    lse = make(2, 8, 33, seed=3).abs() + 4
    bias = make(2, 2, 37, seed=5)
    q[0, 3, 5], lse[0, 3, 5] = torch.nan, torch.inf
    lse[1, :, 7] = -torch.inf
    k[:, 1, 8], bias[:, 1, 8] = torch.nan, -torch.inf
    kwargs = dict(q_start=4, bias=bias, causal=causal)
    peaks = column_peaks(q, k, lse, SCALE, **kwargs)
    assert bool(peaks.isfinite().all()) and bool((peaks[:, 1, 8] == 0).all())
    assert_near(peaks, oracle(q, k, lse, **kwargs), torch.float64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_nothing_to_do(shape):
    q, k = make(1, 4, shape[0], 8), make(1, 2, shape[1], 8)
    assert bool((column_peaks(q, k, make(1, 4, shape[0]), SCALE) == 0).all())


def test_refusals():
    q, k, lse = inputs((4, 2), 5, 0, torch.float64)
    with pytest.raises(ValueError, match="lse"):
        column_peaks(q, k, lse[:, :2], SCALE)
    with pytest.raises(ValueError, match="bias"):
        column_peaks(q, k, lse, SCALE, bias=k[..., 0, :])
