import pytest
import torch

from d2o_dist.kernels.decode_attention import decode_attention, naive_decode_attention, torch_blocked
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make


def inputs(heads, slots, dtype, dim=16, batch=2):
    q = make(batch, heads[0], dim, dtype=dtype)
    k, v = (make(batch, heads[1], slots, dim, dtype=dtype, seed=s) for s in (1, 2))
    return q, k, v


def check(q, k, v, **kwargs):
    actual = decode_attention(q, k, v, 0.3, **kwargs)
    clean = [x.double().nan_to_num(0.0) for x in (q, k, v)]
    expected = naive_decode_attention(*clean, 0.3, **kwargs)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32  # logits are never rounded to bf16
    assert actual[0].dtype == q.dtype and actual[1].dtype == actual[2].dtype == exact
    for got, want, dtype in zip(actual, expected, (q.dtype, exact, exact), strict=True):
        assert_near(got, want, dtype)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("slots", [1, 7, 33, 130])
@pytest.mark.parametrize("mass", [False, True], ids=["plain", "log_mass"])
def test_equals_naive(dtype, heads, slots, mass):
    log_mass = make(2, heads[1], slots, seed=4).float() if mass else None
    _, _, probs = check(*inputs(heads, slots, dtype), log_mass=log_mass)
    torch.testing.assert_close(probs.sum(-1), torch.full_like(probs[..., 0], heads[0] / heads[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("per_head", [False, True], ids=["row", "head"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_invalid_slots_may_hold_anything(dtype, per_head, poison):
    q, k, v = inputs((8, 2), 33, dtype)
    valid = make(2, 2, 33, seed=5) > 0
    valid = valid if per_head else valid[:, 0]
    per_slot = valid if per_head else valid.unsqueeze(1).expand(2, 2, 33)
    k, v = (x.masked_fill(~per_slot.unsqueeze(-1), poison) for x in (k, v))
    log_mass = make(2, 2, 33, seed=6).masked_fill(~per_slot, poison)
    _, _, probs = check(q, k, v, valid=valid, log_mass=log_mass)
    assert not probs[~per_slot].any()


def test_rows_without_a_valid_slot():
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1] = False
    out, lse, probs = check(*inputs((4, 2), 7, torch.float32), valid=valid)
    assert not out[1].any() and not probs[1].any() and bool((lse[1] == -torch.inf).all())


def test_no_slots():
    out, lse, probs = decode_attention(*inputs((4, 2), 0, torch.float32), 0.3)
    assert not out.any() and bool((lse == -torch.inf).all()) and probs.shape == (2, 2, 0)


def test_bf16_is_converted_by_blocks(monkeypatch):
    monkeypatch.setattr(torch_blocked, "CONVERTED_ELEMENTS", 700)
    check(*inputs((8, 2), 33, torch.bfloat16), valid=make(2, 33, seed=5) > 0)


def test_differentiable():
    q, k, v = (x.requires_grad_() for x in inputs((4, 2), 5, torch.float64, dim=4, batch=1))
    valid = torch.tensor([[True, False, True, True, True]])
    assert torch.autograd.gradcheck(lambda *x: decode_attention(*x, 0.3, valid=valid), (q, k, v))


def test_errors_name_both_shapes():
    q, k, v = inputs((4, 2), 7, torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 2, 7, 16\)"):
        decode_attention(q, k, v, 0.3, valid=torch.ones(2, 6, dtype=torch.bool))
