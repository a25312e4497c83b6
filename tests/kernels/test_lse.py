import pytest
import torch

from d2o_dist.attention.prefill import chunk_attention, reread_attention
from d2o_dist.core.softmax import Softmax
from d2o_dist.kernels.decode_attention import decode_attention
from d2o_dist.kernels.lse import merge_partials
from d2o_dist.kernels.prefill_attention import naive_prefill_attention
from tests.kernels.helpers import make


def parts():
    q, k, v = make(1, 2, 1, 8), make(1, 2, 30, 8, seed=1), make(1, 2, 30, 8, seed=2)
    whole = naive_prefill_attention(q, k, v, 0.3, q_start=29)
    logits = q @ k.mT * 0.3
    cuts = [(0, 3), (3, 20), (20, 30)]
    lses = [logits[..., a:b].logsumexp(-1) for a, b in cuts]
    outs = [logits[..., a:b].softmax(-1) @ v[:, :, a:b] for a, b in cuts]
    return whole, outs, lses


def test_parts_merge_to_the_whole():
    (out, lse), outs, lses = parts()
    merged, merged_lse = merge_partials(outs, lses)
    torch.testing.assert_close(merged, out, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(merged_lse, lse, atol=1e-13, rtol=1e-13)


def test_empty_parts_change_nothing_even_if_they_hold_nan():
    (out, _), outs, lses = parts()
    outs.append(torch.full_like(outs[0], torch.nan))
    lses.append(torch.full_like(lses[0], -torch.inf))
    torch.testing.assert_close(merge_partials(outs, lses)[0], out, atol=1e-13, rtol=1e-13)


def test_all_parts_empty():
    out, lse = merge_partials([torch.full((3, 4), torch.nan)] * 2, [torch.full((3,), -torch.inf)] * 2)
    assert torch.equal(out, torch.zeros(3, 4)) and torch.equal(lse, torch.full((3,), -torch.inf))


def test_counts_must_match():
    with pytest.raises(ValueError, match=r"outs \(1\).*lses \(2\)"):
        merge_partials([torch.zeros(1, 1)], [torch.zeros(1)] * 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    """It is no empty part: a row that has it would otherwise be made of the other parts, without a word."""
    (out, lse), outs, lses = parts()
    lses[1] = torch.full_like(lses[1], bad)
    merged, merged_lse = merge_partials(outs, lses)
    assert merged.isnan().all() and not merged_lse.isfinite().any()
    _, outs, lses = parts()
    outs[1] = torch.full_like(outs[1], bad)
    assert not merge_partials(outs, lses)[0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("kind", ["chunk", "decode", "reread"])
def test_attention_passes_on_what_is_not_finite(kind, what, dtype):
    """Of one row of the batch; the other is as without it."""
    count = 1 if kind == "decode" else 3
    q, k, v = (make(2, heads, length, 16, seed=heads).to(dtype) for heads, length in ((4, count), (2, 30), (2, 30)))

    def attend(k, v):
        if kind == "decode":
            return decode_attention(q[:, :, 0], k, v, 0.25)[0]
        if kind == "reread":
            return reread_attention(q, k[:, :, -3:], v[:, :, -3:], k[:, :, :-3], v[:, :, :-3], Softmax(0.25))[0]
        return chunk_attention(q, k, v, Softmax(0.25), with_sums=False)[0]

    want = attend(k, v)
    bad = {"keys": k, "values": v}[what].clone()
    bad[1, :, 5] = torch.nan
    found = attend(bad, v) if what == "keys" else attend(k, bad)
    assert torch.equal(found[0], want[0]) and found[1].isnan().all()
