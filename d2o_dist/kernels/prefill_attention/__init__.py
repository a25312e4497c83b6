"""Causal attention over a prompt, with the lse of every query; the prompt may come in chunks, and windows may slide."""

import torch
from torch import Tensor

from d2o_dist.kernels.backend import get_backend, takes_triton, wants_grad
from d2o_dist.kernels.common import acc_dtype, check_bias, check_queries_keys
from d2o_dist.kernels.flash_attn import flash_attention_for
from d2o_dist.kernels.prefill_attention.cpu import cpu_cross_attention, cpu_prefill_attention
from d2o_dist.kernels.prefill_attention.cuda import cuda_cross_attention, cuda_prefill_attention, cuda_supports
from d2o_dist.kernels.prefill_attention.naive import naive_prefill_attention
from d2o_dist.kernels.prefill_attention.torch_blocked import blocked_cross_attention, blocked_prefill_attention

__all__ = ["cross_attention", "naive_prefill_attention", "prefill_attention"]


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    q_start: int = 0,
    window: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query i over the keys j <= q_start + i; with `window`, also j > q_start + i - window.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D] with Tk == q_start + Tq (keys are indices 0..Tk-1); one dtype.
    Returns (out [B, Hq, Tq, D] in q.dtype, lse [B, Hq, Tq] acc dtype, the natural log of sum exp(scaled logits)).

    bias [B, Hkv, Tk] is added to the logits of a key (log_mass); keys whose bias is -inf are not seen, whatever they
    hold. A query that sees no key: out 0, lse -inf.

    The path follows from device, dtype and what is installed. CPU: PyTorch's flash kernel, bias or not; CUDA fp16/bf16
    without bias: flash-attn if installed, else PyTorch's flash kernel, or with a window that hides something a Triton
    kernel; CUDA fp16/bf16 with bias: the Triton kernel; everything else, and a bias together with a gradient or (CPU) a
    window: a blocked torch path. `lse` carries no gradient on the flash paths, so a chunked prompt (q_start > 0) whose
    merge would need it refuses inputs that require grad.
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
    package = flash_attention_for(q, k, v) if bias is None else None
    if package is not None:
        return package.attend(q, k, v, scale, causal=True, window=window)
    if _prefers_triton(q, k, v, window, bias):
        from d2o_dist.kernels.prefill_attention.triton import triton_prefill_attention

        return triton_prefill_attention(q, k, v, scale, q_start=q_start, window=window, bias=bias)
    if bias is not None:
        if q.device.type == "cpu" and window is None and not wants_grad(q, k, v):
            return cpu_prefill_attention(q, k, v, scale, q_start=q_start, window=None, bias=bias)
        return blocked_prefill_attention(q, k, v, scale, q_start=q_start, window=window, bias=bias)
    if q.device.type == "cpu":
        path = cpu_prefill_attention
    elif cuda_supports(q, window):
        path = cuda_prefill_attention
    else:
        path = blocked_prefill_attention
    if wants_grad(q, k, v) and q_start > 0 and window is None and path is not blocked_prefill_attention:
        raise RuntimeError(f"a chunked prompt (q_start={q_start}) has no gradient: the flash kernels' lse carries none")
    return path(q, k, v, scale, q_start=q_start, window=window)


@torch.no_grad()
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every query over every key: keys that lie before all of the queries, on another rank, say.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D], Tk >= 1; one dtype; bias [B, Hkv, Tk] as in `prefill_attention`. Returns
    (out [B, Hq, Tq, D] in q.dtype, lse [B, Hq, Tq] acc dtype), to be merged with other parts by `merge_partials`. CPU,
    and CUDA fp16/bf16 without bias: PyTorch's flash kernel (CUDA: flash-attn if installed); CUDA fp16/bf16 with bias: a
    Triton kernel; everything else: a blocked torch path. No gradient.
    """
    check_queries_keys(q, k, v)
    check_bias(k, bias)
    if k.shape[2] == 0:
        raise ValueError("number of keys (0) must be at least 1")
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    if bias is not None:
        if _prefers_triton(q, k, v, None, bias):
            from d2o_dist.kernels.prefill_attention.triton import triton_prefill_attention

            # As if all queries came after all keys.
            return triton_prefill_attention(q, k, v, scale, q_start=k.shape[2] - 1, window=None, bias=bias)
        path = cpu_cross_attention if q.device.type == "cpu" else blocked_cross_attention
        return path(q, k, v, scale, bias=bias)
    package = flash_attention_for(q, k, v)
    if package is not None:
        return package.attend(q, k, v, scale, causal=False)
    if q.device.type == "cpu":
        return cpu_cross_attention(q, k, v, scale)
    return (cuda_cross_attention if cuda_supports(q, None) else blocked_cross_attention)(q, k, v, scale)


def _prefers_triton(q: Tensor, k: Tensor, v: Tensor, window: int | None, bias: Tensor | None) -> bool:
    """In half precision, where PyTorch's flash kernel cannot, or where it was asked for. float32 goes to cuBLAS."""
    if not takes_triton(q, k, v, head_dim=q.shape[3]) or q.numel() == 0 or q.dtype == torch.float32:
        return False
    return get_backend() == "triton" or bias is not None or not cuda_supports(q, window)
