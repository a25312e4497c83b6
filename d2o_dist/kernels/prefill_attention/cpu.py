"""CPU: PyTorch's flash kernel, which returns the lse, takes GQA as it is, and float64, float32, bfloat16, float16.

What was found (torch 2.13): its `is_causal` aligns upper-left, so a chunk is two calls and a merge; zero queries or
zero keys kill the process with SIGFPE, so neither ever reaches it; a bool mask is refused, and a mask of another
dtype than float64 queries is silently misread, while bf16 and fp16 queries take float32 masks; a mask may be expanded
(stride 0) and goes together with `is_causal`; a row whose mask is -inf throughout has lse 0; in bf16 and fp16 its lse
is off by up to 1e-4 (float32: 1e-6), from a faster exp.
"""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype, group_size
from d2o_dist.kernels.lse import merge_partials

MIN_WINDOW_BLOCK, MAX_WINDOW_BLOCK = 128, 1024  # queries a block of the windowed path


def cpu_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, q_start: int, window: int | None, bias: Tensor | None = None,
    softcap: None = None,
) -> tuple[Tensor, Tensor]:
    """As `prefill_attention`, on the CPU; a window, if any, is shorter than the keys, and there is no bias with it."""
    if q.shape[2] == 0 or q.shape[0] == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=acc_dtype(q.dtype))
    if window is not None:
        assert bias is None
        return _sliding(q, k, v, scale, q_start, window)
    parts = []
    for here, causal in ((slice(q_start, None), True), (slice(q_start), False)):
        if causal or q_start > 0:
            part = None if bias is None else bias[:, :, here]
            parts.append(_attend(q, k[:, :, here], v[:, :, here], scale, causal=causal, bias=part))
    out, lse = parts[0] if len(parts) == 1 else merge_partials(*zip(*reversed(parts), strict=True))
    return out, lse.contiguous()  # the kernel lays lse out as [B, Tq, Hq]


def cpu_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`, on the CPU; Tq and Tk at least 1."""
    out, lse = _attend(q, k, v, scale, causal=False, bias=bias)
    return out, lse.contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """causal: Tq = Tk. The bias is a mask that is expanded over queries: it costs next to nothing."""
    if bias is None:
        return _flash(q, k, v, scale, causal=causal)
    dead = bias == -torch.inf
    group = group_size(q.shape[1], k.shape[1])
    mask = bias.to(acc_dtype(q.dtype)).repeat_interleave(group, 1).unsqueeze(2)
    mask = mask.expand(-1, -1, q.shape[2], -1)
    if not bool(dead.any()):
        return _flash(q, k, v, scale, causal=causal, mask=mask)
    k, v = (x.masked_fill(dead.unsqueeze(-1), 0) for x in (k, v))  # what they hold must not matter, be it NaN
    out, lse = _flash(q, k, v, scale, causal=causal, mask=mask)
    nothing = dead.cummin(-1).values if causal else dead.all(-1, keepdim=True)  # a query sees no live key
    nothing = nothing.repeat_interleave(group, 1).expand(lse.shape)
    return out.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -torch.inf)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _sliding(q: Tensor, k: Tensor, v: Tensor, scale: float, q_start: int, window: int) -> tuple[Tensor, Tensor]:
    """Blocks of queries, each over the `window + block` keys that it can see, with a band as mask."""
    block = min(max(window, MIN_WINDOW_BLOCK), MAX_WINDOW_BLOCK)
    outs, lses = [], []
    for start in range(0, q.shape[2], block):
        queries = q[:, :, start : start + block]
        first_query = q_start + start
        first_key, end_key = max(0, first_query - window + 1), first_query + queries.shape[2]
        ahead = torch.arange(first_key, end_key, device=q.device)[None, :]
        ahead = ahead - torch.arange(first_query, end_key, device=q.device)[:, None]
        mask = torch.zeros(ahead.shape, dtype=q.dtype, device=q.device)
        mask.masked_fill_((ahead > 0) | (ahead <= -window), -torch.inf)
        keys, values = k[:, :, first_key:end_key], v[:, :, first_key:end_key]
        out, lse = _flash(queries, keys, values, scale, causal=False, mask=mask)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2).contiguous()
