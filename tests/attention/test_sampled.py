"""Column sums from a part of the queries: whole prompts, chunks and shards against the dense oracle."""

from __future__ import annotations

import pytest
import torch

from d2o_dist.attention.prefill import chunk_attention
from d2o_dist.attention.sampled import (
    naive_prompt_column_sums,
    prompt_column_sums,
    rest_sums,
    sampled_column_sums,
)
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.column_sums import column_sums
from d2o_dist.kernels.prefill_attention import naive_prefill_attention
from d2o_dist.policy.config import D2OConfig, QuerySample
from d2o_dist.policy.statistics import StatisticsConfig
from tests.kernels.helpers import make
from tests.spec import spec

SAMPLES = [QuerySample(8, 64), QuerySample(4, 3), QuerySample(5, 0), QuerySample(3, 20), QuerySample(200, 1)]
SOFTMAX = Softmax(0.3)
NO_TOKENS = torch.zeros(0, dtype=torch.int64)


def prompt(length: int, heads=(4, 2), dtype=torch.float64, old: int = 0):
    q = make(1, heads[0], length, 16, dtype=dtype)
    k, v = (make(1, heads[1], old + length, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v, naive_prefill_attention(q, k, v, **SOFTMAX.logits, q_start=old)[1]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_whole_prompts(heads, length, sample):
    q, k, _, lse = prompt(length, heads)
    found = prompt_column_sums(q, k, lse, SOFTMAX, sample)
    torch.testing.assert_close(found, naive_prompt_column_sums(q, k, lse, SOFTMAX, sample), rtol=1e-12, atol=1e-12)
    if length <= sample.near or length < sample.stride:
        torch.testing.assert_close(found, column_sums(q, k, lse, **SOFTMAX.logits), rtol=1e-12, atol=1e-12)


def test_even_attention_is_estimated_exactly():
    """Queries that attend all keys alike: the estimate of each key is the mean over the sampled ones of 1 / (i + 1)."""
    q, k, _, lse = prompt(160)
    sample = QuerySample(8, 4)
    found = prompt_column_sums(
        torch.zeros_like(q), k, torch.arange(1, 161).double().log().expand_as(lse), SOFTMAX, sample
    )
    sampled = 8 * sum(1 / (i + 1) for i in range(7, 160, 8) if i - 50 >= 4)
    near = sum(1 / (i + 1) for i in range(50, 54))
    assert found[0, :, 50].tolist() == pytest.approx([sampled + near] * 4)


def test_the_mean_stays_near_one():
    q, k, _, lse = prompt(1000)
    mean = prompt_column_sums(q, k, lse, SOFTMAX, QuerySample(8, 16)).mean(-1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=0.02)
    # Without near pairs every query's whole row counts, and rows add up to 1.
    mean = prompt_column_sums(q, k, lse, SOFTMAX, QuerySample(7, 0)).mean(-1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("cuts", [(1, 150), (64, 65, 150), (3, 9, 40, 150)], ids=str)
@pytest.mark.parametrize(("old", "softcap"), [(0, None), (13, None), (13, 1.5)])
def test_chunks_add_up_to_the_whole(sample, cuts, old, softcap):
    """And slots from before the prefill, with a bias, are far from every query."""
    q, k, v, _ = prompt(150, old=old)
    softmax = Softmax(0.3, softcap)
    bias = torch.zeros(1, 2, old + 150, dtype=torch.float64)
    bias[:, :, :old] = make(1, 2, old, seed=5)
    bias = bias if old else None
    _, lse = naive_prefill_attention(q, k, v, **softmax.logits, q_start=old, bias=bias)
    sums = torch.zeros(1, 4, old + 150, dtype=torch.float64)
    for a, b in zip((0, *cuts[:-1]), cuts, strict=True):
        here = slice(0, old + b)
        mass = None if bias is None else bias[:, :, here]
        part = chunk_attention(
            q[:, :, a:b], k[:, :, here], v[:, :, here], softmax,
            with_sums=True, sample=sample, num_old=old, log_mass=mass,
        )  # fmt: skip
        torch.testing.assert_close(part[1], lse[:, :, a:b], rtol=1e-12, atol=1e-12)
        sums[:, :, here] += part[2]
    tokens = torch.arange(150)
    rest = 150 % sample.stride
    if rest:
        sums += rest_sums(
            q[:, :, -rest:],
            k,
            lse[:, :, -rest:],
            softmax,
            sample,
            query_tokens=tokens[-rest:],
            key_tokens=tokens,
            bias=bias,
        )
    expected = naive_prompt_column_sums(q, k[:, :, old:], lse, softmax, sample)
    torch.testing.assert_close(sums[:, :, old:], expected, rtol=1e-12, atol=1e-12)
    # Old slots: the sampled queries' rows, and the rest's.
    logits = q @ k[:, :, :old].repeat_interleave(2, 1).mT * softmax.scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logits = logits if bias is None else logits + bias[:, :, :old].repeat_interleave(2, 1).unsqueeze(2)
    probs = (logits - lse.unsqueeze(-1)).exp()
    times = torch.tensor([sample.stride if (i + 1) % sample.stride == 0 else float(i >= 150 - rest) for i in tokens])
    torch.testing.assert_close(sums[:, :, :old], (probs * times[:, None]).sum(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_keys_of_other_ranks(sample):
    """Queries 60..99 against any of the tokens before them, in two parts, with gaps."""
    q, k, _, lse = prompt(150)
    part = slice(60, 100)
    want = sampled_column_sums(
        q[:, :, part], k[:, :, :100], lse[:, :, part], SOFTMAX, sample,
        start=60, num_old=0, tokens=torch.arange(60), with_own=True,
    )  # fmt: skip
    found = torch.zeros_like(want)
    for tokens in (torch.tensor([0, 1, 5, 30, 56, 57, 59]), NO_TOKENS):
        rest = torch.tensor([i for i in range(60) if i not in tokens])
        for some, own in ((tokens, False), (rest, True)):
            columns = torch.cat([some, torch.arange(60, 100)]) if own else some
            found[:, :, columns] = sampled_column_sums(
                q[:, :, part], k[:, :, columns], lse[:, :, part], SOFTMAX, sample,
                start=60, num_old=0, tokens=some, with_own=own,
            )  # fmt: skip
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_which_queries_a_configuration_takes():
    # Shares of layers by a sample; what ranks tokens, and the paper's rules, by all queries.
    assert D2OConfig.preset("d2o").query_sample == QuerySample(32, 16)
    assert D2OConfig.preset("d2o").num_last_queries == 32
    for preset, fields in (("d2o", {"score": "joint"}), ("paper", {}), ("released", {}), ("h2o", {}), ("lean", {})):
        assert D2OConfig.preset(preset, **fields).query_sample is None
    assert spec(score_queries="all").query_sample is None
    assert spec(score_queries="strided").query_sample == QuerySample(8, 64)
    assert spec(score_queries="strided", score_query_stride=1).query_sample is None
    assert spec("snapkv", score_queries="strided").query_sample is None
    assert spec("h2o", score_queries="strided", score_query_stride=50).num_last_queries == 49
    with pytest.raises(ValueError, match=r"statistics.query_stride \(0\) must be at least 1"):
        StatisticsConfig(query_stride=0)
    with pytest.raises(ValueError, match=r"statistics.near_distance \(-1\) must be at least 0"):
        StatisticsConfig(near_distance=-1)
    with pytest.raises(ValueError, match=r"statistics.query_stride \('strided'\) must be an integer"):
        StatisticsConfig(query_stride="strided")
