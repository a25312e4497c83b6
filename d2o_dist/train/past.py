"""What a continuation attends to besides itself, and how: with gradients, on any device.

Shape legend: B rows, Hq query heads, Hkv key/value heads, n tokens of the continuation, S slots, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Flash kernels take head dims that are multiples of this.
_DIM_STEP = 8


@dataclass(frozen=True)
class Past:
    """The keys and values of one layer that are left of a prompt.

    Attributes:
        keys, values: [B, Hkv, S, D], differentiable functions of the prompt's.
        log_mass: [B, Hkv, S] added to each slot's logit, a constant; None: zeros.
        live: [B, S] bool, slots in use; None: all.
        window: keys that a query sees, itself included; None: all. The slots are then the last S tokens before it.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor | None = None
    live: Tensor | None = None
    window: int | None = None


def attend_past(q: Tensor, k: Tensor, v: Tensor, past: Past, scale: float) -> Tensor:
    """Each query over the live slots and causally over the continuation's own tokens: [B, Hq, n, D].

    Args:
        q: [B, Hq, n, D]; k, v: [B, Hkv, n, D], of the continuation.
    """
    keys, values = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
    mask = _mask(past, k.shape[2])
    if past.log_mass is None:
        return _attention(q, keys, values, mask, scale)
    # A bias per slot is two more dims of the dot product: no [Hq, n, S] mask, and any attention kernel will do. Two,
    # because what 16 bits lose of the first is in the second.
    dim = q.shape[-1]
    bias = torch.cat([past.log_mass, past.log_mass.new_zeros(k.shape[:3])], 2)
    high = bias.to(q.dtype)
    low = (bias - high).to(q.dtype)
    room = -(dim + 2) % _DIM_STEP
    queries = torch.cat([q * scale, q.new_ones(*q.shape[:3], 2), q.new_zeros(*q.shape[:3], room)], -1)
    keys = torch.cat([keys, torch.stack([high, low], -1), keys.new_zeros(*keys.shape[:3], room)], -1)
    return _attention(queries, keys, pad(values, (0, room + 2)), mask, 1.0)[..., :dim]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Masked attention of grouped heads: q [B, Hq, n, D]; k, v [B, Hkv, K, D]."""
    if q.device.type == "cuda":
        # With a mask, grouped heads leave CUDA only the kernel that holds all logits; repeated heads have a better one.
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def _mask(past: Past, length: int) -> Tensor:
    """Bool, [n, S + n] or, where rows differ, [B, 1, n, S + n]: what each query sees."""
    held, device = past.keys.shape[2], past.keys.device
    query = torch.arange(held, held + length, device=device)[:, None]
    key = torch.arange(held + length, device=device)
    seen = key <= query
    if past.window is not None:
        seen = seen & (key > query - past.window)
    if past.live is None:
        return seen
    live = pad(past.live, (0, length), value=True)
    return seen & live[:, None, None]


def window_past(keys: Tensor, values: Tensor, window: int | None) -> Past:
    """All keys, or the `window - 1` newest: what the next query sees beside itself."""
    if window is None:
        return Past(keys, values)
    start = max(0, keys.shape[2] - (window - 1))
    return Past(keys[:, :, start:], values[:, :, start:], window=window)
