"""Nearest kept key on CUDA: one program a block of evicted keys; it walks the kept ones. Cosines stay in registers.

FLOPs: 2 E K D a head; bytes: kept keys once a block of evicted ones. Keys are multiplied as they are and scaled after:
products of bfloat16 numbers are exact in float32, where unit vectors in bfloat16 would round every cosine.

Ties. Each of BLOCK_N lanes keeps the first maximum of the columns it has seen (only a strictly larger cosine replaces
it); the end takes the smallest index among the lanes that hold the maximum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.launch import Tile, launch, matmul_constants, padded_dim, rows_contiguous
from d2o_dist.kernels.nearest_kept.torch_blocked import COMPACT_BELOW, compact_targets

# Pairs of keys from which on it pays to ask the device how many targets there are: the host waits for the answer.
_COUNT_TARGETS_FROM = 1 << 22


def plan_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """rows: evicted keys of a program; cols: kept keys of a step. No registers spill on sm_80 and sm_90."""
    wide = padded_dim(head_dim)
    if dtype == torch.float32:
        # Triton 3.6 spills with larger blocks where a row is wide.
        return Tile(32, 32, 4, 2) if wide <= 128 else Tile(32, 16, 4, 2)
    return Tile(64, 64, 8, 2) if wide > 128 else Tile(128, 64, 8, 3)


@triton.jit(do_not_specialize=["num_rows"])
def _inverse_norms_kernel(
    keys_ptr, out_ptr, stride_n, stride_t, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """1 / |key|, 0 for a key of norm 0."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)
    keys = tl.load(
        keys_ptr + head * stride_n + rows.to(tl.int64)[:, None] * stride_t + dims[None, :],
        mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    largest = tl.max(tl.abs(keys), 1)
    scaled = keys / tl.where(largest > 0, largest, 1.0)[:, None]
    norm = tl.sqrt(tl.sum(scaled * scaled, 1)) * largest
    tl.store(out_ptr + head * num_rows + rows, tl.where(norm > 0, 1.0 / norm, 0.0), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_evicted", "num_kept"])
def _nearest_kept_kernel(
    evicted_ptr, kept_ptr, evicted_norm_ptr, kept_norm_ptr, target_ptr, similarity_ptr, index_ptr,
    evicted_stride_n, evicted_stride_t, kept_stride_n, kept_stride_t, num_evicted, num_kept,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TARGET: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M evicted keys of one head against all kept ones of it."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    evicted = tl.load(
        evicted_ptr + head * evicted_stride_n + rows.to(tl.int64)[:, None] * evicted_stride_t + dims[None, :],
        mask=(rows < num_evicted)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        evicted = evicted.to(tl.float32)
    evicted_norm = tl.load(evicted_norm_ptr + head * num_evicted + rows, mask=rows < num_evicted, other=0.0)
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, num_kept, BLOCK_N):
        first = start  # a tensor also when interpreted
        index = first + columns
        target = index < num_kept
        if HAS_TARGET:
            target = target & (tl.load(target_ptr + head * num_kept + index, mask=target, other=0) != 0)
        kept = tl.load(
            kept_ptr + head * kept_stride_n + index.to(tl.int64)[None, :] * kept_stride_t + dims[:, None],
            mask=target[None, :] & (dims < HEAD_DIM)[:, None],
            other=0.0,
        )
        if UPCAST:
            kept = kept.to(tl.float32)
        kept_norm = tl.load(kept_norm_ptr + head * num_kept + index, mask=target, other=0.0)
        cosine = tl.dot(evicted, kept, input_precision=PRECISION) * kept_norm[None, :]
        cosine = tl.where(target[None, :], cosine, float("-inf"))
        wins = cosine > best
        best = tl.where(wins, cosine, best)
        where = tl.where(wins, index[None, :], where)
    top = tl.max(best, 1)
    winner = tl.min(tl.where(best == top[:, None], where, 2147483647), 1)
    found = top > float("-inf")
    # Of a key of norm 0 all cosines are 0, and the first target wins; 0 * -inf would be NaN where there is none.
    similarity = tl.where(found, top * evicted_norm, float("-inf"))
    winner = tl.where(found, winner, 0)
    tl.store(similarity_ptr + head * num_evicted + rows, similarity, mask=rows < num_evicted)
    tl.store(index_ptr + head * num_evicted + rows, winner.to(tl.int64), mask=rows < num_evicted)


def _inverse_norms(keys: Tensor) -> Tensor:
    num_heads, num_rows, head_dim = keys.shape
    out = torch.empty(num_heads, num_rows, dtype=torch.float32, device=keys.device)
    wide = padded_dim(head_dim)
    block = 8192 // wide
    launch(
        _inverse_norms_kernel,
        (triton.cdiv(num_rows, block), num_heads),
        keys, out, *keys.stride()[:2], num_rows,
        tile=Tile(block, wide, 4, 2),
        HEAD_DIM=head_dim,
        BLOCK_D=wide,
        BLOCK_T=block,
    )  # fmt: skip
    return out


@torch.no_grad()
def triton_nearest_kept(evicted: Tensor, kept: Tensor, target_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `nearest_kept`, on [N, E, D], [N, K, D], [N, K]: float32, bfloat16 or float16; D <= 256."""
    evicted, kept = rows_contiguous(evicted), rows_contiguous(kept)
    num_heads, num_evicted, head_dim = evicted.shape
    num_kept, device = kept.shape[1], evicted.device
    similarity = torch.empty(num_heads, num_evicted, dtype=torch.float32, device=device)
    index = torch.empty(num_heads, num_evicted, dtype=torch.int64, device=device)
    tile = plan_tile(evicted.dtype, head_dim)
    launch(
        _nearest_kept_kernel,
        (triton.cdiv(num_evicted, tile.rows), num_heads),
        evicted, kept, _inverse_norms(evicted), _inverse_norms(kept),
        None if target_mask is None else target_mask.contiguous().view(torch.uint8), similarity, index,
        *evicted.stride()[:2], *kept.stride()[:2], num_evicted, num_kept,
        tile=tile,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        HAS_TARGET=target_mask is not None,
        **matmul_constants(evicted.dtype),
    )  # fmt: skip
    return similarity, index


def triton_nearest_of_targets(evicted: Tensor, kept: Tensor, target_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `nearest_kept`. Where targets are few among many keys, they are copied together first."""
    lead = evicted.shape[:-1]
    rows = lead[:-1].numel()
    evicted, kept = (x.reshape(rows, *x.shape[-2:]) for x in (evicted, kept))
    mask, original = None if target_mask is None else target_mask.reshape(rows, -1), None
    if mask is not None and evicted.shape[1] * kept.shape[1] >= _COUNT_TARGETS_FROM:
        most = int(mask.sum(1).max())
        if 0 < most < COMPACT_BELOW * kept.shape[1]:
            kept, mask, original = compact_targets(kept, mask, most)
    similarity, index = triton_nearest_kept(evicted, kept, mask)
    if original is not None:
        index = original.gather(1, index).masked_fill_(similarity == -torch.inf, 0)
    return similarity.view(lead), index.view(lead)
