"""Causal attention over a prompt, with the lse of every query; the prompt may come in chunks, and windows may slide."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, check_bias, check_queries_keys, wants_grad
from d2o_dist.kernels.flash_attn import flash_attn
from d2o_dist.kernels.prefill_attention.cpu import cpu_cross_attention, cpu_prefill_attention
from d2o_dist.kernels.prefill_attention.cuda import CudaFlash, cuda_cross_attention, cuda_prefill_attention
from d2o_dist.kernels.prefill_attention.naive import naive_prefill_attention
from d2o_dist.kernels.prefill_attention.torch_blocked import blocked_cross_attention, blocked_prefill_attention
from d2o_dist.kernels.registry import HALF, Op, Torch, Triton

__all__ = ["cross_attention", "naive_prefill_attention", "prefill_attention"]

# What flash kernels cannot do: bounded logits, values of another head dim than keys.
_PLAIN = {"softcap", "two_dims"}
# In float32 cuBLAS is what serves a prompt on CUDA, not the Triton kernel.
_PREFILL = Op(
    "prefill_attention",
    *flash_attn(causal=True),
    CudaFlash(cuda_prefill_attention, without={"bias", "window", *_PLAIN}),
    Triton("prefill_attention.triton:triton_prefill_attention", dtypes=HALF, without=_PLAIN),
    Torch(cpu_prefill_attention, devices=("cpu",), without={"bias", *_PLAIN}),
    Torch(cpu_prefill_attention, devices=("cpu",), without={"window", *_PLAIN}, gradient=False),
    Torch(blocked_prefill_attention),
)
_CROSS = Op(
    "cross_attention",
    *flash_attn(causal=False),
    CudaFlash(cuda_cross_attention, without={"bias", *_PLAIN}),
    Triton("prefill_attention.triton:triton_cross_attention", dtypes=HALF, needs={"bias"}, without=_PLAIN),
    Torch(cpu_cross_attention, devices=("cpu",), without=_PLAIN),
    Torch(blocked_cross_attention),
)


def _traits(k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None) -> dict[str, bool]:
    return {"bias": bias is not None, "softcap": softcap is not None, "two_dims": k.shape[3] != v.shape[3]}


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    window: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query i over the keys j <= q_start + i; with `window`, also j > q_start + i - window.

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] with Tk == q_start + Tq (keys are indices 0..Tk-1); one
    dtype. Returns (out [B, Hq, Tq, Dv] in q.dtype, lse [B, Hq, Tq] acc dtype, the log of sum exp(scaled logits)).

    bias [B, Hkv, Tk] is added to the logits of a key (log_mass); keys whose bias is -inf are not seen, whatever they
    hold. A query that sees no key: out 0, lse -inf. softcap bounds the scaled products before the bias is added.

    On the flash paths `lse` carries no gradient, so a chunked prompt (q_start > 0) whose merge would need it refuses
    inputs that require grad.
    """
    check_queries_keys(q, k, v)
    if k.shape[2] != q_start + q.shape[2]:
        expected = q_start + q.shape[2]
        raise ValueError(f"number of keys ({k.shape[2]}) must equal q_start + number of queries ({expected})")
    if window is not None and window < 1:
        raise ValueError(f"window ({window}) must be at least 1")
    if window is not None and window >= k.shape[2]:
        window = None  # it hides nothing
    check_bias(k, bias)
    path = _PREFILL.pick(q, k, v, window=window is not None, **_traits(k, v, bias, softcap))
    if wants_grad(q, k, v) and q_start > 0 and window is None and path is not blocked_prefill_attention:
        raise RuntimeError(f"a chunked prompt (q_start={q_start}) has no gradient: the flash kernels' lse carries none")
    return path(q, k, v, scale, q_start=q_start, window=window, bias=bias, softcap=softcap)


@torch.no_grad()
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query over every key: keys that lie before all of the queries, on another rank, say.

    q [B, Hq, Tq, D]; k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], Tk >= 1; one dtype; bias [B, Hkv, Tk] and softcap as in
    `prefill_attention`. Returns (out [B, Hq, Tq, Dv] in q.dtype, lse [B, Hq, Tq] acc dtype), for `merge_partials` with
    other parts. No gradient.
    """
    check_queries_keys(q, k, v)
    check_bias(k, bias)
    if k.shape[2] == 0:
        raise ValueError("number of keys (0) must be at least 1")
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    path = _CROSS.pick(q, k, v, **_traits(k, v, bias, softcap))
    return path(q, k, v, scale, bias=bias, softcap=softcap)
