"""Merging attention parts that were computed over disjoint sets of keys, of which a learned sink is one."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_partials(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention result from partial ones: L = logsumexp(lse_r), out = sum_r exp(lse_r - L) out_r.

    outs: each [..., D]; lses: each [...], acc dtype, -inf where the part had no key (its `out` may then hold anything).
    Returns (out [..., D] in the dtype of outs[0], lse [...]). Rows that are empty in every part: out 0, lse -inf. Rows
    with an lse of NaN or +inf: NaN.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"number of outs ({len(outs)}) must equal number of lses ({len(lses)}) and be positive")
    top = torch.stack(list(lses)).amax(0)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # -inf - -inf would be NaN
    weights = [torch.exp(lse - top) for lse in lses]
    total = torch.stack(weights).sum(0)
    divisor = torch.where(total == 0, torch.ones_like(total), total)
    merged = torch.zeros_like(outs[0], dtype=lses[0].dtype)
    for out, weight in zip(outs, weights, strict=True):
        share = (weight / divisor).unsqueeze(-1)
        # `where` and not a product: an empty part may hold NaN, and 0 * NaN is NaN. A NaN share is no empty part.
        merged += torch.where(share == 0, torch.zeros_like(merged), share * out.to(merged.dtype))
    return merged.to(outs[0].dtype), top + torch.log(total)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention whose queries also see a key of logit `sinks` and value zero: the merge with a part that is that key.

    out [B, Hq, ..., D], lse [B, Hq, ...] over all other keys of all ranks; sinks [1, Hq], or None: there is none.
    Returns both, in the same dtypes.
    """
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype).reshape(1, -1, *[1] * (lse.dim() - 2)))
    return (out * torch.exp(lse - total).unsqueeze(-1)).to(out.dtype), total
