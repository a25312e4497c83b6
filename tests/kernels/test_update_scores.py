import pytest
import torch

from d2o_dist.kernels.decode_attention import decode_attention, decode_with_logits, naive_decode_with_logits
from d2o_dist.kernels.lse import merge_partials
from d2o_dist.kernels.update_scores import naive_update_scores, slot_probabilities, update_scores
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("parts", ["s", "r", "sr"])
@pytest.mark.parametrize("absent", [False, True], ids=["all", "absent"])
@pytest.mark.parametrize("apart", [False, True], ids=["level", "apart"])
def test_equals_naive(dtype, heads, parts, absent, apart):
    """The newest token lies in one slot of all heads, or in another one of each, or elsewhere."""
    logits = make(3, heads[0], 33, dtype=dtype)
    logits[:, :, ::4] = -torch.inf
    logits[1] = -torch.inf
    lse = logits.logsumexp(-1) + 0.2
    statistics = [
        make(3, heads[1], 40, dtype=dtype, seed=s)[:, :, :33] if p in parts else None for s, p in enumerate("sr")
    ]
    expected = [None if x is None else x.clone() for x in statistics]
    newest = torch.tensor([[32], [5], [-1]])
    options = dict(newest=newest - torch.arange(heads[1]) * 3 if apart else newest, rate_window=8)
    options["present"] = torch.tensor([False, True, True]) if absent else None
    update_scores(logits, lse, *statistics, **options)
    naive_update_scores(logits, lse, *expected, **options)
    for got, want in zip(statistics, expected, strict=True):
        if got is not None:
            assert_near(got, want, dtype)


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
    whole = torch.zeros(1, 2, 50, dtype=torch.float64)
    out, lse, logits = decode_with_logits(q, k, v, 0.3)
    update_scores(logits, lse, whole)
    parts = [decode_with_logits(q, k[:, :, a:b], v[:, :, a:b], 0.3) for a, b in ((0, 20), (20, 20), (20, 50))]
    merged, merged_lse = merge_partials([part[0] for part in parts], [part[1] for part in parts])
    shards = [torch.zeros(1, 2, part[2].shape[2], dtype=torch.float64) for part in parts]
    for part, shard in zip(parts, shards, strict=True):
        update_scores(part[2], merged_lse, shard)
    torch.testing.assert_close(merged, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat(shards, 2), whole, atol=1e-12, rtol=0)


def test_errors():
    logits, lse, scores = make(2, 4, 9), make(2, 4), make(2, 2, 9)
    with pytest.raises(ValueError, match="scores, rates or both"):
        update_scores(logits, lse)
    with pytest.raises(ValueError, match=r"scores \(2, 2, 8\).*\(2, 4, 9\)"):
        update_scores(logits, lse, scores[:, :, :8])
    with pytest.raises(ValueError, match="newest, one slot for each of 2 rows and KV heads, not None"):
        update_scores(logits, lse, rates=scores)
    for newest in (torch.tensor([3, 4]), torch.tensor([[3, 4, 5]] * 2), torch.tensor([[3]])):
        with pytest.raises(ValueError, match=r"newest, one slot for each of 2 rows and KV heads, not \("):
            update_scores(logits, lse, rates=scores, newest=newest)
    with pytest.raises(ValueError, match=r"lse \(2, 3\).*\(2, 4, 9\)"):
        slot_probabilities(logits, lse[:, :3], 2)
    with pytest.raises(ValueError, match=r"\(4\).*\(3\)"):
        slot_probabilities(logits, lse, 3)
