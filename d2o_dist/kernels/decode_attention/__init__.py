"""Attention of one new query a row over its slots, with the probabilities that the scores need."""

from torch import Tensor

from d2o_dist.kernels.common import check_queries_keys
from d2o_dist.kernels.decode_attention.naive import naive_decode_attention
from d2o_dist.kernels.decode_attention.torch_blocked import blocked_decode_attention

__all__ = ["decode_attention", "decode_attention_per_head", "naive_decode_attention"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, D]; k, v [B, Hkv, S, D]; valid [B, S] or [B, Hkv, S] bool; log_mass [B, Hkv, S], added to the logits.

    Returns (out [B, Hq, D] in q.dtype, lse [B, Hq] acc dtype, natural log, log_mass included, probs [B, Hkv, S] acc
    dtype: the slot's probabilities summed over the G query heads of the group).
    Invalid slots have probability 0 whatever they hold. No valid slot: out 0, lse -inf, probs 0.
    """
    valid = _checked(q, k, v, valid, log_mass)
    out, lse, probs = blocked_decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass)
    return out.to(q.dtype), lse, probs.sum(2)


def decode_attention_per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`, for a part of the slots: what is needed to put parts together.

    Returns (out [B, Hq, D], lse [B, Hq], probs [B, Hkv, G, S] of each query head), all in acc dtype.
    """
    valid = _checked(q, k, v, valid, log_mass)
    return blocked_decode_attention(q, k, v, scale, valid=valid, log_mass=log_mass)


def _checked(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, log_mass: Tensor | None) -> Tensor | None:
    """Raises ValueError for shapes that do not fit; the validity as [B, Hkv, S]."""
    if q.dim() != 3:
        raise ValueError(f"q must have 3 dims [B, Hq, D], got {q.dim()}")
    check_queries_keys(q.unsqueeze(2), k, v)
    if valid is not None and valid.shape not in (k.shape[:3], (k.shape[0], k.shape[2])):
        raise ValueError(f"valid {tuple(valid.shape)} must be [B, S] or [B, Hkv, S] of k {tuple(k.shape)}")
    if log_mass is not None and log_mass.shape != k.shape[:3]:
        raise ValueError(f"log_mass {tuple(log_mass.shape)} must have k's shape {tuple(k.shape[:3])}")
    if valid is not None and valid.dim() == 2:
        valid = valid.unsqueeze(1).expand(k.shape[:3])
    return valid
