"""Stand-ins for flash-attn 2 and 3: the signatures of their `flash_attn_func`, computed by a dense oracle.

Written from the packages' documentation: [B, T, H, D], grouped heads, causal masks aligned bottom right, windows as
(left, right) distances of which -1 is unbounded, an lse of [B, Hq, Tq] in float32.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

CALLS: list[dict] = []


def attend(q, k, v, scale, causal, window_size):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.double().permute(0, 2, 1, 3) for x in (q, k, v))
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = queries @ keys.mT * scale
    place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]  # where a query stands among the keys
    key = torch.arange(k.shape[1])
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if right >= 0:
        hidden |= key > place + right
    if left >= 0:
        hidden |= key < place - left
    logits = logits.masked_fill(hidden, -torch.inf)
    out = (logits.softmax(-1) @ values).permute(0, 2, 1, 3).to(q.dtype).contiguous()
    return out, logits.logsumexp(-1).float()


def flash_attn_func_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert dropout_p == 0 and softcap == 0 and alibi_slopes is None and q.dtype in (torch.float16, torch.bfloat16)
    CALLS.append({"version": 2, "causal": causal, "window": window_size, "queries": q.shape[1], "keys": k.shape[1]})
    out, lse = attend(q, k, v, softmax_scale, causal, window_size)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert qv is None and softcap == 0 and q.dtype in (torch.float16, torch.bfloat16)
    CALLS.append({"version": 3, "causal": causal, "window": window_size, "queries": q.shape[1], "keys": k.shape[1]})
    out, lse = attend(q, k, v, softmax_scale, causal, window_size)
    return (out, lse) if return_attn_probs else out


MODULES = {
    "flash_attn": SimpleNamespace(flash_attn_func=flash_attn_func_2),
    "flash_attn_interface": SimpleNamespace(flash_attn_func=flash_attn_func_3),
}
