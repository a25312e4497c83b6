"""CUDA, fp16 and bf16: PyTorch's flash kernel, which returns the lse and takes GQA as it is. Not run in CI (no GPU)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2o_dist.kernels.backend import has_kernels
from d2o_dist.kernels.lse import merge_partials

MAX_HEAD_DIM = 256  # the kernel's own limit


def cuda_supports(q: Tensor, window: int | None) -> bool:
    """Whether `cuda_prefill_attention` takes these inputs; what it does not take goes to the blocked torch path."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    fits = half and window is None and q.shape[3] <= MAX_HEAD_DIM and q.numel() > 0
    return q.device.type == "cuda" and fits and has_kernels(q.device)


def cuda_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, window: None = None
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`, for inputs that `cuda_supports`."""
    out, lse = _flash(q, k[:, :, q_start:], v[:, :, q_start:], scale, causal=True)
    if q_start > 0:
        past_out, past_lse = _flash(q, k[:, :, :q_start], v[:, :, :q_start], scale, causal=False)
        out, lse = merge_partials([past_out, out], [past_lse, lse])
    return out, lse.contiguous()


def cuda_cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `cross_attention`, for inputs that `cuda_supports`."""
    out, lse = _flash(q, k, v, scale, causal=False)
    return out, lse.contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    head_dim, num_queries = q.shape[3], q.shape[2]
    padding = -head_dim % 8  # the kernel wants a multiple of 8; zero columns change no logit
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return result[0][..., :head_dim], result[1][..., :num_queries]
