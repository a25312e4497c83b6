"""Scores and rates on CUDA, from the logits that decode attention kept: one read and one write of what changes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o_dist.kernels.common import group_size
from d2o_dist.kernels.launch import Tile, launch

_SLOTS = 1024  # a program


@triton.jit(do_not_specialize=["num_slots"])
def _update_scores_kernel(
    logits_ptr, lse_ptr, scores_ptr, rates_ptr, newest_ptr, present_ptr, probs_ptr,
    logits_stride_b, logits_stride_h, logits_stride_s, lse_stride_b, lse_stride_h,
    scores_stride_b, scores_stride_h, scores_stride_s, rates_stride_b, rates_stride_h, rates_stride_s,
    num_kv_heads, num_slots, decay,
    GROUP: tl.constexpr, BLOCK_S: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_RATES: tl.constexpr,
    HAS_PRESENT: tl.constexpr, HAS_PROBS: tl.constexpr,
):  # fmt: skip
    """BLOCK_S slots of one row and KV head."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    inside = slots < num_slots
    offsets = slots.to(tl.int64)
    present = inside
    if HAS_PRESENT:
        present = inside & (tl.load(present_ptr + row) != 0)
    probs = tl.zeros([BLOCK_S], tl.float32)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        lse = tl.load(lse_ptr + row * lse_stride_b + head * lse_stride_h)
        base = logits_ptr + row * logits_stride_b + head * logits_stride_h
        logits = tl.load(base + offsets * logits_stride_s, mask=inside, other=float("-inf"))
        # No live slot at all: the lse is -inf, and -inf - -inf would be NaN.
        shift = tl.where(lse == float("-inf"), 0.0, lse)
        probs += tl.exp2((logits - shift) * 1.4426950408889634)
    probs = tl.where(present, probs, 0.0)
    if HAS_SCORES:
        scores = scores_ptr + row * scores_stride_b + kv_head * scores_stride_h + offsets * scores_stride_s
        tl.store(scores, tl.load(scores, mask=present, other=0.0) + probs, mask=present)
    if HAS_RATES:
        rates = rates_ptr + row * rates_stride_b + kv_head * rates_stride_h + offsets * rates_stride_s
        aged = tl.load(rates, mask=present, other=0.0) * (1.0 - decay) + probs * decay
        newest = tl.load(newest_ptr + tl.program_id(1))
        tl.store(rates, tl.where(offsets == newest, probs, aged), mask=present)
    if HAS_PROBS:
        tl.store(probs_ptr + tl.program_id(1).to(tl.int64) * num_slots + slots, probs, mask=inside)


@torch.no_grad()
def triton_update_scores(
    logits: Tensor,
    lse: Tensor,
    num_kv_heads: int,
    *,
    scores: Tensor | None,
    rates: Tensor | None,
    newest: Tensor | None,
    rate_window: int,
    present: Tensor | None,
    with_probs: bool = False,
) -> Tensor | None:
    """In place; as `update_scores`. Returns probs [B, Hkv, S] if wanted."""
    batch, num_heads, num_slots = logits.shape
    # Read as one number a row and head, or a row, side by side.
    newest = None if rates is None else newest.expand(batch, num_kv_heads).contiguous()
    present = None if present is None else present.contiguous().view(torch.uint8)
    probs = None
    if with_probs:
        probs = torch.empty(batch, num_kv_heads, num_slots, dtype=torch.float32, device=logits.device)
    launch(
        _update_scores_kernel,
        (triton.cdiv(num_slots, _SLOTS), batch * num_kv_heads),
        logits, lse, scores, rates, newest, present, probs,
        *logits.stride(), *lse.stride(), *((0, 0, 0) if scores is None else scores.stride()),
        *((0, 0, 0) if rates is None else rates.stride()), num_kv_heads, num_slots, 1 / rate_window,
        tile=Tile(_SLOTS, 1, 4, 2),
        GROUP=group_size(num_heads, num_kv_heads),
        BLOCK_S=_SLOTS,
        HAS_SCORES=scores is not None,
        HAS_RATES=rates is not None,
        HAS_PRESENT=present is not None,
        HAS_PROBS=with_probs,
    )  # fmt: skip
    return probs


def triton_slot_probabilities(logits: Tensor, lse: Tensor, num_kv_heads: int) -> Tensor:
    """As `slot_probabilities`."""
    nothing = dict(scores=None, rates=None, newest=None, rate_window=1, present=None)
    return triton_update_scores(logits, lse, num_kv_heads, **nothing, with_probs=True)
