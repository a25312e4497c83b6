"""Scores and rates by CUDA C++, from the logits that decode attention kept: a thread a slot."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from d2o_dist.kernels.common import group_size
from d2o_dist.kernels.cuda.library import call, schedule, stream_of
from d2o_dist.kernels.cuda.params import ScoreParams, Strided


@torch.no_grad()
def cuda_update_scores(
    logits: Tensor,
    lse: Tensor,
    num_kv_heads: int,
    *,
    scores: Tensor | None,
    rates: Tensor | None,
    newest: Tensor | None,
    decay: float,
    present: Tensor | None,
    with_probs: bool,
) -> Tensor | None:
    """In place; as `update_scores`, float32, any strides. Returns probs [B, Hkv, S] if wanted."""
    batch, num_heads, num_slots = logits.shape
    device = logits.device
    probs = torch.empty(batch, num_kv_heads, num_slots, dtype=torch.float32, device=device) if with_probs else None
    newest = None if newest is None else newest.contiguous()
    present = None if present is None else present.contiguous()
    params = ScoreParams(
        *(Strided.of(x) for x in (logits, lse, scores, rates, probs)),
        newest=None if newest is None else newest.data_ptr(),
        present=None if present is None else present.data_ptr(),
        batch=batch,
        heads=num_kv_heads,
        group=group_size(num_heads, num_kv_heads),
        num_slots=num_slots,
        schedule=schedule(),
        decay=decay,
        rest=1 - decay,
    )
    call("d2o_update_scores", device, ctypes.byref(params), stream_of(device))
    return probs
