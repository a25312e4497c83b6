"""Column peaks on CUDA: one program a block of keys of one KV head. It holds its keys and walks their queries.

The G query heads of a block of queries are added up in a tile, whose maximum over the queries is taken before the next
block. Keys are read once for all heads of the group; no atomics. FLOPs: 2 D for each visible pair and query head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, group_size
from d2o_dist.kernels.launch import Tile, launch, matmul_constants, padded_dim, rows_contiguous


def plan_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """rows: keys of a program; cols: queries of a step. No registers spill on sm_80 and sm_90."""
    wide = padded_dim(head_dim)
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)  # with two stages, or with four warps, some spill
    return Tile(64, 64, 8, 2) if wide > 128 else Tile(128, 64, 8, 3)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "shift"])
def _column_peaks_kernel(
    q_ptr, k_ptr, lse_ptr, bias_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, lse_stride_b, lse_stride_h, lse_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_t,
    num_kv_heads, num_queries, num_keys, shift, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query i sees key j if j <= i + shift (causal)."""
    first_key = tl.program_id(0) * BLOCK_N
    row = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_M)
    k = tl.load(
        k_ptr + row * k_stride_b + kv_head * k_stride_h + keys.to(tl.int64)[:, None] * k_stride_t + dims[None, :],
        mask=(keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        k = k.to(tl.float32)
    row_bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias_base = bias_ptr + row * bias_stride_b + kv_head * bias_stride_h
        row_bias = tl.load(bias_base + keys.to(tl.int64) * bias_stride_t, mask=keys < num_keys, other=0.0)
        row_bias = row_bias.to(tl.float32) * 1.4426950408889634
    begin = num_queries * 0
    if CAUSAL:
        begin = tl.maximum(first_key - shift, 0)
    peaks = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, num_queries, BLOCK_M):
        first = start  # a tensor also when interpreted
        rows = first + offsets
        inside = rows < num_queries
        received = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        # Not unrolled: each copy would hold buffers of its own.
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_base = q_ptr + row * q_stride_b + head * q_stride_h + first.to(tl.int64) * q_stride_t
            q = tl.load(
                q_base + offsets[None, :] * q_stride_t + dims[:, None],
                mask=inside[None, :] & (dims[:, None] < HEAD_DIM),
                other=0.0,
            )
            lse_base = lse_ptr + row * lse_stride_b + head * lse_stride_h + first.to(tl.int64) * lse_stride_t
            lse = tl.load(lse_base + offsets * lse_stride_t, mask=inside, other=float("inf"))
            if UPCAST:
                q = q.to(tl.float32)
            logits = tl.dot(k, q, input_precision=PRECISION) * scale_log2 - (lse * 1.4426950408889634)[None, :]
            if HAS_BIAS:
                logits += row_bias[:, None]
            # `where` and not a product: dead rows may hold NaN.
            received += tl.where((tl.abs(lse) < float("inf"))[None, :], tl.exp2(logits), 0.0)
        if CAUSAL:
            received = tl.where(keys[:, None] <= (rows + shift)[None, :], received, 0.0)
        peaks = tl.maximum(peaks, tl.max(received, 1))
    if HAS_BIAS:
        peaks = tl.where(row_bias == float("-inf"), 0.0, peaks)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * num_keys + keys, peaks, mask=keys < num_keys)


@torch.no_grad()
def triton_column_peaks(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, *, q_start: int, bias: Tensor | None, causal: bool,
    softcap: None = None,
) -> Tensor:
    """As `blocked_column_peaks`. float32, bfloat16 or float16; D <= 256."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    peaks = torch.empty(batch, num_kv_heads, num_keys, dtype=torch.float32, device=q.device)
    tile = plan_tile(q.dtype, head_dim)
    bias_strides = (0, 0, 0) if bias is None else bias.stride()
    launch(
        _column_peaks_kernel,
        (triton.cdiv(num_keys, tile.rows), batch * num_kv_heads),
        q, k, lse, bias, peaks, *q.stride()[:3], *k.stride()[:3], *lse.stride(), *bias_strides,
        num_kv_heads, num_queries, num_keys, q_start, scale * LOG2_E,
        tile=tile,
        GROUP=group_size(num_heads, num_kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_N=tile.rows,
        BLOCK_M=tile.cols,
        CAUSAL=causal,
        HAS_BIAS=bias is not None,
        **matmul_constants(q.dtype),
    )  # fmt: skip
    return peaks
