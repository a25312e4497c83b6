import pytest
import torch

from d2o_dist.kernels.column_sums import column_sums, naive_column_sums, torch_banded
from d2o_dist.kernels.column_sums.torch_blocked import Blocks, blocked_column_sums
from d2o_dist.kernels.prefill_attention import naive_prefill_attention, prefill_attention
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make

SCALE = 0.3


def inputs(heads, tq, q_start, dtype, dim=16, batch=2, window=None):
    """q, k and the lse of their attention (from the oracle, in acc dtype)."""
    q = make(batch, heads[0], tq, dim, dtype=dtype)
    k = make(batch, heads[1], q_start + tq, dim, dtype=dtype, seed=1)
    lse = naive_prefill_attention(q.double(), k.double(), k.double(), SCALE, q_start=q_start, window=window)[1]
    return q, k, lse.to(torch.float64 if dtype == torch.float64 else torch.float32)


def oracle(q, k, lse, **kwargs):
    return naive_column_sums(q.double(), k.double(), lse.double(), SCALE, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("tq", [1, 7, 33, 130])
@pytest.mark.parametrize("q_start", [0, 45], ids=["whole", "chunk"])
def test_equals_naive_and_sums_to_the_queries(dtype, heads, tq, q_start):
    q, k, lse = inputs(heads, tq, q_start, dtype)
    sums = column_sums(q, k, lse, SCALE, q_start=q_start)
    assert sums.dtype == lse.dtype
    # bf16 inputs, float32 arithmetic: as exact as float32.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(sums, oracle(q, k, lse, q_start=q_start), exact)
    assert_near(sums.sum(-1), torch.full(q.shape[:2], float(tq)), exact)


TINY = {  # every way for a block to meet the diagonal, the ends and the heads
    "one": Blocks(1, 1, 1, 1),
    "wide": Blocks(1, 3, 8, 16),
    "tall": Blocks(2, 16, 5, 10),
    "heads": Blocks(3, 7, 4, 12),
}


@pytest.mark.parametrize("blocks", TINY.values(), ids=TINY)
@pytest.mark.parametrize("window", [None, 1, 6, 20])
@pytest.mark.parametrize("start", [(0, 0), (9, 0), (9, 4), (3, 11), (0, 60)], ids=str)
def test_blocks_shards_and_windows(blocks, window, start):
    """q_start, k_start: a shard of the keys may begin before, amid or after the queries."""
    q, k, _ = inputs((8, 4), 33, 4, torch.float64, batch=1)
    lse = make(1, 8, 33, seed=3).abs() + 4
    kwargs = dict(q_start=start[0], k_start=start[1], window=window)
    sums = blocked_column_sums(q, k, lse, SCALE, bias=None, causal=True, blocks=blocks, **kwargs)
    assert_near(sums, oracle(q, k, lse, **kwargs), torch.float64)


@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("window", [1, 6, 16, 20, 64])
def test_a_narrow_band(heads, window, monkeypatch):
    """In one piece and in several, wherever the keys begin and end; rows whose lse is infinite hold anything."""
    q, k, _ = inputs(heads, 133, 9, torch.float64, batch=2)
    lse = make(2, heads[0], 133, seed=3).abs() + 4
    lse[:, :, 5::7], lse[:, :, 6::7] = torch.inf, -torch.inf
    expected = {start: oracle(q, k, lse, q_start=start, k_start=9, window=window) for start in (0, 9, 60, 149, 300)}
    q[:, :, 5::7] = torch.nan
    for chunk in (1, torch_banded._CHUNK):
        monkeypatch.setattr(torch_banded, "_CHUNK", chunk)
        for start, sums in expected.items():
            where = {"q_start": start, "k_start": 9, "causal": True, "window": window}
            assert_near(torch_banded.banded_column_sums(q, k, lse, SCALE, **where), sums, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_narrow_band_in_every_dtype(dtype):
    """bf16 inputs, float32 arithmetic: as exact as float32."""
    q, k, lse = inputs((4, 2), 130, 0, dtype, window=16)
    sums, exact = column_sums(q, k, lse, SCALE, window=16), torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == exact
    assert_near(sums, oracle(q, k, lse, window=16), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_several_default_blocks(dtype):
    q, k, lse = inputs((4, 1), 1300, 0, dtype, dim=8, batch=1)
    assert_near(column_sums(q, k, lse, SCALE), oracle(q, k, lse), torch.float64 if dtype == torch.float64 else dtype)


def test_key_shards_add_up_to_the_whole():
    q, k, lse = inputs((8, 2), 65, 0, torch.float64)
    parts = [column_sums(q, k[:, :, a:b], lse, SCALE, k_start=a) for a, b in ((0, 20), (20, 21), (21, 65))]
    torch.testing.assert_close(torch.cat(parts, 2), column_sums(q, k, lse, SCALE), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_bias(causal):
    q, k, _ = inputs((8, 2), 33, 4, torch.float64)
    bias = make(2, 2, 37, seed=5)
    lse = make(2, 8, 33, seed=3).abs() + 4
    kwargs = dict(q_start=4, bias=bias, causal=causal)
    assert_near(column_sums(q, k, lse, SCALE, **kwargs), oracle(q, k, lse, **kwargs), torch.float64)


def test_dead_rows_and_columns_may_hold_nan():
    q, k, lse = inputs((4, 2), 33, 0, torch.float64)
    bias = torch.zeros(2, 2, 33, dtype=torch.float64)
    bias[:, :, ::5] = -torch.inf
    lse[:, :, ::4], lse[:, :, 1::4] = torch.inf, -torch.inf
    expected = oracle(q, k, lse, bias=bias)
    q[:, :, ::4], k[:, :, ::5] = torch.nan, torch.nan
    sums = column_sums(q, k, lse, SCALE, bias=bias)
    assert_near(sums, expected, torch.float64)
    assert torch.equal(sums[:, :, ::5], torch.zeros_like(sums[:, :, ::5]))


def test_keys_ahead_of_every_query_may_hold_nan():
    q, k, lse = inputs((4, 2), 33, 0, torch.float64)
    ahead = torch.full((2, 2, 9, 16), torch.nan, dtype=torch.float64)
    sums = column_sums(q, torch.cat([k, ahead], 2), lse, SCALE)
    assert_near(sums[..., :33], oracle(q, k, lse), torch.float64)
    assert torch.equal(sums[..., 33:], torch.zeros_like(sums[..., 33:]))


@pytest.mark.parametrize("num_last", [0, 1, 32, 33, 100])
def test_num_last(num_last):
    q, k, lse = inputs((8, 2), 33, 9, torch.float64)
    sums = column_sums(q, k, lse, SCALE, q_start=9, num_last=num_last)
    assert_near(sums, oracle(q, k, lse, q_start=9, num_last=num_last), torch.float64)
    assert_near(sums.sum(-1), torch.full((2, 8), float(min(num_last, 33))), torch.float64)


@pytest.mark.parametrize("stride", [1, 2, 8, 50])
@pytest.mark.parametrize("start", [(0, 0), (9, 4), (3, 11), (0, 60)], ids=str)
@pytest.mark.parametrize("window", [None, 6])
def test_query_stride(stride, start, window):
    q, k, _ = inputs((8, 4), 33, 4, torch.float64, batch=1)
    lse = make(1, 8, 33, seed=3).abs() + 4
    kwargs = dict(q_start=start[0], k_start=start[1], window=window, query_stride=stride)
    assert_near(column_sums(q, k, lse, SCALE, **kwargs), oracle(q, k, lse, **kwargs), torch.float64)


@pytest.mark.parametrize("blocks", TINY.values(), ids=TINY)
def test_strided_blocks(blocks):
    """Blocks whose queries are far apart: the diagonal crosses many blocks of keys."""
    q, k, _ = inputs((8, 4), 33, 140, torch.float64, batch=1)
    lse = make(1, 8, 33, seed=3).abs() + 4
    sums = blocked_column_sums(
        q, k, lse, SCALE, q_start=7, k_start=2, q_step=5, bias=None, causal=True, window=31, blocks=blocks
    )
    sparse_q, sparse_lse = q.new_zeros(1, 8, 165, 16), lse.new_full((1, 8, 165), torch.inf)
    sparse_q[:, :, ::5], sparse_lse[:, :, ::5] = q, lse
    assert_near(sums, oracle(sparse_q, k, sparse_lse, q_start=7, k_start=2, window=31), torch.float64)


def test_strided_chunks_add_up_to_the_whole():
    q, k, lse = inputs((8, 2), 65, 0, torch.float64)
    whole = column_sums(q, k, lse, SCALE, query_stride=8)
    parts = [
        column_sums(q[:, :, a:b], k, lse[:, :, a:b], SCALE, q_start=a, query_stride=8)
        for a, b in ((0, 5), (5, 30), (30, 65))
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
    assert_near(whole.sum(-1), torch.full((2, 8), 8.0), torch.float64)
    with pytest.raises(ValueError, match=r"query_stride \(8\).*num_last \(3\)"):
        column_sums(q, k, lse, SCALE, query_stride=8, num_last=3)
    with pytest.raises(ValueError, match=r"query_stride \(0\)"):
        column_sums(q, k, lse, SCALE, query_stride=0)


def test_invariant_over_a_window():
    q, k, lse = inputs((8, 2), 130, 45, torch.float64, window=20)
    sums = column_sums(q, k, lse, SCALE, q_start=45, window=20)
    assert_near(sums.sum(-1), torch.full((2, 8), 130.0), torch.float64)


def test_invariant_on_the_fast_path_in_bf16():
    """lse of PyTorch's flash kernel, whose bf16 exp is good to 1e-4."""
    q, k, v = (make(1, h, 700, 64, dtype=torch.bfloat16, seed=h) for h in (8, 2, 2))
    lse = prefill_attention(q, k, v, 0.125)[1]
    sums = column_sums(q, k, lse, 0.125).sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 700.0), atol=0, rtol=2e-4)


def test_peaked_logits_underflow_quietly():
    q, k, _ = inputs((4, 2), 33, 0, torch.float32)
    q = q * 100
    lse = naive_prefill_attention(q, k, k, SCALE)[1]
    assert_near(column_sums(q, k, lse, SCALE).sum(-1), torch.full((2, 4), 33.0), torch.bfloat16)


def test_empty_and_errors():
    q, k, lse = inputs((4, 2), 7, 0, torch.float32)
    assert torch.equal(column_sums(q[:, :, :0], k, lse[:, :, :0], SCALE), torch.zeros(2, 4, 7))
    assert column_sums(q, k[:, :, :0], lse, SCALE).shape == (2, 4, 0)
    with pytest.raises(ValueError, match=r"\(2, 4, 6\).*\(2, 4, 7\)"):
        column_sums(q, k, lse[:, :, :6], SCALE)
    with pytest.raises(ValueError, match="causal"):
        column_sums(q, k, lse, SCALE, causal=False, window=3)
