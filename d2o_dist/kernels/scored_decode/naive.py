"""The oracle: the oracles of its two parts, one after the other."""

from torch import Tensor

from d2o_dist.kernels.decode_attention.naive import naive_decode_with_logits
from d2o_dist.kernels.finish_decode.naive import naive_finish_decode


def naive_scored_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor,
    newest: Tensor,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scores: Tensor | None = None,
    peaks: bool = False,
    rates: Tensor | None = None,
    rate_window: int = 32,
    present: Tensor | None = None,
) -> Tensor:
    """As `scored_decode`."""
    out, lse, logits = naive_decode_with_logits(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap)
    return naive_finish_decode(
        out.to(lse.dtype).unsqueeze(0), lse.unsqueeze(0), logits, q.dtype, num_kv_heads=k.shape[1], sinks=sinks,
        scores=scores, rates=rates, peaks=peaks, newest=newest, rate_window=rate_window, present=present,
    )  # fmt: skip
