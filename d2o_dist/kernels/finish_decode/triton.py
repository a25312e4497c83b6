"""The end of a decode step on CUDA, one kernel: parts merged, and scores and rates from the logits that attention kept.

Of each row and KV head some programs merge the output of one query head each, the others update a block of slots each;
all work out the lse from the parts, which are few. One read and one write of what changes. Parts are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import group_size
from d2o_dist.kernels.launch import Tile, launch, padded_dim
from d2o_dist.kernels.segments import Segments

_SLOTS = 1024  # a program
_PARTS = 16  # at a time


@triton.jit
def _total_lse(lse_ptr, stride_p, num_parts, sinks_ptr, head, HAS_SINKS: tl.constexpr, BLOCK_P: tl.constexpr):
    """The lse of all parts of one query head, at least one, and of its sink: the logit of one more key."""
    sink = float("-inf")
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
    peaks = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        lse = tl.load(lse_ptr + parts.to(tl.int64) * stride_p, mask=parts < num_parts, other=float("-inf"))
        peaks = tl.maximum(peaks, lse)
    top = tl.maximum(tl.max(peaks, 0), sink)
    # No key at all: -inf - -inf would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        lse = tl.load(lse_ptr + parts.to(tl.int64) * stride_p, mask=parts < num_parts, other=float("-inf"))
        sums += tl.exp2((lse - shift) * 1.4426950408889634)
    total = tl.sum(sums, 0) + tl.exp2((sink - shift) * 1.4426950408889634)
    return shift + tl.log2(total) * 0.6931471805599453


@triton.jit(do_not_specialize=["num_parts", "num_slots"])
def _finish_kernel(
    lses_ptr, outs_ptr, sinks_ptr, logits_ptr, start_ptr, length_ptr, newest_ptr, present_ptr,
    out_ptr, lse_ptr, scores_ptr, rates_ptr, probs_ptr,
    outs_stride_p, outs_stride_b, outs_stride_h, lses_stride_p, lses_stride_b, lses_stride_h,
    logits_stride_b, logits_stride_h, logits_stride_s, scores_stride_b, scores_stride_h, scores_stride_s,
    rates_stride_b, rates_stride_h, rates_stride_s, newest_stride_b, newest_stride_h, present_stride,
    num_kv_heads, num_parts, num_slots, decay,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_SCORES: tl.constexpr, PEAKS: tl.constexpr, HAS_RATES: tl.constexpr, HAS_PRESENT: tl.constexpr,
    HAS_PROBS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Of one row and KV head: the output of a query head (the first GROUP programs, if any), or BLOCK_S slots."""
    unit = tl.program_id(1)
    row = (unit // num_kv_heads).to(tl.int64)
    kv_head = (unit % num_kv_heads).to(tl.int64)
    here = True
    if HAS_PRESENT:
        here = tl.load(present_ptr + row * present_stride) != 0
    block = tl.program_id(0)
    if HAS_OUT:
        if block < GROUP:
            head = kv_head * GROUP + block
            base = lses_ptr + row * lses_stride_b + head * lses_stride_h
            lse = _total_lse(base, lses_stride_p, num_parts, sinks_ptr, head, HAS_SINKS, BLOCK_P)
            shift = tl.where(lse == float("-inf"), 0.0, lse)
            dims = tl.arange(0, BLOCK_D)
            acc = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, num_parts, BLOCK_P):
                parts = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
                part_lse = tl.load(base + parts * lses_stride_p, mask=parts < num_parts, other=float("-inf"))
                weight = tl.exp2((part_lse - shift) * 1.4426950408889634)
                rows = outs_ptr + row * outs_stride_b + head * outs_stride_h + parts[:, None] * outs_stride_p
                # An empty part may hold anything, and 0 * NaN is NaN.
                some = ((parts < num_parts) & (weight != 0.0))[:, None] & (dims < DIM)[None, :]
                acc += tl.sum(weight[:, None] * tl.load(rows + dims[None, :], mask=some, other=0.0), 0)
            if HAS_PRESENT:
                acc = tl.where(here, acc, 0.0)
            number = row * num_kv_heads * GROUP + head
            tl.store(out_ptr + number * DIM + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < DIM)
            if HAS_LSE:
                tl.store(lse_ptr + number, lse)
        block -= GROUP
    if HAS_SLOTS:
        if block >= 0:
            first = tl.zeros([], tl.int64)
            length = num_slots
            if HAS_SEGMENTS:
                first += tl.load(start_ptr + unit)
                length = tl.load(length_ptr + unit).to(tl.int32)
            slots = block * BLOCK_S + tl.arange(0, BLOCK_S)
            inside = slots < length
            offsets = slots.to(tl.int64)
            probs = tl.zeros([BLOCK_S], tl.float32)
            for member in tl.static_range(GROUP):
                head = kv_head * GROUP + member
                base = lses_ptr + row * lses_stride_b + head * lses_stride_h
                lse = _total_lse(base, lses_stride_p, num_parts, sinks_ptr, head, HAS_SINKS, BLOCK_P)
                shift = tl.where(lse == float("-inf"), 0.0, lse)
                kept = logits_ptr + row * logits_stride_b + head * logits_stride_h + offsets * logits_stride_s
                logits = tl.load(kept, mask=inside, other=float("-inf"))
                probs += tl.exp2((logits - shift) * 1.4426950408889634)
            changed = inside & here
            if HAS_SCORES:
                base = scores_ptr + row * scores_stride_b + kv_head * scores_stride_h
                scores = base + (first + offsets) * scores_stride_s
                old = tl.load(scores, mask=changed, other=0.0)
                new = old + probs
                if PEAKS:
                    new = tl.maximum(old, probs)
                tl.store(scores, new, mask=changed)
            if HAS_RATES:
                base = rates_ptr + row * rates_stride_b + kv_head * rates_stride_h
                rates = base + (first + offsets) * rates_stride_s
                aged = tl.load(rates, mask=changed, other=0.0) * (1.0 - decay) + probs * decay
                newest = tl.load(newest_ptr + row * newest_stride_b + kv_head * newest_stride_h)
                tl.store(rates, tl.where(offsets == newest, probs, aged), mask=changed)
            if HAS_PROBS:
                tl.store(probs_ptr + unit.to(tl.int64) * num_slots + slots, tl.where(here, probs, 0.0), mask=inside)


@torch.no_grad()
def finish(
    lses: Tensor, logits: Tensor | None, num_kv_heads: int, *, outs: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, sinks: Tensor | None = None, scores: Tensor | None = None, rates: Tensor | None = None,
    peaks: bool = False, newest: Tensor | None = None, rate_window: int = 32, present: Tensor | None = None,
    segments: Segments | None = None, probs: Tensor | None = None,
) -> None:  # fmt: skip
    """One launch. What is given of out [B, Hq, D], lse [B, Hq], scores, rates and probs [B, Hkv, S] is written.

    Args:
        lses: [P, B, Hq] and outs [P, B, Hq, D], any strides but the last of outs; logits: [B, Hq, S].
        segments: scores and rates are [N]; S is then its longest length.
    """
    _, batch, num_heads = lses.shape
    group, per_slot = group_size(num_heads, num_kv_heads), [x is not None for x in (scores, rates, probs)]
    num_slots = logits.shape[2] if any(per_slot) else 0
    assert out is None or (outs.stride(3) == 1 or outs.shape[3] == 1) and out.is_contiguous()
    statistics = []
    for x in (scores, rates):
        flat = x is not None and segments is not None
        statistics += (0, 0, 0) if x is None else (0, 0, x.stride(0)) if flat else x.stride()
    if newest is not None:
        newest = newest.expand(batch, num_kv_heads)
    dim = 1 if out is None else out.shape[2]
    launch(
        _finish_kernel,
        ((group if out is not None else 0) + triton.cdiv(num_slots, _SLOTS), batch * num_kv_heads),
        lses, outs, None if sinks is None else sinks.contiguous(), logits,
        *((None, None) if segments is None else (segments.start, segments.length)),
        newest if rates is not None else None, None if present is None else present.view(torch.uint8),
        out, lse, scores, rates, probs,
        *((0, 0, 0) if outs is None else outs.stride()[:3]), *lses.stride(),
        *((0, 0, 0) if logits is None else logits.stride()), *statistics,
        *((0, 0) if newest is None else newest.stride()), 0 if present is None else present.stride(0),
        num_kv_heads, lses.shape[0], num_slots, 1 / rate_window,
        tile=Tile(_SLOTS, 1, 4, 2),
        GROUP=group,
        DIM=dim,
        BLOCK_D=padded_dim(dim),
        BLOCK_P=_PARTS,
        BLOCK_S=_SLOTS,
        HAS_OUT=out is not None,
        HAS_SLOTS=num_slots > 0,
        HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None,
        HAS_SCORES=scores is not None,
        PEAKS=peaks,
        HAS_RATES=rates is not None,
        HAS_PRESENT=present is not None,
        HAS_PROBS=probs is not None,
        HAS_SEGMENTS=segments is not None,
    )  # fmt: skip


def triton_finish_decode(
    outs: Tensor, lses: Tensor, logits: Tensor, dtype: torch.dtype, *, num_kv_heads: int, total: None, **options
) -> Tensor:
    """As `finish_decode`."""
    out = torch.empty(outs.shape[1:], dtype=dtype, device=outs.device)
    outs = outs if outs.stride(3) == 1 else outs.contiguous()
    finish(lses, logits, num_kv_heads, outs=outs, out=out, **options)
    return out


def triton_slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """As `slot_probabilities`."""
    batch, _, num_slots = logits.shape
    probs = torch.empty(batch, num_kv_heads, num_slots, dtype=torch.float32, device=logits.device)
    finish(lse.unsqueeze(0), logits, num_kv_heads, probs=probs)
    return probs
