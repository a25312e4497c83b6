"""Bounded logits in every op against its oracle, and a learned sink against a key that is really there."""

import pytest
import torch

from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_peaks import column_peaks, naive_column_peaks
from d2o_dist.kernels.column_sums import column_sums, naive_column_sums
from d2o_dist.kernels.decode_attention import (
    decode_attention,
    decode_with_logits,
    naive_decode_attention,
    naive_decode_with_logits,
)
from d2o_dist.kernels.lse import with_sinks
from d2o_dist.kernels.prefill_attention import cross_attention, naive_prefill_attention, prefill_attention
from d2o_dist.kernels.scored_decode import naive_scored_decode, scored_decode
from d2o_dist.kernels.scored_prefill import naive_scored_prefill_attention, scored_prefill_attention
from tests.kernels.helpers import assert_near, make

RULE = Softmax(0.4, softcap=1.3)
DTYPES = [torch.float64, torch.bfloat16]


def prompt(dtype, heads=(6, 2), queries=70, past=30):
    """Queries of which some have no live key before them, keys of which some are dead, and biases."""
    q = make(2, heads[0], queries, 16, dtype=dtype)
    k, v = (make(2, heads[1], past + queries, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    bias = make(2, heads[1], past + queries, seed=3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    bias[:, :, 3::5] = -torch.inf
    return q, k, v, bias


def near(found, wanted, dtype):
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [{}, {"window": 9}, {"bias": True}], ids=str)
def test_prompts(dtype, given):
    q, k, v, bias = prompt(dtype)
    given = {**given, **({"bias": bias} if given.get("bias") else {})}
    wanted = naive_prefill_attention(q.double(), k.double(), v.double(), **RULE.logits, q_start=30, **given)
    near(prefill_attention(q, k, v, **RULE.logits, q_start=30, **given), wanted, dtype)
    plain = naive_prefill_attention(q.double(), k.double(), v.double(), RULE.scale, q_start=30, **given)
    assert not torch.allclose(wanted[1], plain[1], atol=0.1)  # the cap matters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_keys_before_all_queries_and_statistics(dtype, has_bias):
    q, k, v, bias = prompt(dtype)
    bias = bias if has_bias else None
    exact = [tensor.double() for tensor in (q, k, v)]
    early, before = slice(0, 30), None if bias is None else bias[:, :, :30]
    # As causal attention of queries that all come later.
    late = naive_prefill_attention(
        exact[0][:, :, -1:], exact[1][:, :, early], exact[2][:, :, early], **RULE.logits, q_start=29, bias=before
    )
    found = cross_attention(q[:, :, -1:], k[:, :, early], v[:, :, early], **RULE.logits, bias=before)
    near(found, late, dtype)
    lse = naive_prefill_attention(*exact, **RULE.logits, q_start=30, bias=bias)[1]
    for options in ({}, {"query_stride": 4}, {"causal": False}, {"window": 11}):
        wanted = naive_column_sums(*exact[:2], lse, **RULE.logits, q_start=30, bias=bias, **options)
        found = column_sums(q, k, lse.to(torch.float64 if dtype == torch.float64 else torch.float32), **RULE.logits,
                            q_start=30, bias=bias, **options)  # fmt: skip
        assert_near(found, wanted, dtype)
    wanted = naive_column_peaks(*exact[:2], lse, **RULE.logits, q_start=30, bias=bias)
    found = column_peaks(q, k, lse.to(found.dtype), **RULE.logits, q_start=30, bias=bias)
    assert_near(found, wanted, dtype)
    if not has_bias:
        wanted = naive_scored_prefill_attention(*exact, **RULE.logits, q_start=30)
        near(scored_prefill_attention(q, k, v, **RULE.logits, q_start=30), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_mass", [False, True])
@pytest.mark.parametrize("peaks", [False, True])
@pytest.mark.parametrize("sinks", [None, torch.tensor([[0.5, -2.0, 3.0, 0.0, 1.0, 8.0]], dtype=torch.float64)],
                         ids=["plain", "sinks"])  # fmt: skip
def test_steps(dtype, has_mass, peaks, sinks):
    q, k, v, bias = prompt(dtype, queries=1)
    q, mass = q[:, :, 0], bias.clamp_min(-2) if has_mass else None
    valid = torch.arange(31) < torch.tensor([[31], [0]])  # a row without any slot
    exact = [tensor.double() for tensor in (q, k, v)]
    for op, naive in ((decode_attention, naive_decode_attention), (decode_with_logits, naive_decode_with_logits)):
        near(op(q, k, v, **RULE.logits, valid=valid, log_mass=mass),
             naive(*exact, **RULE.logits, valid=valid, log_mass=mass), dtype)  # fmt: skip
    newest = torch.tensor([[30], [30]])
    statistics = [make(2, 2, 31, seed=seed).abs().to(bias.dtype) for seed in (4, 5)]
    mine, wanted = ([tensor.to(kind).clone() for tensor in statistics] for kind in (bias.dtype, torch.float64))
    shared = dict(valid=valid, newest=newest, log_mass=mass, peaks=peaks, sinks=sinks, **RULE.logits)
    found = scored_decode(q, k, v, scores=mine[0], rates=mine[1], **shared)
    expected = naive_scored_decode(*exact, scores=wanted[0], rates=wanted[1], **shared)
    near([found, *mine], [expected, *wanted], dtype)


def test_a_sink_is_a_key_of_value_zero():
    """One more key whose products with the queries of a head are its logit, over the scale."""
    q, k, v, _ = prompt(torch.float64, heads=(2, 2), past=0)
    sinks = torch.tensor([[1.5, -0.7]], dtype=torch.float64)
    q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    wide = torch.cat([k, torch.zeros_like(k[..., :1])], -1)
    key = torch.zeros_like(wide[:, :, :1])
    key[..., -1] = sinks.T / 0.4
    values = torch.cat([v, torch.zeros_like(v[..., :1])], -1)
    wanted = naive_prefill_attention(
        q, torch.cat([key, wide], 2), torch.cat([torch.zeros_like(key), values], 2), 0.4, q_start=1
    )
    out, lse = with_sinks(*naive_prefill_attention(q, wide, values, 0.4), sinks)
    near((out, lse), wanted, torch.float64)
    assert with_sinks(out, lse, None) == (out, lse)
    empty = torch.full_like(lse, -torch.inf)
    assert torch.equal(with_sinks(torch.zeros_like(out), empty, sinks)[1], sinks[..., None].expand_as(lse))
