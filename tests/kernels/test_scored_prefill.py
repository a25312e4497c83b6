"""The fused pass against the dense oracle, and against the two-pass way."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.prefill_attention import prefill_attention
from d2o_dist.kernels.scored_prefill import cpu, naive_scored_prefill_attention, scored_prefill_attention

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def inputs(batch, heads, length, past, dim, dtype, sharpness=1.0):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads[0], length, dim, dtype=torch.float64, generator=generator) * sharpness
    k, v = torch.randn(2, batch, heads[1], past + length, dim, dtype=torch.float64, generator=generator)
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("length, past", [(1, 0), (7, 0), (33, 0), (130, 0), (1, 40), (45, 31)])
def test_equals_the_oracle(monkeypatch, dtype, heads, length, past):
    # Small blocks, so that there are several, the last of another size.
    monkeypatch.setattr(cpu, "block_queries", lambda group, num_keys, head_dim: 16)
    q, k, v = inputs(2, heads, length, past, 16, dtype)
    found = scored_prefill_attention(q, k, v, 0.25, q_start=past)
    expected = naive_scored_prefill_attention(q.double(), k.double(), v.double(), 0.25, q_start=past)
    for name, one, two in zip(("out", "lse", "sums"), found, expected, strict=True):
        limit = TOLERANCES[dtype] if name == "out" or dtype != torch.bfloat16 else 2e-5
        torch.testing.assert_close(one.double(), two, rtol=limit, atol=limit, msg=name)
    assert found[0].dtype == dtype and found[1].dtype == found[2].dtype != torch.bfloat16
    total = found[2].sum(-1).double()
    torch.testing.assert_close(total, torch.full_like(total, length), rtol=1e-4, atol=0)


def test_equals_the_two_passes_on_peaked_attention():
    q, k, v = inputs(1, (4, 2), 700, 0, 32, torch.float32, sharpness=40.0)
    out, lse, sums = scored_prefill_attention(q, k, v, 0.2)
    expected, expected_lse = prefill_attention(q, k, v, 0.2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums, column_sums(q, k, expected_lse, 0.2), rtol=1e-3, atol=1e-3)


def test_an_empty_chunk_and_strided_inputs():
    q, k, v = inputs(1, (2, 1), 9, 0, 8, torch.float64)
    out, lse, sums = scored_prefill_attention(q[:, :, :0], k[:, :, :4], v[:, :, :4], 0.5, q_start=4)
    assert out.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0) and sums.eq(0).all()
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for one, two in zip(scored_prefill_attention(q, k, v, 0.5), scored_prefill_attention(*wide, 0.5), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)  # products of other strides may add up otherwise


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(1, (2, 1), 9, 0, 8, torch.float64)
    with pytest.raises(ValueError, match=r"k has 9 keys, but q_start \(2\) \+ Tq \(9\)"):
        scored_prefill_attention(q, k, v, 0.5, q_start=2)
    with pytest.raises(ValueError, match=r"v \(1, 1, 5, 8\).* must match k"):
        scored_prefill_attention(q, k, v[:, :, :5], 0.5)


def test_working_memory_is_bounded():
    for num_keys in (100, 8192, 32768, 1 << 20):
        for group in (1, 4, 7):
            for head_dim in (64, 128):
                rows = cpu.block_queries(group, num_keys, head_dim) * group
                assert rows <= 512 and rows * num_keys <= max(1 << 22, 128 * num_keys)
