import pytest
import torch

from d2o_dist.kernels.prefill_attention import cross_attention, naive_prefill_attention, prefill_attention
from d2o_dist.kernels.prefill_attention.cpu import cpu_prefill_attention
from d2o_dist.kernels.prefill_attention.torch_blocked import blocked_cross_attention, blocked_prefill_attention
from tests.kernels.helpers import DTYPE_IDS, DTYPES, HEADS, HEADS_IDS, assert_near, make

PATHS = {"cpu": cpu_prefill_attention, "blocked": blocked_prefill_attention}


def inputs(heads, q_start, tq, dtype, dim=16, batch=2):
    q = make(batch, heads[0], tq, dim, dtype=dtype)
    k, v = (make(batch, heads[1], q_start + tq, dim, dtype=dtype, seed=s) for s in (1, 2))
    return q, k, v


def check(path, q, k, v, **kwargs):
    out, lse = path(q, k, v, 0.3, **kwargs)
    expected, expected_lse = naive_prefill_attention(q.double(), k.double(), v.double(), 0.3, **kwargs)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_near(out, expected, q.dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-4 if q.dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("heads", HEADS, ids=HEADS_IDS)
@pytest.mark.parametrize("tq", [1, 7, 33, 130])
@pytest.mark.parametrize("q_start", [0, 1, 45], ids=["whole", "after1", "after45"])
def test_equals_naive(path, dtype, heads, tq, q_start):
    check(path, *inputs(heads, q_start, tq, dtype), q_start=q_start, window=None)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("q_start", [0, 45], ids=["whole", "chunk"])
@pytest.mark.parametrize("window", [1, 5, 50, 129])
def test_window_equals_naive(path, dtype, q_start, window):
    check(path, *inputs((8, 2), q_start, 300, dtype, batch=1), q_start=q_start, window=window)


def test_window_with_key_blocks_that_a_row_cannot_see():
    """The kernel walks keys in blocks of 512; late rows of a query block see none of the first one."""
    check(cpu_prefill_attention, *inputs((2, 1), 0, 1900, torch.float32, batch=1), q_start=0, window=700)


def test_window_longer_than_the_text_is_no_window():
    q, k, v = inputs((4, 2), 10, 33, torch.float64)
    for window in (43, 44, 10_000):
        out, lse = prefill_attention(q, k, v, 0.3, q_start=10, window=window)
        assert all(map(torch.equal, (out, lse), prefill_attention(q, k, v, 0.3, q_start=10)))


@pytest.mark.parametrize("chunks", [(1, 129), (60, 70), (33, 33, 64)], ids=str)
def test_chunks_equal_the_whole(chunks):
    q, k, v = inputs((8, 2), 0, 130, torch.float64)
    whole, whole_lse = prefill_attention(q, k, v, 0.3)
    outs, lses, start = [], [], 0
    for size in chunks:
        end = start + size
        out, lse = prefill_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], 0.3, q_start=start)
        outs.append(out), lses.append(lse)
        start = end
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat(lses, 2), whole_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_no_queries(path):
    out, lse = path(*inputs((4, 2), 5, 0, torch.float32), 0.3, q_start=5, window=None)
    assert out.shape == (2, 4, 0, 16) and lse.shape == (2, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("tq, q_start", [(1, 0), (33, 0), (40, 21)])
def test_bias(dtype, window, tq, q_start):
    q, k, v = inputs((8, 2), q_start, tq, dtype)
    bias = make(2, 2, q_start + tq, seed=4).float()
    check(prefill_attention, q, k, v, q_start=q_start, window=window, bias=bias)


@pytest.mark.parametrize("path", [prefill_attention, *PATHS.values()], ids=["by device", *PATHS])
@pytest.mark.parametrize("q_start", [0, 3, 20])
def test_keys_of_no_mass_are_not_seen(path, q_start):
    q, k, v = inputs((8, 2), q_start, 33, torch.float64)
    bias = make(2, 2, q_start + 33, seed=4)
    bias[:, :, :5], bias[:, :, ::3], bias[1, 0, :q_start] = -torch.inf, -torch.inf, -torch.inf
    expected, expected_lse = naive_prefill_attention(q, k, v, 0.3, q_start=q_start, bias=bias)
    k[:, :, :5], v[:, :, ::3] = torch.nan, torch.nan
    out, lse = path(q, k, v, 0.3, q_start=q_start, window=None, bias=bias)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    blind = max(0, 5 - q_start)
    assert not out[:, :, :blind].any() and bool((lse[:, :, :blind] == -torch.inf).all())


def test_a_biased_prompt_has_a_gradient():
    q, k, v = (x.requires_grad_() for x in inputs((4, 2), 9, 33, torch.float64))
    bias = make(2, 2, 42, seed=4)

    def loss(attend):
        out, lse = attend(q, k, v, 0.3, q_start=9, bias=bias)
        return out.sin().sum() + lse.cos().sum()

    grads = torch.autograd.grad(loss(prefill_attention), (q, k, v))
    for grad, reference in zip(grads, torch.autograd.grad(loss(naive_prefill_attention), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-12, rtol=0)


def test_transposed_inputs():
    """As models make them: [B, T, H, D] seen as [B, H, T, D]."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((8, 2), 9, 33, torch.float64))
    check(prefill_attention, q, k, v, q_start=9)


def test_gradient_flows_through_out():
    q, k, v = (x.requires_grad_() for x in inputs((4, 2), 0, 33, torch.float64))
    grads = torch.autograd.grad(prefill_attention(q, k, v, 0.3)[0].sin().sum(), (q, k, v))
    expected = torch.autograd.grad(naive_prefill_attention(q, k, v, 0.3)[0].sin().sum(), (q, k, v))
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-12, rtol=0)


def test_a_chunk_refuses_to_lose_its_gradient():
    q, k, v = (x.requires_grad_() for x in inputs((4, 2), 3, 5, torch.float32))
    with pytest.raises(RuntimeError, match="q_start=3"):
        prefill_attention(q, k, v, 0.3, q_start=3)


def test_errors_name_both_numbers():
    q, k, v = inputs((4, 2), 3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"\(8\).*\(5\)"):
        prefill_attention(q, k, v, 0.3)
    with pytest.raises(ValueError, match=r"\(3\).*\(2\)"):
        prefill_attention(q[:, :3], k, v, 0.3, q_start=3)
    with pytest.raises(ValueError, match=r"bias \(2, 2, 7\).*\(2, 2, 8\)"):
        prefill_attention(q, k, v, 0.3, q_start=3, bias=torch.zeros(2, 2, 7))


@pytest.mark.parametrize("path", [cross_attention, blocked_cross_attention], ids=["by device", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "tq", "tk"), [((4, 2), 7, 33), ((6, 2), 130, 1), ((3, 3), 1, 200)], ids=str)
def test_cross_attention(path, dtype, heads, tq, tk):
    """Every query over every key: the last rows of a causal attention whose queries come after all keys."""
    generator = torch.Generator().manual_seed(tq)
    q, k, v = (
        torch.randn(2, count, length, 16, generator=generator, dtype=torch.float32).to(dtype)
        for count, length in ((heads[0], tq), (heads[1], tk), (heads[1], tk))
    )
    out, lse = path(q, k, v, 0.3)
    group = heads[0] // heads[1]
    logits = q.double() @ k.double().repeat_interleave(group, 1).mT * 0.3
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    wanted = logits.softmax(-1) @ v.double().repeat_interleave(group, 1)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"number of keys \(0\) must be at least 1"):
        cross_attention(q, k[:, :, :0], v[:, :, :0], 0.3)
    # With a bias; keys of no mass are not seen, whatever they hold.
    bias = make(2, heads[1], tk, seed=4).float()
    bias[:, :, 1::3] = -torch.inf
    bias[1, 0] = -torch.inf
    k[:, :, 1::3], v[:, :, 1::3] = torch.nan, torch.nan
    out, lse = path(q, k, v, 0.3, bias=bias)
    clean = [x.double().nan_to_num().repeat_interleave(group, 1) for x in (k, v)]
    logits = q.double() @ clean[0].mT * 0.3 + bias.double().repeat_interleave(group, 1).unsqueeze(2)
    wanted = logits.softmax(-1).nan_to_num() @ clean[1]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=tolerance, atol=tolerance)
    assert not out[1, :group].any() and bool((lse[1, :group] == -torch.inf).all())
    with pytest.raises(ValueError, match=rf"bias \(2, {heads[1]}, {tk + 1}\).*\(2, {heads[1]}, {tk}\)"):
        cross_attention(q, k, v, 0.3, bias=torch.zeros(2, heads[1], tk + 1))
