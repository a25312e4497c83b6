"""Values of another head dim than keys, in every op that takes both."""

import pytest
import torch

from d2o_dist.kernels.decode_attention import (
    decode_attention,
    decode_with_logits,
    naive_decode_attention,
    naive_decode_with_logits,
)
from d2o_dist.kernels.prefill_attention import cross_attention, naive_prefill_attention, prefill_attention
from d2o_dist.kernels.scored_prefill import naive_scored_prefill_attention, scored_prefill_attention
from tests.kernels.helpers import assert_near, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [12, 20])
def test_equals_naive(dtype, dim):
    q, k, v = make(2, 6, 40, 16, dtype=dtype), make(2, 2, 65, 16, dtype=dtype, seed=1), make(2, 2, 65, dim, dtype=dtype)
    exact = [tensor.double() for tensor in (q, k, v)]
    bias = make(2, 2, 65, seed=3)
    pairs = [
        (prefill_attention(q, k, v, 0.3, q_start=25, **given),
         naive_prefill_attention(*exact, 0.3, q_start=25, **given))
        for given in ({}, {"window": 9}, {"bias": bias.float() if dtype == torch.bfloat16 else bias})
    ]  # fmt: skip
    pairs.append((scored_prefill_attention(q, k, v, 0.3, q_start=25),
                  naive_scored_prefill_attention(*exact, 0.3, q_start=25)))  # fmt: skip
    pairs.append((cross_attention(q[:, :, -1:], k, v, 0.3),
                  naive_prefill_attention(exact[0][:, :, -1:], *exact[1:], 0.3, q_start=64)))  # fmt: skip
    for op, naive in ((decode_attention, naive_decode_attention), (decode_with_logits, naive_decode_with_logits)):
        pairs.append((op(q[:, :, 0], k, v, 0.3), naive(exact[0][:, :, 0], *exact[1:], 0.3)))
    for found, wanted in pairs:
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other, dtype)
    empty = prefill_attention(q[:0], k[:0], v[:0], 0.3, q_start=25)[0]
    assert empty.shape == (0, 6, 40, dim) and found[0].shape == (2, 6, dim)
