"""Evicted rows folded into kept rows: weighted means over segments, the same bits in every run."""

import torch
from torch import Tensor

from d2o_dist.kernels.common import acc_dtype
from d2o_dist.kernels.merge_into.naive import naive_merge_into
from d2o_dist.kernels.merge_into.torch_blocked import blocked_merge_into
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["merge_into", "naive_merge_into"]

_OP = Op("merge_into", Triton("merge_into.triton:triton_merge_into"), Torch(blocked_merge_into))


def merge_into(
    kept: tuple[Tensor, ...],
    evicted: tuple[Tensor, ...],
    weight: Tensor,
    target: Tensor,
    merged: Tensor,
    own: Tensor | float,
    *,
    share: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """kept_j <- (own_j kept_j + sum of weight_i evicted_i) / (own_j + sum of share_i), over merged i with target j.

    Args:
        kept: tensors [B, Hkv, K, D] (keys, values, or both); evicted: as many [B, Hkv, E, D].
        weight: [B, Hkv, E]; target: [B, Hkv, E] int64, in [0, K) where merged.
        merged: [B, Hkv, E] bool. What is not merged may hold anything, NaN included.
        own: [B, Hkv, K], or one number for all kept rows.
        share: [B, Hkv, E] what each row adds to the divisor; `weight` by default.

    Returns:
        The means in the dtype of `kept` (accumulated in acc dtype; new tensors; a row into which nothing is merged
        keeps its bits), the divisors [B, Hkv, K] in acc dtype, and whether anything was merged [B, Hkv, K]. Not
        differentiable.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not kept or len(kept) != len(evicted):
        raise ValueError(f"number of kept tensors ({len(kept)}) must equal that of evicted ones ({len(evicted)}), >= 1")
    lead = kept[0].shape[:2]
    for old, new in zip(kept, evicted, strict=True):
        if old.shape[:3] != kept[0].shape[:3] or new.shape[:3] != (*lead, weight.shape[-1]):
            raise ValueError(f"kept {tuple(old.shape)} and evicted {tuple(new.shape)} may differ in dim 2 only, "
                             f"and weight is {tuple(weight.shape)}")  # fmt: skip
        if old.shape[3] != new.shape[3] or old.dtype != new.dtype:
            raise ValueError(f"kept {tuple(old.shape)} {old.dtype} must match evicted {tuple(new.shape)} {new.dtype}")
    for name, x in (("target", target), ("merged", merged), ("share", share)):
        if x is not None and x.shape != weight.shape:
            raise ValueError(f"{name} {tuple(x.shape)} must have the shape of weight {tuple(weight.shape)}")
    dtype, rows = acc_dtype(kept[0].dtype), kept[0].shape[:3]
    # A number is filled in, not copied: a copy would wait for the device.
    own = own.to(dtype) if isinstance(own, Tensor) else torch.full((), own, dtype=dtype, device=kept[0].device)
    own = own.expand(rows)
    weight = weight.to(dtype)
    share = weight if share is None else share.to(dtype)
    return _OP.pick(*kept, *evicted)(kept, evicted, weight, target, merged, own, share)
