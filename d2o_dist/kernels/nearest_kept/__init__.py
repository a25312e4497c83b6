"""The nearest kept key of every evicted key, by cosine."""

from torch import Tensor

from d2o_dist.kernels.backend import takes_triton
from d2o_dist.kernels.nearest_kept.naive import naive_nearest_kept
from d2o_dist.kernels.nearest_kept.torch_blocked import blocked_nearest_kept

__all__ = ["naive_nearest_kept", "nearest_kept"]


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
    if takes_triton(evicted, kept, head_dim=evicted.shape[-1]) and evicted.numel() and kept.numel():
        from d2o_dist.kernels.nearest_kept.triton import triton_nearest_kept

        lead = evicted.shape[:-1]
        rows = lead[:-1].numel()
        evicted, kept = evicted.reshape(rows, *evicted.shape[-2:]), kept.reshape(rows, *kept.shape[-2:])
        mask = None if target_mask is None else target_mask.reshape(rows, -1)
        found = triton_nearest_kept(evicted, kept, mask)
        return found[0].view(lead), found[1].view(lead)
    return blocked_nearest_kept(evicted, kept, target_mask)
