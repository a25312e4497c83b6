"""The nearest kept key of every evicted key, by cosine."""

from torch import Tensor

from d2o_dist.kernels.nearest_kept.naive import naive_nearest_kept
from d2o_dist.kernels.nearest_kept.torch_blocked import blocked_nearest_kept
from d2o_dist.kernels.registry import Op, Torch, Triton

__all__ = ["naive_nearest_kept", "nearest_kept"]

_OP = Op("nearest_kept", Triton("nearest_kept.triton:triton_nearest_of_targets"), Torch(blocked_nearest_kept))


def nearest_kept(evicted: Tensor, kept: Tensor, target_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """evicted [..., E, D], kept [..., K, D], target_mask [..., K] bool or None (all are targets); leading dims equal.

    Returns (similarity [..., E] acc dtype: the largest cosine to a target; index [..., E] int64: its row in `kept`,
    the lowest one on ties). Zero-norm keys have cosine 0 with everything. A row without a target: -inf, 0.
    Cosines are not clamped. Rows of `kept` that are no target may hold anything, NaN included. Not differentiable.
    """
    if evicted.shape[:-2] != kept.shape[:-2] or evicted.shape[-1] != kept.shape[-1]:
        raise ValueError(f"evicted {tuple(evicted.shape)} and kept {tuple(kept.shape)} may differ in dim -2 only")
    if evicted.dtype != kept.dtype:
        raise ValueError(f"dtype of evicted ({evicted.dtype}) must equal dtype of kept ({kept.dtype})")
    if target_mask is not None and target_mask.shape != kept.shape[:-1]:
        raise ValueError(f"target_mask {tuple(target_mask.shape)} must have kept's shape {tuple(kept.shape[:-1])}")
    return _OP.pick(evicted, kept)(evicted, kept, target_mask)
