"""CUDA, fp16 and bf16: PyTorch's flash kernel, which returns the lse and takes GQA as it is. Not run in CI (no GPU)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from d2o_dist.kernels.lse import merge_partials
from d2o_dist.kernels.registry import FROM_AMPERE, HALF, HEAD_DIMS, Torch

# What the kernel serves.
CudaFlash = partial(
    Torch, devices=("cuda",), dtypes=HALF, head_dims=HEAD_DIMS, capabilities=FROM_AMPERE, empty=False
)  # fmt: skip


def cuda_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, window: None, bias: None, softcap: None
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`."""
    out, lse = _flash(q, k[:, :, q_start:], v[:, :, q_start:], scale, causal=True)
    if q_start > 0:
        past_out, past_lse = _flash(q, k[:, :, :q_start], v[:, :, :q_start], scale, causal=False)
        out, lse = merge_partials([past_out, out], [past_lse, lse])
    return out, lse.contiguous()


def cuda_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: None, softcap: None
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`."""
    out, lse = _flash(q, k, v, scale, causal=False)
    return out, lse.contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    head_dim, num_queries = q.shape[3], q.shape[2]
    padding = -head_dim % 8  # the kernel wants a multiple of 8; zero columns change no logit
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return result[0][..., :head_dim], result[1][..., :num_queries]
