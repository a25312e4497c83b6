"""A decode step of a layer on CUDA, in two kernels: attention of splits of the slots, which may also write the token,
and what becomes of them. K is read once; the logits that are kept for the scores are read once more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_dist.kernels.decode_attention.triton import decode_parts
from d2o_dist.kernels.finish_decode.triton import finish
from d2o_dist.kernels.segments import Segments


@torch.no_grad()
def triton_scored_decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, valid: Tensor, newest: Tensor, log_mass: Tensor | None,
    softcap: float | None, sinks: Tensor | None, scores: Tensor | None, peaks: bool, rates: Tensor | None,
    rate_window: int, present: Tensor | None, widths: Sequence[int] | None, new: tuple[Tensor, Tensor] | None,
    total: None, segments: Segments | None = None,
) -> Tensor:  # fmt: skip
    """As `scored_decode`; with segments k, v [N, D], valid, log_mass, scores and rates [N] are of all of them."""
    if segments is None and valid.dim() == 2:
        valid = valid.unsqueeze(1).expand(k.shape[:3])
    keeps = scores is not None or rates is not None
    outs, lses, logits = decode_parts(
        q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap, segments=segments, slot=newest, new=new,
        with_logits=keeps,
    )  # fmt: skip
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    num_kv_heads = k.shape[1] if segments is None else segments.start.shape[1]
    finish(
        lses, logits, num_kv_heads, outs=outs, out=out, sinks=sinks, scores=scores, rates=rates, peaks=peaks,
        newest=newest, rate_window=rate_window, present=present, segments=segments,
    )  # fmt: skip
    return out
