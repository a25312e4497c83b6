"""Decode attention on CUDA, split along the slots: a program reads its slots once, for all G heads of a KV head.

Bytes: K and V once, 2 S D itemsize a KV head; the logits that are kept for the scores add 4 G S. FLOPs: 4 G D a slot,
few against the bytes. Each split leaves an output and an lse, which a second kernel merges, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, group_size
from d2o_dist.kernels.launch import Tile, launch, matmul_constants, padded_dim, processors, rows_contiguous
from d2o_dist.kernels.update_scores import slot_probabilities

# Programs a multiprocessor, so that reads of one hide the latency of another.
_PROGRAMS_PER_PROCESSOR = 4


def plan_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """rows: what a group is padded to, at least; cols: slots of a step. No spills on sm_80 and sm_90."""
    if dtype == torch.float32:
        # Triton 3.6 spills with fewer warps where a row is wide.
        return Tile(16, 16, 8 if padded_dim(head_dim) > 128 else 4, 2)
    return Tile(16, 64 if padded_dim(head_dim) <= 128 else 32, 4, 3)


def plan_splits(num_slots: int, num_rows: int, num_processors: int, step: int) -> int:
    """Slots of one split, a multiple of `step`: enough to fill the device, with `num_rows` rows times KV heads."""
    wanted = max(1, -(-num_processors * _PROGRAMS_PER_PROCESSOR // max(1, num_rows)))
    steps = max(1, -(-num_slots // step))
    return -(-steps // min(wanted, steps)) * step


@triton.jit(do_not_specialize=["num_slots"])
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, valid_ptr, mass_ptr, logits_ptr, part_out_ptr, part_lse_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    valid_stride_b, valid_stride_h, valid_stride_s, mass_stride_b, mass_stride_h, mass_stride_s,
    num_kv_heads, num_slots, split_size, scale_log2,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_MASS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slots [split * split_size, + split_size) of one row and KV head."""
    split = tl.program_id(0)
    row = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    in_group = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = q_ptr + row * q_stride_b + heads[:, None] * q_stride_h
    q = tl.load(q_rows + dims[None, :], mask=in_group, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + row * k_stride_b + kv_head * k_stride_h
    v_base = v_ptr + row * v_stride_b + kv_head * v_stride_h
    logit_rows = logits_ptr + (row * num_kv_heads * GROUP + heads)[:, None] * num_slots
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    begin = split * split_size
    end = tl.minimum(begin + split_size, num_slots)
    for start in range(begin, end, BLOCK_N):
        first = start  # a tensor also when interpreted
        slots = first + tl.arange(0, BLOCK_N)
        in_split = slots < end
        usable = in_split
        wide_slots = slots.to(tl.int64)
        if HAS_VALID:
            valid_base = valid_ptr + row * valid_stride_b + kv_head * valid_stride_h
            usable = usable & (tl.load(valid_base + wide_slots * valid_stride_s, mask=in_split, other=0) != 0)
        inside = usable[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_base + wide_slots[:, None] * k_stride_s + dims[None, :], mask=inside, other=0.0)
        v = tl.load(v_base + wide_slots[:, None] * v_stride_s + dims[None, :], mask=inside, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if HAS_MASS:
            mass_base = mass_ptr + row * mass_stride_b + kv_head * mass_stride_h
            mass = tl.load(mass_base + wide_slots * mass_stride_s, mask=usable, other=0.0)
            logits += mass.to(tl.float32)[None, :] * 1.4426950408889634
        logits = tl.where(usable[None, :], logits, float("-inf"))
        kept = (group < GROUP)[:, None] & in_split[None, :]
        tl.store(logit_rows + slots[None, :], logits * 0.6931471805599453, mask=kept)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(probs, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    # Partial results of one query head lie together: [B * Hq, splits, D].
    part = (row * num_kv_heads * GROUP + heads) * tl.num_programs(0) + split
    tl.store(part_out_ptr + part[:, None] * HEAD_DIM + dims[None, :], out, mask=in_group)
    tl.store(part_lse_ptr + part, lse, mask=group < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query head: L = logsumexp(lse_r), out = sum exp(lse_r - L) out_r."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse = tl.load(part_lse_ptr + head * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
        peak = tl.maximum(peak, lse)
    top = tl.max(peak, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse = tl.load(part_lse_ptr + head * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
        weight = tl.exp2((lse - top) * 1.4426950408889634)
        rows = part_out_ptr + (head * num_splits + splits)[:, None] * HEAD_DIM
        inside = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
        acc += tl.sum(weight[:, None] * tl.load(rows + dims[None, :], mask=inside, other=0.0), 0)
        total += weight
    mass = tl.sum(total, 0)
    acc = acc / tl.where(mass == 0.0, 1.0, mass)
    lse = tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass) * 0.6931471805599453)
    tl.store(out_ptr + head * HEAD_DIM + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(lse_ptr + head, lse)


@torch.no_grad()
def triton_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_with_logits`, valid [B, Hkv, S]: -> (out [B, Hq, D], lse [B, Hq], logits [B, Hq, S])."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[1:3]
    group, device = group_size(num_heads, num_kv_heads), q.device
    tile = plan_tile(q.dtype, head_dim)
    split_size = plan_splits(num_slots, batch * num_kv_heads, processors(device), tile.cols)
    num_splits = triton.cdiv(num_slots, split_size)
    logits = torch.empty(batch, num_heads, num_slots, dtype=torch.float32, device=device)
    part_out = torch.empty(batch * num_heads, num_splits, head_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch * num_heads, num_splits, dtype=torch.float32, device=device)
    launch(
        _decode_split_kernel,
        (num_splits, batch * num_kv_heads),
        q, k, v, None if valid is None else valid.view(torch.uint8), log_mass, logits, part_out, part_lse,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if valid is None else valid.stride()), *((0, 0, 0) if log_mass is None else log_mass.stride()),
        num_kv_heads, num_slots, split_size, scale * LOG2_E,
        tile=tile,
        GROUP=group,
        BLOCK_G=max(tile.rows, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_N=tile.cols,
        HAS_VALID=valid is not None,
        HAS_MASS=log_mass is not None,
        **matmul_constants(q.dtype),
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=device)
    launch(
        _merge_splits_kernel,
        (batch * num_heads,),
        part_out, part_lse, out, lse, num_splits,
        tile=Tile(16, 1, 4, 2),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_S=16,
    )  # fmt: skip
    return out, lse, logits


def triton_decode_with_probabilities(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None, finite: bool,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`, valid [B, Hkv, S]. Invalid slots are never read, finite or not."""
    out, lse, logits = triton_decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass)
    return out, lse, slot_probabilities(logits, lse, k.shape[1])
