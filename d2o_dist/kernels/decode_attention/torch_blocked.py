"""Decode attention by batched matmuls: torch ops only, any device, differentiable.

Logits are never rounded to bf16: K and V are converted to acc dtype by blocks of slots small enough to stay in
cache (and a bf16 matmul runs at under 1 GFLOP/s on a CPU without bf16 instructions, against 140 in float32).
exp2 and not exp: exp is 50x slower where it underflows, as it does on every masked slot.
"""

import torch
from torch import Tensor

from d2o_dist.kernels.common import LN_2, LOG2_E, acc_dtype, group_size, wants_grad
from d2o_dist.slots.append import write_tokens

CONVERTED_ELEMENTS = 1 << 18  # of K or V at a time: 1 MiB in float32


def blocked_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None,
    log_mass: Tensor | None,
    softcap: float | None = None,
    finite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`, valid [B, Hkv, S]: -> (out [B, Hq, D], lse [B, Hq], probs [B, Hkv, S])."""
    out, lse, _, probs = _attend(q, k, v, scale, valid, log_mass, softcap, finite)
    return out, lse, probs.sum(2)


def blocked_decode_with_logits(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor | None, log_mass: Tensor | None,
    softcap: float | None = None, slot: Tensor | None = None, new: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_with_logits`, valid [B, Hkv, S]: -> (out [B, Hq, D], lse [B, Hq], logits [B, Hq, S])."""
    if new is not None:
        write_tokens(slot, (k, new[0]), (v, new[1]), masked=True)
    out, lse, logits, _ = _attend(q, k, v, scale, valid, log_mass, softcap, finite=False)
    return out, lse, (logits * LN_2).flatten(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None, log_mass: Tensor | None,
    softcap: float | None, finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, Hq, D], lse [B, Hq], logits in units of log2 and probabilities [B, Hkv, G, S]."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_slots, acc = k.shape[1], k.shape[2], acc_dtype(q.dtype)
    group = group_size(num_heads, num_kv_heads)
    if q.numel() == 0 or num_slots == 0:
        lse = torch.full((batch, num_heads), -torch.inf, dtype=acc, device=q.device)
        nothing = torch.zeros(batch, num_kv_heads, group, num_slots, dtype=acc, device=q.device)
        return q.new_zeros(batch, num_heads, v.shape[3]), lse, nothing, nothing
    factor = scale * LOG2_E if softcap is None else scale / softcap
    queries = (q.to(acc) * factor).view(batch, num_kv_heads, group, head_dim)
    spans = _spans(k, acc)
    scratch = None
    if k.dtype != acc and not wants_grad(q, k, v):
        # One buffer for all blocks: allocating each anew takes longer than converting it.
        scratch = k.new_empty(*k.shape[:2], spans[0][1], max(head_dim, v.shape[3]), dtype=acc)
    parts = [queries @ _converted(k[:, :, a:b], acc, scratch).mT for a, b in spans]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, 3)  # [B, Hkv, G, S], in units of log2
    if softcap is not None:
        logits = logits.tanh() * (softcap * LOG2_E)
    if log_mass is not None:
        logits = logits + (log_mass.to(acc) * LOG2_E).unsqueeze(2)
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(2), -torch.inf)
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp2(logits - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + torch.log2(total)).squeeze(-1) * LN_2
    probs = weights / torch.where(total == 0, torch.ones_like(total), total)
    out = _weighted_values(probs, v, None if finite else valid, spans, scratch)
    return out.reshape(batch, num_heads, -1).to(q.dtype), lse.reshape(batch, num_heads), logits, probs


def _spans(k: Tensor, acc: torch.dtype) -> list[tuple[int, int]]:
    """Blocks of slots that are converted together; all of them at once where nothing needs converting."""
    num_slots = k.shape[2]
    size = num_slots if k.dtype == acc else max(1, CONVERTED_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[3]))
    return [(start, min(start + size, num_slots)) for start in range(0, num_slots, size)]


def _converted(x: Tensor, acc: torch.dtype, scratch: Tensor | None) -> Tensor:
    """x [B, Hkv, n, D] in acc dtype: in `scratch` [B, Hkv, >= n, >= D], or as autograd can follow it."""
    return x.to(acc) if scratch is None else scratch[:, :, : x.shape[2], : x.shape[3]].copy_(x)


def _weighted_values(
    probs: Tensor, v: Tensor, valid: Tensor | None, spans: list[tuple[int, int]], scratch: Tensor | None
) -> Tensor:
    """probs [B, Hkv, G, S] @ v [B, Hkv, S, D], where invalid slots of v may hold NaN or inf.

    Cleaning V copies it, which would double the cost of a step. On a CPU it is done only if the product shows that
    something was not finite; elsewhere, where looking would stall the device, always.
    """
    clean = valid is not None and v.device.type != "cpu"
    out = _product(probs, v, valid if clean else None, spans, scratch)
    if valid is not None and not clean and not torch.isfinite(out).all():
        out = _product(probs, v, valid, spans, scratch)
    return out


def _product(
    probs: Tensor, v: Tensor, valid: Tensor | None, spans: list[tuple[int, int]], scratch: Tensor | None
) -> Tensor:
    total = None
    for a, b in spans:
        values = _converted(v[:, :, a:b], probs.dtype, scratch)
        if valid is not None:
            values = values.masked_fill(~valid[:, :, a:b].unsqueeze(-1), 0)
        part = probs[..., a:b] @ values
        total = part if total is None else total + part
    return total
