"""The end of a decode step against its oracle; and what logits give is what attention itself gives."""

import pytest
import torch

from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits, naive_decode_with_logits
from d2o_dist.kernels.finish_decode import finish_decode, naive_finish_decode, slot_probabilities
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("parts", ["s", "r", "srk", "rpk"])
@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
@pytest.mark.parametrize("apart", [False, True], ids=["level", "apart"])
def test_equals_naive(dtype, heads, parts, absent, apart):
    """The newest token lies in one slot of all heads, or in another one of each, or elsewhere."""
    logits, outs, lses = make(3, heads[0], 33, dtype=dtype), make(4, 3, heads[0], 5, dtype=dtype), None
    lses = make(4, 3, heads[0], dtype=dtype, seed=3)
    logits[:, :, ::4], logits[1], lses[2], outs[2] = -torch.inf, -torch.inf, -torch.inf, torch.nan
    lses[:, 1] = -torch.inf
    statistics = {
        name: make(3, heads[1], 40, dtype=dtype, seed=s)[:, :, :33].abs() if kind in parts else None
        for s, (kind, name) in enumerate((("s", "scores"), ("r", "rates")))
    }
    if "p" in parts:
        statistics["scores"] = make(3, heads[1], 33, dtype=dtype, seed=4).abs()
    expected = {name: None if x is None else x.clone() for name, x in statistics.items()}
    newest = torch.tensor([[32], [5], [-1]])
    options = dict(newest=newest - torch.arange(heads[1]) * 3 if apart else newest, rate_window=8, peaks="p" in parts)
    options |= dict(num_kv_heads=heads[1], present=torch.tensor([False, True, True]) if absent else None)
    options["sinks"] = make(1, heads[0], dtype=dtype, seed=6) if "k" in parts else None
    out = finish_decode(outs, lses, logits, dtype, **options, **statistics)
    assert_near(out, naive_finish_decode(outs, lses, logits, dtype, **options, **expected), dtype)
    for name, want in expected.items():
        if want is not None:
            assert_near(statistics[name], want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
def test_logits_give_what_decode_attention_gives(dtype, heads):
    q, k, v = make(2, heads[0], 16, dtype=dtype), *(make(2, heads[1], 37, 16, dtype=dtype, seed=s) for s in (1, 2))
    valid, mass = make(2, 37, seed=3) > 0, make(2, heads[1], 37, seed=4).float()
    valid[1] = False
    out, lse, logits = decode_with_logits(q, k, v, 0.3, valid=valid, log_mass=mass)
    want = naive_decode_with_logits(*(x.double() for x in (q, k, v)), 0.3, valid=valid, log_mass=mass)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for got, expected, kind in zip((out, lse, logits), want, (dtype, exact, exact), strict=True):
        assert_near(got, expected, kind)
    probs = decode_attention(q, k, v, 0.3, valid=valid, log_mass=mass)[2]
    assert_near(slot_probabilities(logits, lse, heads[1]), probs, exact)


def test_shards_of_slots_equal_the_whole():
    """Each shard knows its own logits and the lse of all: its scores are those of the whole."""
    q, k, v = make(1, 8, 16), make(1, 2, 50, 16, seed=1), make(1, 2, 50, 16, seed=2)
    whole, options = torch.zeros(1, 2, 50, dtype=torch.float64), dict(num_kv_heads=2)
    out, lse, logits = decode_with_logits(q, k, v, 0.3)
    finish_decode(out[None], lse[None], logits, q.dtype, scores=whole, **options)
    parts = [decode_with_logits(q, k[:, :, a:b], v[:, :, a:b], 0.3) for a, b in ((0, 20), (20, 20), (20, 50))]
    outs, lses = (torch.stack([part[number] for part in parts]) for number in (0, 1))
    shards = [torch.zeros(1, 2, part[2].shape[2], dtype=torch.float64) for part in parts]
    for part, shard in zip(parts, shards, strict=True):
        merged = finish_decode(outs, lses, part[2], q.dtype, scores=shard, **options)
        torch.testing.assert_close(merged, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat(shards, 2), whole, atol=1e-12, rtol=0)


def test_a_token_is_written_where_this_rank_has_it():
    """Also into a part of the slots; -1: it is on another rank."""
    q, k, v = make(2, 4, 16), make(2, 2, 9, 16, seed=1), make(2, 2, 9, 16, seed=2)
    new, slot = (make(2, 2, 16, seed=3), make(2, 2, 16, seed=4)), torch.tensor([[3, -1], [-1, 8]])
    wanted = [x.clone() for x in (k, v)]
    for target, token in zip(wanted, new, strict=True):
        target[0, 0, 3], target[1, 1, 8] = token[0, 0], token[1, 1]
    found = decode_with_logits(q, k, v, 0.3, slot=slot, new=new)
    for got, want in zip((k, v), wanted, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(found, naive_decode_with_logits(q, k, v, 0.3), strict=True):
        assert_near(got, want, torch.float64)


def test_errors():
    outs, lses, logits, scores = make(1, 2, 4, 3), make(1, 2, 4), make(2, 4, 9), make(2, 2, 9)
    options = dict(num_kv_heads=2)
    with pytest.raises(ValueError, match=r"scores \(2, 2, 8\).*\(2, 4, 9\)"):
        finish_decode(outs, lses, logits, torch.float64, scores=scores[:, :, :8], **options)
    with pytest.raises(ValueError, match="newest, one slot for each of 2 rows and KV heads, not None"):
        finish_decode(outs, lses, logits, torch.float64, rates=scores, **options)
    for newest in (torch.tensor([3, 4]), torch.tensor([[3, 4, 5]] * 2), torch.tensor([[3]])):
        with pytest.raises(ValueError, match=r"newest, one slot for each of 2 rows and KV heads, not \("):
            finish_decode(outs, lses, logits, torch.float64, rates=scores, newest=newest, **options)
    with pytest.raises(ValueError, match=r"lses \(1, 2, 3\) and logits \(2, 4, 9\) must be"):
        finish_decode(outs, lses[..., :3], logits, torch.float64, **options)
    with pytest.raises(ValueError, match=r"lse \(2, 3\).*\(2, 4, 9\)"):
        slot_probabilities(logits, lses[0, :, :3], 2)
    with pytest.raises(ValueError, match=r"\(4\).*\(3\)"):
        slot_probabilities(logits, lses[0], 3)
