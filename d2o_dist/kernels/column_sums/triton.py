"""Column sums on CUDA: one program a block of keys. It holds its keys and walks the queries that see them.

Every key belongs to one program, so sums need no atomics and come out the same in every run. Blocks of queries before
the diagonal are never visited. Bytes: each block reads the queries behind it once (from L2, mostly), keys once.
FLOPs: 2 D for each visible pair, half of what the forward spends. Probabilities are added up in a tile of their own,
one addition an element, and over queries only at the end.
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
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 8, 2) if wide > 128 else Tile(128, 64, 8, 3)


@triton.jit
def _add_queries(
    total, k, q_base, lse_base, row_bias, keys, begin, end, num_queries, q_stride, lse_stride, step, shift, window,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_M] plus the probabilities of queries [begin, end); MASKED: some keys are hidden."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_M):
        first = start  # a tensor also when interpreted
        offsets = tl.arange(0, BLOCK_M)
        rows = first + offsets
        inside = rows < num_queries
        q = tl.load(
            q_base + first.to(tl.int64) * q_stride + offsets[None, :] * q_stride + dims[:, None],
            mask=inside[None, :] & (dims[:, None] < HEAD_DIM),
            other=0.0,
        )
        lse_block = lse_base + first.to(tl.int64) * lse_stride + offsets * lse_stride
        lse = tl.load(lse_block, mask=inside, other=float("inf"))
        live = tl.abs(lse) < float("inf")
        if UPCAST:
            q = q.to(tl.float32)
        logits = tl.dot(k, q, input_precision=PRECISION) * scale_log2 - (lse * 1.4426950408889634)[None, :]
        if HAS_BIAS:
            logits += row_bias[:, None]
        seen = live[None, :]
        if MASKED:
            index = rows * step + shift
            if CAUSAL:
                seen = seen & (keys[:, None] <= index[None, :])
            if HAS_WINDOW:
                seen = seen & (keys[:, None] > index[None, :] - window)
        # `where` and not a product: dead rows may hold NaN.
        total += tl.where(seen, tl.exp2(logits), 0.0)
    return total


@triton.jit(do_not_specialize=["num_queries", "num_keys", "step", "shift", "window"])
def _column_sums_kernel(
    q_ptr, k_ptr, lse_ptr, bias_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, lse_stride_b, lse_stride_h, lse_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_t,
    num_heads, num_queries, num_keys, step, shift, window, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query i sees key j if j <= i * step + shift (causal), and j > i * step + shift - window."""
    first_key = tl.program_id(0) * BLOCK_N
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    kv_head = head // GROUP
    keys = first_key + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
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
    last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
    end = num_queries
    begin = end * 0
    all_seen = begin
    if CAUSAL:
        begin = (tl.maximum(first_key - shift, 0) + step - 1) // step
        all_seen = (tl.maximum(last_key - shift, 0) + step - 1) // step
    if HAS_WINDOW:
        end = tl.minimum(end, (tl.maximum(last_key + window - shift, 0) + step - 1) // step)
        all_seen = end
    all_seen = tl.minimum(tl.maximum(all_seen, begin), end)
    middle = begin + (all_seen - begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    q_base = q_ptr + row * q_stride_b + head * q_stride_h
    lse_base = lse_ptr + row * lse_stride_b + head * lse_stride_h
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if CAUSAL:
        total = _add_queries(
            total, k, q_base, lse_base, row_bias, keys, begin, tl.minimum(middle, end), num_queries, q_stride_t,
            lse_stride_t, step, shift, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, HAS_WINDOW, HAS_BIAS,
            True, UPCAST, PRECISION,
        )  # fmt: skip
    total = _add_queries(
        total, k, q_base, lse_base, row_bias, keys, middle, end, num_queries, q_stride_t, lse_stride_t, step, shift,
        window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, HAS_WINDOW, HAS_BIAS, False, UPCAST, PRECISION,
    )  # fmt: skip
    sums = tl.sum(total, 1)
    if HAS_BIAS:
        sums = tl.where(row_bias == float("-inf"), 0.0, sums)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * num_keys + keys, sums, mask=keys < num_keys)


@torch.no_grad()
def triton_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    *,
    q_start: int,
    k_start: int,
    q_step: int,
    bias: Tensor | None,
    softcap: None = None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """As `blocked_column_sums`; query i has index q_start + i * q_step. float32, bfloat16 or float16; D <= 256."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    batch, num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    sums = torch.empty(batch, num_heads, num_keys, dtype=torch.float32, device=q.device)
    tile = plan_tile(q.dtype, head_dim)
    bias_strides = (0, 0, 0) if bias is None else bias.stride()
    launch(
        _column_sums_kernel,
        (triton.cdiv(num_keys, tile.rows), batch * num_heads),
        q, k, lse, bias, sums, *q.stride()[:3], *k.stride()[:3], *lse.stride(), *bias_strides,
        num_heads, num_queries, num_keys, q_step, q_start - k_start, window or 0, scale * LOG2_E,
        tile=tile,
        GROUP=group_size(num_heads, k.shape[1]),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_N=tile.rows,
        BLOCK_M=tile.cols,
        CAUSAL=causal,
        HAS_WINDOW=window is not None,
        HAS_BIAS=bias is not None,
        **matmul_constants(q.dtype),
    )  # fmt: skip
    return sums
