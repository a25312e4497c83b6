"""Attention of one new query a row over its slots, with the probabilities that the scores need."""

from torch import Tensor

from d2o_dist.kernels.common import check_queries_keys
from d2o_dist.kernels.decode_attention.naive import naive_decode_attention, naive_decode_with_logits
from d2o_dist.kernels.decode_attention.torch_blocked import blocked_decode_attention, blocked_decode_with_logits
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["decode_attention", "decode_with_logits", "naive_decode_attention", "naive_decode_with_logits"]

_PROBABILITIES = Op(
    "decode_attention",
    Triton("decode_attention.triton:triton_decode_with_probabilities"),
    Torch(blocked_decode_attention),
)
_LOGITS = Op(
    "decode_with_logits",
    Triton("decode_attention.triton:triton_decode_attention"),
    Torch(blocked_decode_with_logits),
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
    finite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, D]; k [B, Hkv, S, D], v [B, Hkv, S, Dv]; valid [B, S] or [B, Hkv, S] bool; log_mass [B, Hkv, S], added
    to the logits, after softcap has bounded them.

    Returns (out [B, Hq, Dv] in q.dtype, lse [B, Hq] acc dtype, natural log, log_mass included, probs [B, Hkv, S] acc
    dtype: the slot's probabilities summed over the G query heads of the group).
    Invalid slots have probability 0 whatever they hold. No valid slot: out 0, lse -inf, probs 0. `finite`: the caller
    vouches that the values of invalid slots are finite numbers, and nothing looks whether they are.
    """
    valid = _checked_valid(q, k, v, valid, log_mass)
    path = _PROBABILITIES.pick(q, k, v)
    return path(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap, finite=finite)


def decode_with_logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    valid: Tensor | None = None,
    log_mass: Tensor | None = None,
    softcap: float | None = None,
    slot: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`, but the third is the logits [B, Hq, S]: acc dtype, log_mass included, -inf where invalid.

    For ranks that hold parts of the slots: what all ranks found of out and lse, and these logits, are for
    `finish_decode`.

    Args:
        slot: [B, Hkv] or [B, 1] int64 of the token of this step, -1 where it is elsewhere; new: its key [B, Hkv, D] and
            value, which are written there first. None: they are there.
    """
    valid = _checked_valid(q, k, v, valid, log_mass)
    return _LOGITS.pick(q, k, v)(q, k, v, scale, valid=valid, log_mass=log_mass, softcap=softcap, slot=slot, new=new)


def _checked_valid(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, log_mass: Tensor | None
) -> Tensor | None:
    """Raises ValueError where shapes do not fit; `valid` as [B, Hkv, S]."""
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
