"""Decode attention on CUDA, split along the slots: a program reads its slots once, for all G heads of a KV head.

Bytes: K and V once, 2 S D itemsize a KV head; the logits that are kept for the scores add 4 G S. FLOPs: 4 G D a slot,
few against the bytes. Each split leaves an output and an lse, which the end of the step merges, always in the same
order. The token of the step may be outside of its slot still: who reads that slot writes it, and reads the token.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import LOG2_E, group_size
from d2o_dist.kernels.finish_decode import slot_probabilities
from d2o_dist.kernels.finish_decode.triton import finish
from d2o_dist.kernels.launch import Tile, launch, matmul_constants, padded_dim, processors, rows_contiguous
from d2o_dist.kernels.segments import Segments

# Programs that a multiprocessor has room for at once, by registers and shared memory (a test compiles and sees).
PROGRAMS_PER_PROCESSOR = 2
# What a program does beside its slots (queries, the token, its partial results), in steps over slots.
_BESIDE = 1


def plan_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """rows: what a group is padded to, at least; cols: slots of a step. No spills on sm_80 and sm_90."""
    if dtype == torch.float32:
        # Triton 3.6 spills with fewer warps where a row is wide.
        return Tile(16, 16, 8 if padded_dim(head_dim) > 128 else 4, 2)
    return Tile(16, 64 if padded_dim(head_dim) <= 128 else 32, 4, 3)


@cache
def plan_splits(num_slots: int, num_rows: int, num_processors: int, step: int) -> int:
    """Slots of one split, a multiple of `step`, with `num_rows` rows times KV heads: so many that programs fill the
    device in whole waves, and as many waves as end soonest. No program waits for a last wave of few."""
    steps, at_once = max(1, -(-num_slots // step)), num_processors * PROGRAMS_PER_PROCESSOR

    def duration(each: int) -> tuple[int, int]:
        waves = -(-(-(-steps // each) * num_rows) // at_once)
        return waves * (each + _BESIDE), -each

    wanted = (max(1, waves * at_once // num_rows) for waves in range(1, 9))
    return min((-(-steps // min(splits, steps)) for splits in wanted), key=duration) * step


@triton.jit
def _capped(logits, softcap_log2, HAS_CAP: tl.constexpr):
    """Logits in units of log2, of products that are in units of softcap if there is one, else of log2."""
    if HAS_CAP:
        # tanh by exp2, exact to 1e-7 of softcap.
        shrunk = tl.exp2(-2.0 * tl.abs(logits) * 1.4426950408889634)
        size = (1.0 - shrunk) / (1.0 + shrunk) * softcap_log2
        logits = tl.where(logits < 0.0, -size, size)
    return logits


@triton.jit(do_not_specialize=["num_slots"])
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, valid_ptr, mass_ptr, start_ptr, length_ptr, slot_ptr, new_k_ptr, new_v_ptr,
    logits_ptr, part_out_ptr, part_lse_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    valid_stride_b, valid_stride_h, valid_stride_s, mass_stride_b, mass_stride_h, mass_stride_s,
    slot_stride_b, slot_stride_h, new_k_stride_b, new_k_stride_h, new_v_stride_b, new_v_stride_h,
    num_kv_heads, num_slots, split_size, scale_log2, softcap_log2,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, HAS_VALID: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_NEW: tl.constexpr, HAS_LOGITS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slots [split * split_size, + split_size) of one row and KV head."""
    split = tl.program_id(0)
    unit = tl.program_id(1)
    row = (unit // num_kv_heads).to(tl.int64)
    kv_head = (unit % num_kv_heads).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    heads = kv_head * GROUP + group
    in_group = (group < GROUP)[:, None]
    q_rows = q_ptr + row * q_stride_b + heads[:, None] * q_stride_h
    q = tl.load(q_rows + dims[None, :], mask=in_group & (dims < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    first = tl.zeros([], tl.int64)
    length = num_slots
    if HAS_SEGMENTS:
        first += tl.load(start_ptr + unit)
        length = tl.load(length_ptr + unit).to(tl.int32)
    k_base = k_ptr + row * k_stride_b + kv_head * k_stride_h + first * k_stride_s
    v_base = v_ptr + row * v_stride_b + kv_head * v_stride_h + first * v_stride_s
    begin = split * split_size
    end = tl.minimum(begin + split_size, length)
    if HAS_NEW:
        new_slot = tl.load(slot_ptr + row * slot_stride_b + kv_head * slot_stride_h)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in range(begin, end, BLOCK_N):
        from_here = start  # a tensor also when interpreted
        slots = from_here + tl.arange(0, BLOCK_N)
        in_split = slots < end
        usable = in_split
        wide_slots = slots.to(tl.int64)
        if HAS_VALID:
            valid_base = valid_ptr + row * valid_stride_b + kv_head * valid_stride_h
            usable &= tl.load(valid_base + (first + wide_slots) * valid_stride_s, mask=in_split, other=0) != 0
        if HAS_NEW:
            in_split &= wide_slots != new_slot  # the token comes after the others
            usable &= in_split
        k_inside = usable[:, None] & (dims < HEAD_DIM)[None, :]
        v_inside = usable[:, None] & (value_dims < VALUE_DIM)[None, :]
        k = tl.load(k_base + wide_slots[:, None] * k_stride_s + dims[None, :], mask=k_inside, other=0.0)
        v = tl.load(v_base + wide_slots[:, None] * v_stride_s + value_dims[None, :], mask=v_inside, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2, softcap_log2, HAS_CAP)
        if HAS_MASS:
            mass_base = mass_ptr + row * mass_stride_b + kv_head * mass_stride_h
            mass = tl.load(mass_base + (first + wide_slots) * mass_stride_s, mask=usable, other=0.0)
            logits += mass.to(tl.float32)[None, :] * 1.4426950408889634
        logits = tl.where(usable[None, :], logits, float("-inf"))
        if HAS_LOGITS:
            rows = logits_ptr + (row * num_kv_heads * GROUP + heads)[:, None] * num_slots
            tl.store(rows + slots[None, :], logits * 0.6931471805599453, mask=in_group & in_split[None, :])
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(probs, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    if HAS_NEW:
        mine = (new_slot >= begin) & (new_slot < end)
        new_k_row = new_k_ptr + row * new_k_stride_b + kv_head * new_k_stride_h
        new_k = tl.load(new_k_row + dims, mask=dims < HEAD_DIM, other=0.0)
        new_v_row = new_v_ptr + row * new_v_stride_b + kv_head * new_v_stride_h
        new_v = tl.load(new_v_row + value_dims, mask=value_dims < VALUE_DIM, other=0.0)
        tl.store(k_base + new_slot * k_stride_s + dims, new_k, mask=mine & (dims < HEAD_DIM))
        tl.store(v_base + new_slot * v_stride_s + value_dims, new_v, mask=mine & (value_dims < VALUE_DIM))
        if HAS_VALID:
            valid_base = valid_ptr + row * valid_stride_b + kv_head * valid_stride_h
            is_valid = tl.load(valid_base + (first + new_slot) * valid_stride_s, mask=mine, other=0) != 0
        else:
            is_valid = mine
        product = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1)
        logits = _capped(product * scale_log2, softcap_log2, HAS_CAP)
        if HAS_MASS:
            mass_base = mass_ptr + row * mass_stride_b + kv_head * mass_stride_h
            mass = tl.load(mass_base + (first + new_slot) * mass_stride_s, mask=is_valid, other=0.0)
            logits += mass.to(tl.float32) * 1.4426950408889634
        logits = tl.where(is_valid, logits, float("-inf"))
        if HAS_LOGITS:
            rows = logits_ptr + (row * num_kv_heads * GROUP + heads) * num_slots
            tl.store(rows + new_slot, logits * 0.6931471805599453, mask=(group < GROUP) & mine)
        new_peak = tl.maximum(peak, logits)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        prob = tl.exp2(logits - shift)
        shrink = tl.exp2(peak - shift)
        total = total * shrink + prob
        acc = acc * shrink[:, None] + prob[:, None] * new_v.to(tl.float32)[None, :]
        peak = new_peak
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    # Partial results of one query head lie together: [B * Hq, splits, Dv].
    part = (row * num_kv_heads * GROUP + heads) * tl.num_programs(0) + split
    inside = in_group & (value_dims < VALUE_DIM)[None, :]
    tl.store(part_out_ptr + part[:, None] * VALUE_DIM + value_dims[None, :], out, mask=inside)
    tl.store(part_lse_ptr + part, lse, mask=group < GROUP)


@torch.no_grad()
def decode_parts(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None,
    softcap: float | None, segments: Segments | None = None, slot: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None, with_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """One launch: (outs [P, B, Hq, Dv] and lses [P, B, Hq] of splits of the slots, float32, logits [B, Hq, S]).

    Args:
        valid: [B, Hkv, S]; segments: k, v, valid and log_mass are [N, ...]; S is then its longest length, and logits
            beyond the end of a segment are not written.
        slot, new: as `decode_with_logits`.
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[1:3] if segments is None else (segments.start.shape[1], segments.most)
    group, device, value_dim = group_size(num_heads, num_kv_heads), q.device, v.shape[-1]
    tile = plan_tile(q.dtype, max(head_dim, value_dim))
    split_size = plan_splits(num_slots, batch * num_kv_heads, processors(device), tile.cols)
    num_splits = triton.cdiv(num_slots, split_size)
    logits = None
    if with_logits:
        logits = torch.empty(batch, num_heads, num_slots, dtype=torch.float32, device=device)
    part_out = torch.empty(batch, num_heads, num_splits, value_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=device)
    strides: list[int] = []
    for x in (k, v, valid, log_mass):
        own = (0, 0, 0) if x is None else x.stride()[:3]
        strides += own if segments is None or x is None else (0, 0, own[0])
    if new is not None:
        slot = slot.expand(batch, num_kv_heads)
        new = [rows_contiguous(x) for x in new]
        strides += (*slot.stride(), *new[0].stride()[:2], *new[1].stride()[:2])
    launch(
        _decode_split_kernel,
        (num_splits, batch * num_kv_heads),
        q, k, v, None if valid is None else valid.view(torch.uint8), log_mass,
        *((None, None) if segments is None else (segments.start, segments.length)),
        *((None, None, None) if new is None else (slot, *new)), logits, part_out, part_lse,
        *q.stride()[:2], *strides, *((0,) * 6 if new is None else ()),
        num_kv_heads, num_slots, split_size, scale * LOG2_E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        tile=tile,
        GROUP=group,
        BLOCK_G=max(tile.rows, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        VALUE_DIM=value_dim,
        BLOCK_V=padded_dim(value_dim),
        BLOCK_N=tile.cols,
        HAS_VALID=valid is not None,
        HAS_MASS=log_mass is not None,
        HAS_CAP=softcap is not None,
        HAS_SEGMENTS=segments is not None,
        HAS_NEW=new is not None,
        HAS_LOGITS=with_logits,
        **matmul_constants(q.dtype),
    )  # fmt: skip
    return part_out.permute(2, 0, 1, 3), part_lse.permute(2, 0, 1), logits


def triton_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None,
    softcap: float | None = None, slot: Tensor | None = None, new: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_with_logits`, valid [B, Hkv, S]: -> (out [B, Hq, Dv], lse [B, Hq], logits [B, Hq, S])."""
    outs, lses, logits = decode_parts(
        q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap, slot=slot, new=new
    )
    out = torch.empty(*q.shape[:2], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    finish(lses, None, k.shape[1], outs=outs, out=out, lse=lse)
    return out, lse, logits


def triton_decode_with_probabilities(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None, finite: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`, valid [B, Hkv, S]. Invalid slots are never read, finite or not."""
    out, lse, logits = triton_decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap)
    return out, lse, slot_probabilities(logits, lse, k.shape[1])
