"""Causal attention on CUDA with the lse of every query: any offset, a sliding window, a bias for each key.

One program a block of queries. Softmax runs online over blocks of keys; only blocks that meet the diagonal or the edge
of the window look at masks. FLOPs: 4 D for each visible pair. What PyTorch's flash kernel cannot do is done here in
one pass: chunks of a prompt, windows, biases (merged slots that stand for several tokens), float32 without rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, group_size
from d2o_dist.kernels.launch import Tile, capability, launch, matmul_constants, padded_dim, rows_contiguous


def plan_tile(dtype: torch.dtype, head_dim: int, capability: int) -> Tile:
    """rows: queries of a program; cols: keys of a step. In half precision no registers spill on sm_80 and sm_90."""
    wide = padded_dim(head_dim)
    if dtype == torch.float32:
        return Tile(16, 16, 4, 2) if wide > 128 else Tile(64, 16, 8, 2)
    if wide > 128:
        return Tile(64, 64, 8, 2)
    # Tensor cores before 9.0 take both operands from registers: large blocks would spill.
    return Tile(128, 64, 8, 3) if capability >= 90 or wide <= 64 else Tile(64, 64, 4, 3)


@triton.jit
def _attend_keys(
    acc, peak, total, q, k_base, v_base, bias_base, index, begin, end, num_keys, k_stride, v_stride, bias_stride,
    window, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [begin, end): acc [BLOCK_M, BLOCK_D], peak and total [BLOCK_M], in units of log2."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        first = start  # a tensor also when interpreted
        offsets = tl.arange(0, BLOCK_N)
        keys = first + offsets
        usable = keys < num_keys
        if HAS_BIAS:
            bias = tl.load(bias_base + first.to(tl.int64) * bias_stride + offsets * bias_stride, mask=usable,
                           other=float("-inf")).to(tl.float32)  # fmt: skip
            usable = bias > float("-inf")
        k = tl.load(
            k_base + first.to(tl.int64) * k_stride + offsets[None, :] * k_stride + dims[:, None],
            mask=usable[None, :] & (dims[:, None] < HEAD_DIM),
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        if HAS_BIAS:
            logits += bias[None, :] * 1.4426950408889634
        if MASKED:
            seen = (keys[None, :] <= index[:, None]) & (keys < num_keys)[None, :]
            if HAS_WINDOW:
                seen = seen & (keys[None, :] > index[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(probs, 1)
        v = tl.load(
            v_base + first.to(tl.int64) * v_stride + offsets[:, None] * v_stride + dims[None, :],
            mask=usable[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
        if UPCAST:
            v = v.to(tl.float32)
        acc = acc * shrink[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["num_queries", "num_keys", "q_start", "window"])
def _prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_t, out_stride_b, out_stride_h, out_stride_t,
    num_heads, num_queries, num_keys, q_start, window, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query i sees key j if j <= q_start + i, and j > q_start + i - window."""
    # The last queries see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    kv_head = head // GROUP
    first_query = block * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)
    index = queries + q_start
    dims = tl.arange(0, BLOCK_D)
    inside = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = q_ptr + row * q_stride_b + head * q_stride_h + queries.to(tl.int64)[:, None] * q_stride_t
    q = tl.load(q_rows + dims[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + row * k_stride_b + kv_head * k_stride_h
    v_base = v_ptr + row * v_stride_b + kv_head * v_stride_h
    bias_base = bias_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + row * bias_stride_b + kv_head * bias_stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Keys [0, open_end) are seen by every query of the block, unless a window hides the first of them.
    open_end = tl.minimum(first_query + q_start + 1, num_keys) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_query + BLOCK_M + q_start, num_keys)
    if HAS_WINDOW:
        begin = tl.maximum(first_query + q_start - window + 1, 0) // BLOCK_N * BLOCK_N
        # From here on no query's window hides anything.
        whole = tl.maximum(first_query + BLOCK_M - 1 + q_start - window + 1, 0)
        open_begin = tl.minimum((whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
        open_begin = tl.maximum(open_begin, begin)
        acc, peak, total = _attend_keys(
            acc, peak, total, q, k_base, v_base, bias_base, index, begin, open_begin, num_keys, k_stride_t,
            v_stride_t, bias_stride_t, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_BIAS, True,
            UPCAST, PRECISION,
        )  # fmt: skip
    else:
        open_begin = open_end * 0
    open_end = tl.maximum(open_end, open_begin)
    acc, peak, total = _attend_keys(
        acc, peak, total, q, k_base, v_base, bias_base, index, open_begin, open_end, num_keys, k_stride_t, v_stride_t,
        bias_stride_t, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_BIAS, False, UPCAST, PRECISION,
    )  # fmt: skip
    acc, peak, total = _attend_keys(
        acc, peak, total, q, k_base, v_base, bias_base, index, open_end, end, num_keys, k_stride_t, v_stride_t,
        bias_stride_t, window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_BIAS, True, UPCAST, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    out_rows = out_ptr + row * out_stride_b + head * out_stride_h + queries.to(tl.int64)[:, None] * out_stride_t
    tl.store(out_rows + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    lse_rows = lse_ptr + tl.program_id(1).to(tl.int64) * num_queries + queries
    tl.store(lse_rows, lse, mask=queries < num_queries)


@torch.no_grad()
def triton_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, window: int | None, bias: Tensor | None = None,
    softcap: None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`: float32, bfloat16 or float16; D <= 256. No gradient."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, num_heads, num_queries, head_dim = q.shape
    # The layout that a model's output projection reads without a copy.
    out = q.new_empty(batch, num_queries, num_heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    tile = plan_tile(q.dtype, head_dim, capability(q.device))
    bias_strides = (0, 0, 0) if bias is None else bias.stride()
    launch(
        _prefill_attention_kernel,
        (triton.cdiv(num_queries, tile.rows), batch * num_heads),
        q, k, v, bias, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides, *out.stride()[:3],
        num_heads, num_queries, k.shape[2], q_start, window or 0, scale * LOG2_E,
        tile=tile,
        GROUP=group_size(num_heads, k.shape[1]),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        HAS_WINDOW=window is not None,
        HAS_BIAS=bias is not None,
        **matmul_constants(q.dtype),
    )  # fmt: skip
    return out, lse


def triton_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`: as if all queries came after all keys."""
    return triton_prefill_attention(q, k, v, scale, q_start=k.shape[2] - 1, window=None, bias=bias)
