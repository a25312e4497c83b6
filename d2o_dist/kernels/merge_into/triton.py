"""Weighted segment means on CUDA, without atomics: evicted rows are sorted by target, and each target adds up its own.

One program serves one kept row: it walks its segment in order of the evicted index, so the same rows give the same bits
in every run. Bytes: kept rows read and written once, merged rows read once; two FLOPs a number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.launch import Tile, launch, padded_dim, rows_contiguous

_SEGMENT_ROWS = 16  # rows that a program adds at a time


@triton.jit(do_not_specialize=["num_kept", "num_evicted"])
def _merge_into_kernel(
    kept_ptr, evicted_ptr, weight_ptr, own_ptr, total_ptr, order_ptr, begin_ptr, out_ptr,
    kept_stride_b, kept_stride_h, kept_stride_t, evicted_stride_b, evicted_stride_h, evicted_stride_t,
    num_kv_heads, num_kept, num_evicted,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Kept row program_id(0) of row and head program_id(1): (own * kept + sum weight * evicted) / total."""
    slot = tl.program_id(0)
    lead = tl.program_id(1).to(tl.int64)
    row, kv_head = lead // num_kv_heads, lead % num_kv_heads
    dims = tl.arange(0, BLOCK_D)
    in_dims = dims < HEAD_DIM
    begin = tl.load(begin_ptr + lead * (num_kept + 1) + slot)
    end = tl.load(begin_ptr + lead * (num_kept + 1) + slot + 1)
    kept_row = kept_ptr + row * kept_stride_b + kv_head * kept_stride_h + slot.to(tl.int64) * kept_stride_t
    kept = tl.load(kept_row + dims, mask=in_dims, other=0.0)
    evicted_base = evicted_ptr + row * evicted_stride_b + kv_head * evicted_stride_h
    added = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        inside = entries < end
        source = tl.load(order_ptr + lead * num_evicted + entries, mask=inside, other=0)
        weight = tl.load(weight_ptr + lead * num_evicted + source, mask=inside, other=0.0)
        rows = evicted_base + source.to(tl.int64)[:, None] * evicted_stride_t
        value = tl.load(rows + dims[None, :], mask=inside[:, None] & in_dims[None, :], other=0.0)
        added += weight[:, None] * value.to(tl.float32)
    own = tl.load(own_ptr + lead * num_kept + slot)
    total = tl.load(total_ptr + lead * num_kept + slot)
    mean = (own * kept.to(tl.float32) + tl.sum(added, 0)) / total
    merged = tl.where(end > begin, mean.to(out_ptr.dtype.element_ty), kept)
    tl.store(out_ptr + (lead * num_kept + slot) * HEAD_DIM + dims, merged, mask=in_dims)


@triton.jit(do_not_specialize=["num_kept", "num_evicted"])
def _segment_totals_kernel(
    share_ptr, own_ptr, order_ptr, begin_ptr, total_ptr, num_kept, num_evicted, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """own + sum of the shares of each kept row's segment."""
    slot = tl.program_id(0)
    lead = tl.program_id(1).to(tl.int64)
    begin = tl.load(begin_ptr + lead * (num_kept + 1) + slot)
    end = tl.load(begin_ptr + lead * (num_kept + 1) + slot + 1)
    added = tl.zeros([BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        source = tl.load(order_ptr + lead * num_evicted + entries, mask=entries < end, other=0)
        added += tl.load(share_ptr + lead * num_evicted + source, mask=entries < end, other=0.0)
    own = tl.load(own_ptr + lead * num_kept + slot)
    tl.store(total_ptr + lead * num_kept + slot, own + tl.sum(added, 0))


@torch.no_grad()
def triton_merge_into(
    kept: tuple[Tensor, ...],
    evicted: tuple[Tensor, ...],
    weight: Tensor,
    target: Tensor,
    merged: Tensor,
    own: Tensor,
    share: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """As `merge_into`: weight, share float32 [B, Hkv, E]; own float32 [B, Hkv, K]; all of target within [0, K)."""
    batch, num_kv_heads, num_kept = own.shape
    num_evicted, device = weight.shape[2], own.device
    lead = batch * num_kv_heads
    # What is not merged sorts behind every segment. Stable: a segment is in order of the evicted index.
    key = target.masked_fill(~merged, num_kept).view(lead, num_evicted)
    sorted_key, order = key.sort(dim=-1, stable=True)
    edges = torch.arange(num_kept + 1, device=device).expand(lead, num_kept + 1).contiguous()
    begin = torch.searchsorted(sorted_key, edges).to(torch.int32)
    order = order.to(torch.int32)
    own, weight, share = own.contiguous(), weight.contiguous(), share.contiguous()
    total = torch.empty_like(own)
    launch(
        _segment_totals_kernel,
        (num_kept, lead),
        share, own, order, begin, total, num_kept, num_evicted,
        tile=Tile(32, 1, 1, 2),
        BLOCK_E=32,
    )  # fmt: skip
    means = []
    for old, new in zip(kept, evicted, strict=True):
        old, new = rows_contiguous(old), rows_contiguous(new)
        head_dim = old.shape[3]
        out = torch.empty(old.shape, dtype=old.dtype, device=device)
        launch(
            _merge_into_kernel,
            (num_kept, lead),
            old, new, weight, own, total, order, begin, out, *old.stride()[:3], *new.stride()[:3],
            num_kv_heads, num_kept, num_evicted,
            tile=Tile(_SEGMENT_ROWS, 1, 2, 2),
            HEAD_DIM=head_dim,
            BLOCK_D=padded_dim(head_dim),
            BLOCK_E=_SEGMENT_ROWS,
        )  # fmt: skip
        means.append(out)
    touched = (begin[:, 1:] > begin[:, :-1]).view(own.shape)
    return tuple(means), total, touched
